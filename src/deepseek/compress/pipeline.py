"""What a compression is: a model, stages in order, and gates at the end, as frozen data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from deepseek.compress.calibration import PYTHON_TOPICS
from deepseek.compress.gates import GateConfig, SizeGate, TextGate
from deepseek.compress.stage import Stage, kind_of
from deepseek.compress.stages import StageConfig
from deepseek.config import Config
from deepseek.config_files import read_config
from deepseek.errors import ConfigError, describe
from deepseek.ops.scheme import KVStorage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline(Config):
    """A model, the stages it goes through, and the gates that it must pass."""

    model: str
    """A bundle to start from: a name or folder."""
    stages: tuple[StageConfig, ...]
    gates: tuple[GateConfig, ...] = ()
    kv: KVStorage | None = None
    """How keys and values are cached; None for bfloat16, the engine's own."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of what is not on a grid in the last bundle; between stages it is float32."""
    floor: float | None = 20.0
    """Most times the start's perplexity at any border: a model that is worse is broken, and no
    stage is begun on it; None for no such check."""
    floor_text: str = PYTHON_TOPICS
    """What that is measured on, the last fifth of it."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError(describe("stages", "Pipeline", "at least one", "none"))
        if self.floor is not None and not self.floor > 1:
            raise ConfigError(describe("floor", "Pipeline", "above 1, or None", self.floor))
        check_order(self.stages)

    def hash_until(self, number: int) -> str:
        """Return the hash of everything that the bundle behind a stage depends on.

        Args:
            number: of the stage, from 0.
        """
        parts = [stage.to_dict() for stage in self.stages[: number + 1]]
        text = json.dumps([self.model, self.seed, self.kv, self.dtype, parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def check_order(stages: Sequence[Stage]) -> None:
    """Refuse stages that cannot follow one another.

    Raises:
        ConfigError: names the stage and the reason.
    """
    for number, stage in enumerate(stages):
        reason = stage.why_not_after(stages[:number])
        if reason is not None:
            must = f"in another place: {reason}"
            step = "Move it before that stage"
            name = f"stage {number + 1}"
            raise ConfigError(describe(name, "the pipeline", must, kind_of(stage), step))


def read_pipeline(path: str | Path) -> Pipeline:
    """Return the pipeline in a file: YAML, or Python with a function `pipeline` that returns it.

    Raises:
        ConfigError: there is no such file, or what is in it is no pipeline.
        FormatError: it cannot be read.
    """
    return read_config(path, Pipeline, function="pipeline", owner="compress")


def usual_gates(bits: int) -> tuple[GateConfig, ...]:
    """Return what a model quantized to so many bits must pass unless something else is said."""
    if bits == 8:
        return (TextGate(most_perplexity_ratio=1.01), SizeGate(most_share=0.27))
    return (TextGate(most_perplexity_ratio=1.03), SizeGate(most_share=0.18))


def summary_of(stages: Sequence[Stage]) -> str:
    """Return stages in a line, as a card's summary says them."""
    return ", ".join(kind_of(stage) for stage in stages)


def settings_of(pipeline: Pipeline, number: int) -> dict[str, Any]:
    """Return what a card records of the stage that made a bundle."""
    return {**pipeline.stages[number].to_dict(), "pipeline": pipeline.hash_until(number)}
