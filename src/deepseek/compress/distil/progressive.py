"""Progressive distillation: the teacher learns too, and its checkpoints are the lessons."""

from __future__ import annotations

import copy
import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from deepseek.compress.distil.imitation import LESSON
from deepseek.compress.learning import Learning, learn, open_teacher
from deepseek.compress.work import Outcome, Work
from deepseek.errors import ConfigError, describe
from deepseek.models import Decoder, Encoder
from deepseek.ops.cross_entropy import IGNORED, linear_cross_entropy
from deepseek.ops.distillation import linear_divergence
from deepseek.train import Part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progressive(Learning):
    """Trains the teacher on the data, and with it the model on what the teacher predicts, which
    grows sharper and harder from checkpoint to checkpoint.

    Source: Panigrahi et al., "Progressive distillation induces an implicit curriculum"
    (2410.05464): a student learns from a teacher's checkpoints, one after another.
    Deviation: both are trained in the same steps, as in Rao et al. (2409.12512), so that a
    teacher's pass serves both; the teacher's gradient is that of the data alone.
    """

    kind: Literal["progressive"] = "progressive"
    checkpoints: int | None = 4
    """How many states of the teacher, evenly through the steps, are learned from, the first as it
    begins; None for a new one in every step, which costs a pass less and which a student follows
    worse (`benchmarks/progressive.py`)."""
    temperature: float = 1.0
    """Of the logits of both."""
    tokens: float = 1.0
    """Weight of the student's own loss of the text's tokens, beside its distance from the teacher:
    what it learns from while the teacher knows little."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoints is not None and not 1 <= self.checkpoints <= self.steps:
            must = f"from 1 to the {self.steps} steps"
            raise ConfigError(describe("checkpoints", "Progressive", must, self.checkpoints))
        if self.temperature <= 0:
            raise ConfigError(describe("temperature", "Progressive", "positive", self.temperature))
        if self.tokens < 0:
            raise ConfigError(describe("tokens", "Progressive", "from 0 on", self.tokens))


def progress(stage: Progressive, work: Work) -> Outcome:
    """Train the model of `work` and the stage's teacher together; the teacher is thrown away.

    Raises:
        ConfigError: as `distil`, and the model is no decoder.
        FormatError: as `distil`.
        CapacityError: as `distil`.
        Interrupted: as `distil`.
    """
    teacher = open_teacher(stage, work, torch.float32)
    if not isinstance(teacher, Decoder):
        raise ConfigError(describe("model", "Progressive", "a decoder", type(teacher).__name__))
    return learn(stage, work, _Together(teacher, stage), teacher)


class _Lesson(nn.Module):
    """What stands in the student while it learns: the teacher, and its newest checkpoint."""

    def __init__(self, teacher: Decoder, keeps: bool) -> None:
        super().__init__()
        self.teacher = teacher
        self.checkpoint = _frozen(teacher) if keeps else None

    def take_checkpoint(self) -> None:
        """Copy the teacher as it is now."""
        assert self.checkpoint is not None
        taken = dict(self.teacher.named_parameters(remove_duplicate=False))
        for name, value in self.checkpoint.named_buffers():
            if name in taken:
                value.copy_(taken[name].detach())


class _Together:
    """The objective: the teacher's loss of the tokens, and the student's distance from it."""

    def __init__(self, teacher: Decoder, stage: Progressive) -> None:
        self._teacher, self._stage = teacher, stage

    def begin(self, model: Decoder | Encoder) -> None:
        """Put the teacher into the student, so that it is trained and checkpointed with it."""
        lesson = _Lesson(self._teacher, self._stage.checkpoints is not None)
        model.add_module(LESSON, lesson.requires_grad_(True))

    def end(self, model: Decoder | Encoder) -> None:
        """Take the teacher out."""
        delattr(model, LESSON)

    def loss(self, model: Decoder | Encoder, part: Part) -> Tensor:
        """Return the sum of both losses over the counted tokens, float32 scalar."""
        assert isinstance(model, Decoder)
        lesson = getattr(model, LESSON)
        tokens, counted = part.tokens, part.counted[:, 1:]
        labels = torch.where(counted, tokens[:, 1:], IGNORED)
        states = lesson.teacher.final_states(tokens)[:, :-1]
        head = lesson.teacher.lm_head.weight
        own = linear_cross_entropy(states.flatten(0, 1), head, labels.flatten())
        if lesson.checkpoint is not None:
            if self._begins_checkpoint(part.step):
                lesson.take_checkpoint()
            head = lesson.checkpoint.lm_head.weight
            with torch.no_grad():
                states = lesson.checkpoint.final_states(tokens)[:, :-1]
        student, weight = model.final_states(tokens)[:, :-1].flatten(0, 1), model.lm_head.weight
        if self._stage.tokens:
            alone = linear_cross_entropy(student, weight, labels.flatten())
            own = own + self._stage.tokens * alone
        return own + linear_divergence(
            student,
            weight,
            states.flatten(0, 1),
            head,
            counted.flatten(),
            self._stage.temperature,
        )

    def _begins_checkpoint(self, step: int) -> bool:
        assert self._stage.checkpoints is not None
        count, steps = self._stage.checkpoints, self._stage.steps
        return step == 0 or step * count // steps != (step - 1) * count // steps


def _frozen(model: Decoder) -> Decoder:
    """Return a copy whose weights are buffers, which are kept in checkpoints and never trained."""
    frozen = copy.deepcopy(model)
    for module in frozen.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, value.detach().clone())
    return frozen
