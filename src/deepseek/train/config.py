"""What a run is: frozen data, the same from Python and from YAML."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from pathlib import Path
from typing import Any, Literal

from deepseek.config import Config
from deepseek.errors import ConfigError, FormatError, describe
from deepseek.optim import AdamW, Cosine, OptimizerConfig, ScheduleConfig

PYTHON_TOPICS = "python-topics"
"""The text that every Python carries, as a source of data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source(Config):
    """Where a stage's data comes from."""

    path: str
    """A corpus folder of `deepseek.data.write_corpus`, a file or folder of text, or
    `python-topics`."""
    weight: float | None = None
    """Its share of the samples; given for every source or for none (each sample once an epoch)."""


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
    optimizer: OptimizerConfig = dataclasses.field(default_factory=AdamW)
    schedule: ScheduleConfig = dataclasses.field(default_factory=Cosine)
    keeps_moments: bool = False
    """Go on with the optimizer state of the stage before, where the parameters are the same."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of products; weights, sums and the optimizer are float32."""
    max_grad_norm: float | None = 1.0
    """Longer gradients are shortened to it; None for as they are."""
    recompute: bool = False
    """Forget the layers' insides in the forward pass and compute them again in the backward pass:
    less memory, a third more work."""
    evaluate: tuple[str, ...] = ()
    """Texts whose perplexity is measured at the end: files, or `python-topics`."""

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
        weighted = {source.weight is not None for source in self.data}
        if len(weighted) > 1:
            got = [source.weight for source in self.data]
            raise ConfigError(describe("weights", owner, "given for every source or none", got))
        if self.epochs is not None and weighted == {True}:
            step = "Say how many steps"
            raise ConfigError(describe("epochs", owner, "left out with weights", self.epochs, step))

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
        if not self.stages:
            raise ConfigError(describe("stages", "Run", "at least one", "none"))
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ConfigError(describe("stages", "Run", "of different names", names))
        for name in ("checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(describe(name, "Run", "at least 1", getattr(self, name)))


def read_run(path: str | Path) -> Run:
    """Return the run in a file: YAML, or Python with a function `run` that returns it.

    Raises:
        ConfigError: there is no such file, or the run in it is not one.
        FormatError: it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        step = "Give a .yaml file, or a .py file with a function `run`"
        raise ConfigError(describe("run", "train", "a file", str(path), step))
    if path.suffix == ".py":
        return _from_python(path)
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(path)
    raise ConfigError(describe("run", "train", "a .yaml or .py file", path.name))


def _from_yaml(path: Path) -> Run:
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads 1e-3 as a number, which YAML 1.1 takes for a word."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )
    try:
        values: Any = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FormatError(
            describe("run", str(path), "YAML", " ".join(str(error).split()))
        ) from error
    if not isinstance(values, dict):
        raise FormatError(describe("run", str(path), "the fields of a Run", values))
    return Run.from_dict(values)


def _from_python(path: Path) -> Run:
    spec = importlib.util.spec_from_file_location("deepseek_run_file", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        made = module.run()
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise ConfigError(describe("run", str(path), "a file whose `run()` works", got)) from error
    if not isinstance(made, Run):
        raise ConfigError(describe("run()", str(path), "a deepseek.train.Run", made))
    return made
