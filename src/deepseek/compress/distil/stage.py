"""Distillation: the model learns what a larger one makes of a text."""

from __future__ import annotations

import dataclasses
from typing import Literal

from deepseek.compress.distil.imitation import Imitation, ImitationLoss
from deepseek.compress.learning import Learning, learn, open_teacher
from deepseek.compress.work import Outcome, Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distil(Learning):
    """Lets the model, made smaller by stages before, learn from a teacher what it has lost."""

    kind: Literal["distil"] = "distil"
    imitation: Imitation = dataclasses.field(default_factory=Imitation)
    """What of the teacher, with which weights."""


def distil(stage: Distil, work: Work) -> Outcome:
    """Train the model of `work` to imitate the stage's teacher; a killed stage goes on in the
    folder of `work` and ends with the same bits.

    Raises:
        ConfigError: model, teacher, data and settings do not fit together.
        FormatError: a bundle, data or checkpoints are damaged.
        CapacityError: memory or disk ran out.
        Interrupted: a signal came; what was done is kept.
    """
    teacher = open_teacher(stage, work)
    objective = ImitationLoss(stage.imitation, teacher, work.seed)
    return learn(stage, work, objective, teacher)
