"""Adaptation as a run: a domain's text or conversations, what holds the old knowledge, and the
measurements that show both."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from deepseek import hub
from deepseek.config import Config
from deepseek.data import read_texts, text_files, tokenized
from deepseek.data.texts import read_lines
from deepseek.errors import ConfigError, describe
from deepseek.hub.atomic import replace_file
from deepseek.models import Decoder
from deepseek.optim import AdamW, Cosine
from deepseek.records import Measurement
from deepseek.train.config import (
    ALL_LINEAR,
    PYTHON_TOPICS,
    TEACHER_TEXT,
    LowRank,
    Run,
    Source,
    Stage,
)
from deepseek.train.held_out import measure_on, split_texts
from deepseek.train.places import Places

Kind = Literal["text", "conversations", "preferences"]
Method = Literal["full", "lora", "qlora"]
STAGE = "adapt"
PLAN = "adapt.json"
_MOST_REPLAYED = 200_000
_WARMUP = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adaptation(Config):
    """A model, what it is to learn, and what it is to keep."""

    model: str
    """A bundle: a name or folder."""
    data: str
    """A file or folder of text, or a `.jsonl` of conversations."""
    method: Method
    """All weights, adapters in low rank, or those over a base in four bits."""
    epochs: float = 1.0
    """How often each sample of the data comes."""
    steps: int | None = None
    """Optimizer steps in place of epochs."""
    length: int = 512
    """Tokens of a sample."""
    batch: int = 8
    """Samples of a step."""
    micro_batch: int | None = None
    """Samples of a forward pass."""
    rate: float | None = None
    """Largest learning rate; None for 5e-5, or 5e-4 of adapters."""
    rank: int = 16
    """Of adapters; their alpha is twice that."""
    replay: float = 0.0
    """Share of the samples that the old model teaches (0 … below 1); it writes them itself."""
    replay_text: tuple[str, ...] = ()
    """Files of text of the kind to be kept, taught by the old model too: each has as large a part
    of the replay as what it writes itself."""
    keep: float = 0.0
    """Share of the old weights in the result (0 … below 1)."""
    held_out: str | None = None
    """A file to measure on; None for the last twentieth of the data."""
    general: tuple[str, ...] = (PYTHON_TOPICS,)
    """Texts of what is to be kept."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of products."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("replay", "keep"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigError(describe(name, "Adaptation", "from 0 to below 1", value))
        if self.replay_text and not self.replay:
            must, step = "above 0 where there is a text to replay", "Take a --replay of 0.25"
            raise ConfigError(describe("replay", "Adaptation", must, self.replay, step))
        if not 0 < self.epochs < math.inf:
            raise ConfigError(describe("epochs", "Adaptation", "positive", self.epochs))


@dataclasses.dataclass(frozen=True)
class Change:
    """A measurement before and after."""

    text: str
    name: str
    before: float
    after: float
    is_general: bool
    """Whether it tells what was kept, not what was learned."""

    @property
    def percent(self) -> float:
        """By how much it went up."""
        return 100 * (self.after / self.before - 1)


def kind_of(path: str | Path) -> Kind:
    """Return what data is: the first line of a `.jsonl` tells, all else is text.

    Raises:
        ConfigError: there is no such data.
        FormatError: it cannot be read.
    """
    files = text_files(Path(path))
    if files[0].suffix == ".jsonl":
        for _, fields in read_lines(files[0]):
            if "chosen" in fields:
                return "preferences"
            return "text" if "text" in fields else "conversations"
    return "text"


def plan(asked: Adaptation, folder: str | Path) -> Run:
    """Return the run of an adaptation, and write it into the folder, its data beside it.

    Raises:
        ConfigError: the data cannot be used.
        FormatError: it cannot be read.
    """
    places = Places(Path(folder))
    learned, kept = Path(asked.data), asked.held_out
    if kept is None:
        learned, held_out = split_texts(learned, places.folder / "texts")
        kept = str(held_out)
    for text in asked.replay_text:
        text_files(Path(text))  # told before the old model writes for minutes
    num_tokens = _count_tokens(asked, learned)
    if kind_of(learned) == "text" and num_tokens < asked.length:
        must, step = f"at least {asked.length} tokens long", "Take a shorter --length or more text"
        raise ConfigError(describe("data", asked.data, must, f"{num_tokens} tokens", step))
    per_step = asked.batch * (asked.length - 1) * (1 - asked.replay)
    steps = asked.steps or max(1, math.ceil(asked.epochs * num_tokens / per_step))
    sources: tuple[Source, ...] = (Source(path=str(learned)),)
    if asked.replay:
        learning = Source(path=str(learned), weight=1 - asked.replay)
        sources = (learning, *_replayed(asked, steps))
    adapter = None
    if asked.method != "full":
        base: Literal["float32", "int4"] = "int4" if asked.method == "qlora" else "float32"
        adapter = LowRank(rank=asked.rank, alpha=2 * asked.rank, targets=(ALL_LINEAR,), base=base)
    stage = Stage(
        name=STAGE,
        data=sources,
        steps=steps,
        length=asked.length,
        batch=asked.batch,
        micro_batch=asked.micro_batch,
        adapter=adapter,
        optimizer=AdamW(rate=asked.rate or (5e-5 if adapter is None else 5e-4)),
        schedule=Cosine(warmup_steps=math.ceil(_WARMUP * steps)),
        precision=asked.precision,
        start_share=asked.keep,
        evaluate=(kept, *asked.general),
    )
    run = Run(model=asked.model, stages=(stage,), seed=asked.seed, checkpoint_every=50)
    places.folder.mkdir(parents=True, exist_ok=True)
    replace_file(places.folder / PLAN, json.dumps(run.to_dict(), indent=1).encode() + b"\n")
    return run


def _replayed(asked: Adaptation, steps: int) -> list[Source]:
    share = asked.replay / (1 + len(asked.replay_text))
    num_tokens = math.ceil(steps * asked.batch * (asked.length - 1) * share)
    written = Source(
        path=TEACHER_TEXT,
        target="teacher",
        weight=share,
        num_tokens=max(4 * asked.length, min(num_tokens, _MOST_REPLAYED)),
    )
    given = [Source(path=text, target="teacher", weight=share) for text in asked.replay_text]
    return [written, *given]


def read_plan(folder: str | Path) -> Run:
    """Return the run that `plan` wrote into a folder."""
    return Run.from_dict(json.loads((Path(folder) / PLAN).read_text(encoding="utf-8")))


def _count_tokens(asked: Adaptation, learned: Path) -> int:
    model = hub.load(asked.model)
    if not isinstance(model, Decoder) or model.tokenizer is None:
        raise ConfigError(describe("model", "adapt", "a decoder with a tokenizer", asked.model))
    documents = tokenized(read_texts(text_files(learned)), model.tokenizer)
    return sum(len(document.tokens) for document in documents)


def measure_before(
    run: Run,
    folder: str | Path,
    report: Callable[[str, float], None] = lambda words, share: None,
) -> list[Measurement]:
    """Return what the texts of a run's stage are to the model it starts from; measured once and
    kept in the folder.

    Args:
        run: of `plan`.
        folder: its folder.
        report: told what is done, and the share.
    """
    path = Path(folder) / "before.json"
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        return [Measurement.from_dict(each) for each in kept]
    assert run.model is not None
    model = hub.load(run.model, dtype="float32")
    assert isinstance(model, Decoder)
    model.eval()
    found = [item for text in run.stages[0].evaluate for item in measure_on(model, text, report)]
    path.parent.mkdir(parents=True, exist_ok=True)
    written = json.dumps([item.to_dict() for item in found], indent=1)
    replace_file(path, written.encode() + b"\n")
    return found


def changes(run: Run, before: Sequence[Measurement], after: Sequence[Measurement]) -> list[Change]:
    """Return how the perplexities of a run's texts changed, what was to be learned first."""
    kept = Path(run.stages[0].evaluate[0]).name
    found = []
    for old in before:
        for new in after:
            names = {old.name, new.name}
            text = str(old.conditions.get("text"))
            if len(names) == 1 and text == new.conditions.get("text") and "perplexity" in old.name:
                found.append(Change(text, old.name, old.value, new.value, text != kept))
    return found


def as_measurements(found: Sequence[Change]) -> list[Measurement]:
    """Return the changes as measurements, in per cent."""
    return [
        Measurement(
            name="forgetting" if each.is_general else "domain_change",
            value=each.percent,
            unit="%",
            conditions={"text": each.text, "before": each.before, "after": each.after},
        )
        for each in found
    ]
