"""A model for a small device: what of it fits under a memory cap, chosen before it is loaded.

Loads no torch where the model is given by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek.config import Config
from deepseek.errors import CapacityError, ConfigError, describe
from deepseek.ops.scheme import SCHEMES, KVStorage, Scheme

if TYPE_CHECKING:
    from deepseek.generate import Completion, Engine, Piece
    from deepseek.generate.engine import Weights
    from deepseek.generate.footprint import Footprint
    from deepseek.generate.prompt import Prompts
    from deepseek.hub import Bundle
    from deepseek.models import Decoder, DecoderConfig
    from deepseek.ops.sampling.config import Sampling

MOST_ROWS = 16
"""Rows that are ever generated together on a small device: more make every one of them wait."""
USUAL_CONTEXT = 2048
LEAST_CONTEXT = 256
"""Fewest tokens of a text that a profile goes down to by itself."""
_PAGE = 64
_SYSTEM_PAGE_BYTES = 4096
_MARGIN_BYTES = 8 * 2**20
"""For what nobody counts: pieces of freed memory, small objects."""
_TOKENIZER_READ, _TOKENIZER_KEPT = 28, 12
"""Bytes a byte of tokenizer.json: while it is read, and for good."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdgeProfile(Config):
    """What a small device gives to a model; what is None is chosen by what fits."""

    memory_bytes: int = 4_000_000_000
    """Most bytes that the whole process may have resident, at any time of loading and running."""
    threads: int | None = None
    """That compute; None for the cores that this process may use, its control group's quota
    included."""
    dynamic_batching: int = 8
    """Most texts that are generated together, from 1 to 16."""
    scheme: str | None = None
    """How weights are held, a name of `deepseek.ops.scheme.SCHEMES`; None for a bundle's own grid,
    or int8 where that fits and else int4."""
    kv: KVStorage = "int8"
    """How keys and values are cached, where the scheme is chosen here."""
    context: int | None = None
    """Most tokens of a text, its answer included; None for 2048, and less where that does not
    fit."""
    keep_packed: bool = True
    """Keep packed weights on the disk, for the next start."""
    reserve_bytes: int = 0
    """Of the memory, for what the process will load beside the model."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("memory_bytes", 1, 2**63),
            ("threads", 1, 256),
            ("dynamic_batching", 1, MOST_ROWS),
            ("context", _PAGE, 2**31),
            ("reserve_bytes", 0, 2**63),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                must = f"a whole number from {low} to {high}"
                raise ConfigError(describe(name, "EdgeProfile", must, value))
        if self.scheme is not None and self.scheme not in SCHEMES:
            must = f"one of {', '.join(SCHEMES)}"
            raise ConfigError(describe("scheme", "EdgeProfile", must, self.scheme))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdgePlan:
    """What was chosen for a model and a profile. Every figure in bytes is an upper bound."""

    scheme: Scheme
    threads: int
    rows: int
    """Texts that are generated together."""
    context: int
    """Most tokens of each of them."""
    limit_bytes: int
    limited_by: str
    """Whose limit that is."""
    process_bytes: int
    """Of the process without the engine: what it has now, its tokenizer, a reserve, a margin."""
    tokenizer_bytes: int
    """That reading the tokenizer takes for a moment, above what it keeps."""
    footprint: Footprint

    @property
    def peak_bytes(self) -> int:
        """Most bytes that the process will have resident at once."""
        return self.process_bytes + max(self.tokenizer_bytes, self.footprint.peak_bytes)

    @property
    def pages(self) -> int:
        """Pages of 64 tokens for keys and values of all rows."""
        return self.rows * -(-self.context // _PAGE)

    def to_dict(self) -> dict[str, object]:
        """Return the plan as JSON-ready values."""
        return {
            "scheme": self.scheme.name,
            "threads": self.threads,
            "rows": self.rows,
            "context": self.context,
            "limit_bytes": self.limit_bytes,
            "limited_by": self.limited_by,
            "peak_bytes": self.peak_bytes,
            "process_bytes": self.process_bytes,
            "tokenizer_bytes": self.tokenizer_bytes,
            **dataclasses.asdict(self.footprint),
        }

    @property
    def text(self) -> str:
        """The plan as a person reads it, in a line."""
        parts = self.footprint
        return (
            f"edge: {self.scheme.name}, {self.threads} threads, {self.rows} rows of "
            f"{self.context:,} tokens; at most {_mib(self.peak_bytes)} of "
            f"{_mib(self.limit_bytes)} MiB ({self.limited_by}): weights "
            f"{_mib(parts.weights_bytes)}, cache {_mib(parts.cache_bytes)}, states "
            f"{_mib(parts.states_bytes)}, process {_mib(self.process_bytes)}"
        )


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f}"


@dataclasses.dataclass(frozen=True, eq=False)
class EdgeModel:
    """A model within the limits of its plan."""

    engine: Engine
    """Refuses texts that are longer than the plan's context."""
    plan: EdgePlan

    def generate(
        self,
        prompts: Prompts,
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        on_piece: Callable[[Piece], None] | None = None,
    ) -> Completion | list[Completion]:
        """Return the continuation of one prompt, or of each of several, never more of them together
        than the plan has rows.

        Args and raises: as `deepseek.generate.generate`, whose context is the plan's.
        """
        from deepseek.generate import generate
        from deepseek.generate.prompt import read_prompts

        ids, is_single = read_prompts(self.engine, prompts, None)
        found: list[Completion] = []
        for start in range(0, len(ids), self.plan.rows):
            part = generate(
                self.engine,
                ids[start : start + self.plan.rows],
                max_tokens=max_tokens,
                sampling=_seeded(sampling, start),
                stop=stop,
                on_piece=_numbered(on_piece, start),
            )
            assert isinstance(part, list)
            found += part
        return found[0] if is_single else found


