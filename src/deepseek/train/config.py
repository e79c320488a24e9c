"""What a run is: frozen data, the same from Python and from YAML."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from pathlib import Path
from typing import Literal

from deepseek.config import Config
from deepseek.config_files import read_config
from deepseek.errors import ConfigError, describe
from deepseek.models.config import GateConfig
from deepseek.optim import AdamW, Cosine, OptimizerConfig, ScheduleConfig
from deepseek.parallel import Exact, Mesh, TransportConfig

PYTHON_TOPICS = "python-topics"
"""The text that every Python carries, as a source of data."""
ALL_LINEAR = "all-linear"
"""Every linear layer, as the targets of adapters."""
TEACHER_TEXT = "teacher-text"
"""What the teacher writes by itself, as a source of data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source(Config):
    """Where a stage's data comes from."""

    path: str
    """A corpus folder of `deepseek.data.write_corpus`, a file or folder of text, `python-topics`,
    or `teacher-text`: what the run's teacher writes by itself, half of it conversations where it
    has a chat template."""
    weight: float | None = None
    """Its share of the samples; given for every source or for none (each sample once an epoch)."""
    target: Literal["tokens", "teacher"] = "tokens"
    """What is learned of a sample: its tokens, or the chances that the run's teacher gives to each
    token (distillation; a model's own start as teacher holds what it knew)."""
    num_tokens: int | None = None
    """How much the teacher writes; for `teacher-text` alone."""

    def __post_init__(self) -> None:
        is_written = self.path == TEACHER_TEXT
        if is_written != (self.num_tokens is not None):
            must = "given for teacher-text, and for nothing else"
            raise ConfigError(
                describe("num_tokens", f"source {self.path!r}", must, self.num_tokens)
            )
        if self.num_tokens is not None and self.num_tokens < 1:
            raise ConfigError(describe("num_tokens", "Source", "positive", self.num_tokens))

    @property
    def needs_teacher(self) -> bool:
        """Whether it asks anything of the teacher."""
        return self.target == "teacher" or self.path == TEACHER_TEXT


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(Config):
    """Low-rank adapters in place of whole matrices, by PEFT; merged where the stage ends.

    Source: Hu et al., "LoRA" (2106.09685); with `base` "int4" Dettmers et al., "QLoRA"
    (2305.14314).
    """

    rank: int = 16
    alpha: float = 32.0
    """The update is scaled by `alpha / rank`."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Last parts of the names of the layers that are adapted; or `all-linear` alone."""
    dropout: float = 0.0
    """Of the adapters' inputs."""
    base: Literal["float32", "int4"] = "float32"
    """How the layers' matrices are kept while the adapters train. Those in int4 are rounded to the
    engine's grid, and stay so in the merged model."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.targets:
            got = f"rank {self.rank}, targets {self.targets}"
            raise ConfigError(describe("rank and targets", "LowRank", "at least one each", got))
        if not 0 <= self.dropout < 1:
            raise ConfigError(describe("dropout", "LowRank", "from 0 to below 1", self.dropout))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitLoss(Config):
    """The loss of the states behind some layers too, by the model's own norm and head, so that
    tokens can leave the model there (`deepseek.generate.Exits`).

    Source: Elhoushi et al., "LayerSkip" (2404.16710), section 4.1, early exit loss. Deviations:
    the same layers in every step, no curriculum; no dropout of layers.
    """

    layers: tuple[int, ...]
    """Behind how many layers, ascending, at least 2; the last layer's loss is always there."""
    scale: float = 1.0
    """Of the weights of these layers, above 0 to 1."""

    def __post_init__(self) -> None:
        ascends = all(one < following for one, following in itertools.pairwise(self.layers))
        if not self.layers or self.layers[0] < 2 or not ascends:
            must = "numbers of layers from 2 on, ascending"
            raise ConfigError(describe("layers", "ExitLoss", must, self.layers))
        if not 0 < self.scale <= 1:
            raise ConfigError(describe("scale", "ExitLoss", "above 0, at most 1", self.scale))

    def weights(self, num_layers: int) -> dict[int, float]:
        """Return the weight of the loss behind so many layers, of a model of `num_layers`; they add
        up to 1. Behind layer n it grows with the sum of the numbers below n.

        Raises:
            ConfigError: a layer is not before the model's end.
        """
        if self.layers[-1] >= num_layers:
            must = f"below the model's {num_layers} layers"
            raise ConfigError(describe("layers", "ExitLoss", must, self.layers))
        raw = {layer: self.scale * layer * (layer - 1) / 2 for layer in self.layers}
        raw[num_layers] = num_layers - 1 + self.scale * (num_layers - 1) * (num_layers - 2) / 2
        total = sum(raw.values())
        return {layer: weight / total for layer, weight in raw.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage(Config):
    """One part of a run. At its border data, trained modules, optimizer and rate change
    together."""

    name: str
    data: tuple[Source, ...]
    steps: int | None = None
    """Optimizer steps; or give `epochs`."""
    epochs: float | None = None
    """How often each sample comes; needs sources without weights."""
    length: int = 512
    """Tokens of a sample."""
    batch: int = 8
    """Samples of a step, on all workers together."""
    micro_batch: int | None = None
    """Samples of a forward pass; None for the batch in one, or one pass a worker. Powers of two
    keep the result independent of the number of workers, bit by bit."""
    trains: tuple[str, ...] = ("*",)
    """Patterns of the names of the parameters that are trained (`model.layers.*`)."""
    adapter: LowRank | None = None
    """Train adapters, and `trains` not at all."""
    exit_loss: ExitLoss | None = None
    """Learn to predict behind some layers too; the loss that is shown is then the weighted mean."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=AdamW)
    schedule: ScheduleConfig = dataclasses.field(default_factory=Cosine)
    keeps_moments: bool = False
    """Go on with the optimizer state of the stage before, where the parameters are the same."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of products; weights, sums and the optimizer are float32."""
    max_grad_norm: float | None = 1.0
    """Longer gradients are shortened to it; None for as they are."""
    transport: TransportConfig = dataclasses.field(default_factory=Exact)
    """How gradients go from worker to worker."""
    sends_early: bool = True
    """Send gradients while the backward pass goes on; when they are sent does not show in the
    bits, and may change between starts."""
    recompute: bool = False
    """Forget the layers' insides in the forward pass and compute them again in the backward pass:
    less memory, a third more work."""
    gate_penalty: float = 0.0
    """Times the mean gate of the attention heads, over the tokens that are predicted, it is added
    to what the steps lower: heads are closed where they help little. Needs a model with gates."""
    start_share: float = 0.0
    """Share of the weights that the stage began with in its result, which is the average of old and
    new: what was known is held, and little of what was learned is lost."""
    evaluate: tuple[str, ...] = ()
    """Texts whose perplexity is measured at the end: files, or `python-topics`; of a `.jsonl` of
    conversations that of the answers."""

    def __post_init__(self) -> None:
        owner = f"stage {self.name!r}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ConfigError(
                describe("name", "Stage", "letters, digits, '.', '_', '-'", self.name)
            )
        if not self.data:
            raise ConfigError(describe("data", owner, "at least one source", "none"))
        if (self.steps is None) == (self.epochs is None):
            got = f"steps {self.steps}, epochs {self.epochs}"
            raise ConfigError(describe("steps or epochs", owner, "given, and not both", got))
        for name in ("steps", "length", "batch", "micro_batch", "epochs", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(describe(name, owner, "positive", value))
        if not 0 <= self.gate_penalty < math.inf:
            must = "from 0 on"
            raise ConfigError(describe("gate_penalty", owner, must, self.gate_penalty))
        if self.gate_penalty and self.adapter is not None:
            must, step = "0 with adapters", "Leave the adapter out"
            raise ConfigError(describe("gate_penalty", owner, must, self.gate_penalty, step))
        if not 0 <= self.start_share < 1:
            must = "from 0 to below 1"
            raise ConfigError(describe("start_share", owner, must, self.start_share))
        if self.start_share and self.adapter is not None and self.adapter.base != "float32":
            step = "Take adapters over a float32 base"
            got = f"{self.start_share} with a base in {self.adapter.base}"
            raise ConfigError(describe("start_share", owner, "0 on a grid", got, step))
        weighted = {source.weight is not None for source in self.data}
        if len(weighted) > 1:
            got = [source.weight for source in self.data]
            raise ConfigError(describe("weights", owner, "given for every source or none", got))
        if self.epochs is not None and weighted == {True}:
            step = "Say how many steps"
            raise ConfigError(describe("epochs", owner, "left out with weights", self.epochs, step))
        if self.exit_loss is not None and any(each.target == "teacher" for each in self.data):
            must = "left out where a source is learned from a teacher"
            raise ConfigError(describe("exit_loss", owner, must, self.exit_loss.layers))
        if self.adapter is not None and (self.keeps_moments or self.trains != ("*",)):
            must = "left as they are: adapters are all that is trained, and they are new"
            got = f"trains {self.trains}, keeps_moments {self.keeps_moments}"
            raise ConfigError(describe("trains and keeps_moments", owner, must, got))

    @property
    def weights(self) -> tuple[float, ...] | None:
        """Of the sources, or None for one pool."""
        found = tuple(source.weight for source in self.data if source.weight is not None)
        return found or None

    @property
    def micro_batch_size(self) -> int:
        """Samples of a forward pass, before workers share them."""
        return min(self.micro_batch or self.batch, self.batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Config):
    """A model, and the stages it goes through."""

    stages: tuple[Stage, ...]
    model: str | None = None
    """A bundle to start from: a name or folder; or give `preset`."""
    layers: tuple[int, ...] | None = None
    """Start from these layers of `model` alone, counted from 0."""
    gates: GateConfig | None = None
    """Give the attention heads gates at the start; None for those that the model has."""
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    """How the workers divide model and data between them; may change between starts."""
    teacher: str | None = None
    """A bundle that sources learn from; None for `model`, as it is at the start."""
    preset: str | None = None
    """A preset of `deepseek.models` to start from with random weights."""
    size: Literal["full", "small", "tiny"] = "small"
    """Of a preset."""
    tokenizer: str | None = None
    """A bundle whose tokenizer a preset takes."""
    seed: int = 0
    checkpoint_every: int = 100
    """Steps between checkpoints; one is made at every border of stages too."""
    keep_checkpoints: int = 2
    """How many of the newest are kept."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.preset is None):
            got = f"model {self.model!r}, preset {self.preset!r}"
            raise ConfigError(describe("model or preset", "Run", "given, and not both", got))
        if self.preset is not None and self.tokenizer is None:
            step = "Name a bundle, such as smollm2-135m"
            raise ConfigError(describe("tokenizer", "Run", "given with a preset", None, step))
        if self.layers is not None and self.model is None:
            raise ConfigError(describe("layers", "Run", "given with a model", self.layers))
        if not self.stages:
            raise ConfigError(describe("stages", "Run", "at least one", "none"))
        if self.needs_teacher and self.teacher is None and self.model is None:
            raise ConfigError(describe("teacher", "Run", "given with a preset", None))
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ConfigError(describe("stages", "Run", "of different names", names))
        for before, stage in itertools.pairwise(self.stages):
            if stage.keeps_moments and before.adapter is not None:
                must = "left out after a stage of adapters, whose state goes with them"
                raise ConfigError(describe("keeps_moments", f"stage {stage.name!r}", must, True))
        for name in ("checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(describe(name, "Run", "at least 1", getattr(self, name)))

    @property
    def needs_teacher(self) -> bool:
        """Whether a source asks anything of the teacher."""
        return any(source.needs_teacher for stage in self.stages for source in stage.data)


def read_run(path: str | Path) -> Run:
    """Return the run in a file: YAML, or Python with a function `run` that returns it.

    Raises:
        ConfigError: there is no such file, or the run in it is not one.
        FormatError: it cannot be read.
    """
    return read_config(path, Run, function="run", owner="train")