def _seeded(sampling: Sampling | None, start: int) -> Sampling | None:
    """Return the sampling of rows from `start` on: row i of all uses seed + i."""
    if sampling is None or sampling.seed is None:
        return sampling
    return sampling.replace(seed=sampling.seed + start)


def _numbered(
    on_piece: Callable[[Piece], None] | None, start: int
) -> Callable[[Piece], None] | None:
    if on_piece is None:
        return None
    return lambda piece: on_piece(dataclasses.replace(piece, row=piece.row + start))


def plan_for_edge(
    model: str | Path | Bundle | Decoder, profile: EdgeProfile | None = None
) -> EdgePlan:
    """Return what of a model fits a profile; its weights are not read.

    In this order: int8 with as many rows as fit, int4 with as many rows as fit, then one row of
    less context. A bundle of weights on a grid keeps that grid.

    Args:
        model: its name, folder, bundle, or a decoder in memory, whose memory counts too.
        profile: None for the usual one.

    Raises:
        CapacityError: nothing fits; the message says what would.
        ConfigError: a model that has no engine, or a setting that it cannot have.
    """
    profile = EdgeProfile() if profile is None else profile
    return _choose(_subject(model), profile)


def optimize_for_edge(
    model: str | Path | Bundle | Decoder,
    profile: EdgeProfile | None = None,
    *,
    progress: Callable[[float], None] | None = None,
) -> EdgeModel:
    """Return a model that keeps the limits of a profile, chosen by `plan_for_edge`.

    Args:
        model: its name or folder, which loads no torch; a bundle; or a decoder in memory, which
            goes on as it is.
        profile: None for the usual one.
        progress: called with the share of weights that are packed.

    Raises:
        CapacityError: nothing fits, which is found before a weight is read; or what was loaded is
            larger than it was computed to be.
        ConfigError: a model that has no engine, or a setting that it cannot have.
    """
    profile = EdgeProfile() if profile is None else profile
    subject = _subject(model)
    plan = _choose(subject, profile)
    engine = subject.build(plan.scheme, plan.threads, profile.keep_packed, progress)
    _check(engine, plan)
    bounded = dataclasses.replace(engine, config=engine.config.replace(max_positions=plan.context))
    return EdgeModel(bounded, plan)


@dataclasses.dataclass(frozen=True, eq=False)
class _Subject:
    """A model as the plan sees it."""

    name: str
    config: DecoderConfig
    weights: Weights
    usual: Scheme | None
    """As its weights are; None where the engine does not hold that."""
    tokenizer_bytes: int
    """Of its file, yet to be read."""
    build: Callable[[Scheme, int, bool, Callable[[float], None] | None], Engine]


def _subject(model: str | Path | Bundle | Decoder) -> _Subject:
    from deepseek import hub
    from deepseek.hub.bundle import Bundle

    if isinstance(model, Bundle):
        return _of_bundle(model)
    if isinstance(model, str | Path):
        from deepseek.engines.facts import fetch

        fetch(model)
        path = hub.resolve(model)
        if path.is_file():
            step = f"Make a folder of it: deepseek pull {path} --to FOLDER"
            raise ConfigError(describe("model", "the edge profile", "a folder", str(path), step))
        return _of_bundle(Bundle.open(path))
    return _of_decoder(model)


def _of_bundle(bundle: Bundle) -> _Subject:
    from deepseek.engines import load_engine
    from deepseek.engines.facts import facts_of_bundle, weights_of
    from deepseek.models.config import DecoderConfig

    facts = facts_of_bundle(bundle, None)
    # a scheme of its own helps where the weights are in a dtype that the engine does not hold
    if facts.scheme is None:
        facts = facts_of_bundle(bundle, Scheme.named("int8"))
        facts = dataclasses.replace(facts, scheme=None)
    config = facts.config
    if facts.reason is not None or not isinstance(config, DecoderConfig):
        raise _no_engine(bundle.path.name, facts.reason or "an encoder")

    def build(
        scheme: Scheme, threads: int, keep: bool, progress: Callable[[float], None] | None
    ) -> Engine:
        engine = load_engine(
            bundle.path,
            scheme=scheme,
            attention="dense",
            threads=threads,
            keep=keep,
            progress=progress,
        )
        if engine is None:
            raise _no_engine(bundle.path.name, "its grid, which the engine does not hold")
        return engine

    tokenizer = bundle.path / "tokenizer.json"
    size = tokenizer.stat().st_size if tokenizer.is_file() else 0
    return _Subject(bundle.path.name, config, weights_of(bundle, config), facts.scheme, size, build)


def _of_decoder(model: Decoder) -> _Subject:
    from deepseek.generate.engine import build_engine
    from deepseek.generate.modules import grids_kept, usual_scheme, weights_of, why_no_engine
    from deepseek.models import Decoder

    if not isinstance(model, Decoder):
        raise _no_engine("the model", type(model).__name__)
    reason = why_no_engine(model)
    if reason is not None:
        raise _no_engine("the model", reason)
    grids = grids_kept(model)

    def build(
        scheme: Scheme, threads: int, keep: bool, progress: Callable[[float], None] | None
    ) -> Engine:
        kept = grids if scheme.as_stored else {}
        return build_engine(
            model.config,
            weights_of(model, kept),
            scheme,
            tokenizer=model.tokenizer,
            bundle=model.bundle,
            threads=threads,
            progress=progress,
        )

    usual = usual_scheme(model, has_grids=bool(grids))
    return _Subject("the model", model.config, weights_of(model, grids), usual, 0, build)


def _no_engine(name: str, reason: str) -> ConfigError:
    must = "a decoder that the engine runs"
    return ConfigError(describe("model", "the edge profile", must, f"{name}: {reason}"))


def _choose(subject: _Subject, profile: EdgeProfile) -> EdgePlan:
    from deepseek.evaluate.resources import current_rss_bytes
    from deepseek.generate.engine import checked_threads
    from deepseek.generate.footprint import engine_footprint

    threads, most = checked_threads(profile.threads), subject.config.max_positions
    if profile.context is not None and profile.context > most:
        must = f"at most the model's {most} tokens"
        raise ConfigError(describe("context", "EdgeProfile", must, profile.context))
    limit, whose = _limit(profile)
    present = (current_rss_bytes() or 0) + profile.reserve_bytes + _MARGIN_BYTES
    tokenizer = subject.tokenizer_bytes
    plan = None
    for scheme, rows, context in _candidates(subject, profile):
        plan = EdgePlan(
            scheme=scheme,
            threads=threads,
            rows=rows,
            context=context,
            limit_bytes=limit,
            limited_by=whose,
            process_bytes=present + _TOKENIZER_KEPT * tokenizer,
            tokenizer_bytes=(_TOKENIZER_READ - _TOKENIZER_KEPT) * tokenizer,
            footprint=engine_footprint(
                subject.config,
                subject.weights,
                scheme,
                rows=rows,
                context=context,
                threads=threads,
            ),
        )
        if plan.peak_bytes <= limit:
            return plan
    assert plan is not None
    smallest = f"{plan.scheme.name} and a text of {plan.context} tokens"
    must = f"at least {plan.peak_bytes:,} bytes, for {smallest}"
    step = "Raise the cap, or take a model with fewer weights"
    got = f"{limit:,} ({whose})"
    raise CapacityError(describe("memory", f"the edge profile of {subject.name}", must, got, step))


def _limit(profile: EdgeProfile) -> tuple[int, str]:
    from deepseek.ops.cgroup import cgroup_memory

    group = cgroup_memory()
    if group is not None and group[0] < profile.memory_bytes:
        return group[0], "the control group's limit"
    return profile.memory_bytes, "the profile's cap"


def _candidates(subject: _Subject, profile: EdgeProfile) -> Iterator[tuple[Scheme, int, int]]:
    """Yield scheme, rows and context, the best first."""
    if profile.scheme is not None:
        schemes = [Scheme.named(profile.scheme)]
    elif subject.usual is not None and subject.usual.as_stored:
        schemes = [subject.usual.replace(kv=profile.kv)]
    else:
        schemes = [Scheme.named(name).replace(kv=profile.kv) for name in ("int8", "int4")]
    context = profile.context or min(USUAL_CONTEXT, subject.config.max_positions)
    for scheme in schemes:
        rows = profile.dynamic_batching
        while rows:
            yield scheme, rows, context
            rows //= 2
    while profile.context is None and context > LEAST_CONTEXT:
        context = max(LEAST_CONTEXT, context // 2 // _PAGE * _PAGE)
        yield schemes[-1], 1, context


def _check(engine: Engine, plan: EdgePlan) -> None:
    """Hold what was loaded against what was computed before.

    Raises:
        CapacityError: something is larger.
    """
    cache = int(engine.new_pages(plan.pages).num_bytes)  # taken when it is written to, not before
    pairs = {
        "weights": (engine.weight_bytes, plan.footprint.weights_bytes),
        "states": (int(engine.native.plan_bytes), plan.footprint.states_bytes),
        "cache": (cache, plan.footprint.cache_bytes + _SYSTEM_PAGE_BYTES),
    }
    for name, (found, planned) in pairs.items():
        if found > planned:
            must = f"at most the {planned:,} bytes that were planned"
            step = "This is a fault of the accounting: please report it"
            raise CapacityError(describe(name, "the edge profile", must, found, step))
