"""`verify`: asks every case of both sides, and gathers what departs and by how much."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deepseek.errors import ConfigError, DeepseekError, VerifyError, describe
from deepseek.export.verifying.allowed import tolerance_of
from deepseek.export.verifying.answers import Expected, ask, expect
from deepseek.export.verifying.cases import Case
from deepseek.export.verifying.compare import (
    Comparison,
    Departure,
    Tolerance,
    compare,
    judge,
    tolerance_named,
)
from deepseek.export.verifying.generator import generate
from deepseek.export.verifying.isolated import IsolatedReader, ReaderCrash
from deepseek.export.verifying.locate import Location, locate
from deepseek.export.verifying.shrink import shrink
from deepseek.export.verifying.source import (
    JitteredReader,
    ModelReader,
    exact,
    kind_of_model,
    space_of,
)
from deepseek.hub import Bundle, load
from deepseek.models import Decoder, Encoder

if TYPE_CHECKING:
    from deepseek.export.formats import Kind, Reader
    from deepseek.records import Measurement

Progress = Callable[[str, float | None], None]
"""Called with what is being done and the share of it that is done."""
LONGEST = 2048
FEWEST_POSITIONS = 200
"""That medians and means are judged of; a case that is asked alone is judged by itself."""
MOST_SHRUNK = 3
"""Failing cases that are made small, each of another kind."""
MOST_CRASHES = 5
"""Crashes one after another behind which no further case is asked."""
MOST_JITTERED = 16
"""Draws that tell what rounding may make of a position …"""
FEWEST_JITTERED = 4
"""… and those behind which one is given up that has not come to a quarter of what it needs."""
CHUNK_TOKENS = 1024
"""Tokens whose answers are held at a time."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one case."""

    case: Case
    departure: Departure | None
    difference: float
    """Largest of its positions, in standard deviations; infinite where there was no answer."""
    divergence: float
    """Mean over its positions in nats; NaN for an encoder or where there was no answer."""


@dataclasses.dataclass(frozen=True)
class Smallest:
    """A failing case, the smallest form of it that still fails, and where that goes wrong."""

    case: Case
    smallest: Case
    departure: Departure
    location: Location


@dataclasses.dataclass(frozen=True)
class Positions:
    """What was found at every position of every case, one behind another."""

    difference: npt.NDArray[np.float32]
    absolute: npt.NDArray[np.float32]
    divergence: npt.NDArray[np.float64]
    agreement: npt.NDArray[np.bool_]
    chance: npt.NDArray[np.float32]
    place: npt.NDArray[np.int32]
    """Of each position in its row."""
    case: npt.NDArray[np.int32]
    """Number of the case of each position."""


@dataclasses.dataclass(frozen=True)
class Verified:
    """What `verify` found."""

    source: str
    exported: str
    reader: str
    """The runtime, with its version."""
    kind: Kind
    tolerance: Tolerance
    seed: int
    num_cases: int
    """That were to be asked."""
    vocab_size: int
    longest: int
    outcomes: tuple[Outcome, ...]
    """Of the cases that were asked, in their order."""
    positions: Positions
    failures: tuple[str, ...]
    """What holds of no single case: median, divergence or agreement over all."""
    smallest: tuple[Smallest, ...]
    seconds: float
    is_partial: bool
    """Whether it was stopped before the last case."""

    @property
    def departed(self) -> list[Outcome]:
        """The cases whose answers are not the source's."""
        return [each for each in self.outcomes if each.departure is not None]

    @property
    def holds(self) -> bool:
        """Whether every case was asked, and the export computes what its source does."""
        return not (self.departed or self.failures or self.is_partial)

    @property
    def measurements(self) -> list[Measurement]:
        """How far the answers lie from the source's, with spreads."""
        from deepseek.export.verifying.summary import measurements

        return measurements(self)


def verify(
    source: Decoder | Encoder | Bundle | str | Path,
    exported: Reader | str | Path,
    *,
    cases: int = 1000,
    seed: int = 0,
    only: str | Case | None = None,
    tolerance: str | Tolerance | None = None,
    longest: int = LONGEST,
    report: str | Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verified:
    """Ask generated cases of a model and of its export, and return where their answers differ.

    Args:
        source: the model, or its name or folder; it is run by our modules in float32.
        exported: a reader, or what `export` wrote, which is then opened in a process of its own: a
            runtime that crashes costs one case.
        cases: how many are generated.
        seed: of the cases.
        only: the id of one of them, which is asked alone; or a case, in their place.
        tolerance: what the export may be off by: one of `TOLERANCES` or a `Tolerance`; None for
            what its manifest says of its numbers, float32 where it says nothing.
        longest: most tokens of a row; twenty rows of a thousand cases are about so long.
        report: a folder for `report.html`, `report.json` and the cases that failed; written also
            where the run is interrupted.
        threads: of a runtime that is opened here; None for its own choice.
        progress: called after every few cases.

    Raises:
        ConfigError: an unknown source, export, tolerance or case, or two of different kinds.
        FormatError: the source or the export is not whole.
        MissingExtra: the runtime is not installed.
        VerifyError: the runtime crashes again and again, or while it opens the export.
    """
    model = _model(source)
    with _opened(exported, threads) as reader:
        run = _Run(model, reader, seed, _tolerance(tolerance, exported, model), progress)
        space = space_of(model, reader, longest)
        asked = [only] if isinstance(only, Case) else generate(space, cases, seed)
        if isinstance(only, str):
            asked = _named(asked, only)
        run.check(asked)
        started = time.perf_counter()
        try:
            run.ask_all(asked)
            run.explain()
        except BaseException as error:
            is_ended = isinstance(error, KeyboardInterrupt | VerifyError)
            if report is not None and is_ended and run.outcomes:
                seconds = time.perf_counter() - started
                _write(run.verified(source, exported, asked, space.max_tokens, seconds), report)
            raise
        seconds = time.perf_counter() - started
        found = run.verified(source, exported, asked, space.max_tokens, seconds)
    if report is not None:
        _write(found, report)
    return found


def _named(asked: Sequence[Case], id: str) -> list[Case]:
    chosen = [case for case in asked if case.id == id]
    if not chosen:
        step = "Give the --cases and --seed of the run that named it"
        must = f"one of these {len(asked)}, such as {asked[-1].id}"
        raise ConfigError(describe("case", "verify", must, id, step))
    return chosen


def _write(found: Verified, folder: str | Path) -> None:
    from deepseek.export.verifying.report import write_report

    write_report(found, Path(folder))


def _model(source: Decoder | Encoder | Bundle | str | Path) -> Decoder | Encoder:
    if isinstance(source, Decoder | Encoder):
        return source if source.dtype == torch.float32 else copy.deepcopy(source).float()
    return load(source.path if isinstance(source, Bundle) else source, dtype="float32")


@contextlib.contextmanager
def _opened(exported: Reader | str | Path, threads: int | None) -> Iterator[Reader]:
    if not isinstance(exported, str | Path):
        yield exported
        return
    reader = IsolatedReader(exported, threads=threads)
    try:
        yield reader
    finally:
        reader.close()


def _tolerance(
    asked: str | Tolerance | None, exported: Reader | str | Path, model: Decoder | Encoder
) -> Tolerance:
    if isinstance(asked, Tolerance):
        return asked
    if asked is None and isinstance(exported, str | Path):
        return tolerance_of(Path(exported), model)
    return tolerance_named(asked or "float32", kind_of_model(model))


class _Run:
    """Cases that are being asked, and what was found of them."""

    def __init__(
        self,
        model: Decoder | Encoder,
        reader: Reader,
        seed: int,
        tolerance: Tolerance,
        progress: Progress | None,
    ) -> None:
        self.model, self.reader, self.seed, self.tolerance = model, reader, seed, tolerance
        self.source = ModelReader(model)
        self.exact: ModelReader | None = None
        self.progress = progress or (lambda words, share: None)
        self.outcomes: list[Outcome] = []
        self.compared: list[tuple[int, Comparison]] = []
        self.smallest: list[Smallest] = []
        self.crashes = 0

    def check(self, asked: Sequence[Case]) -> None:
        """Raise a ConfigError for a case that these two cannot be asked."""
        vocab_size = self.model.config.vocab_size
        most = min(self.reader.max_tokens, self.source.max_tokens)
        for case in asked:
            faults = {
                f"ids below {vocab_size}": max(map(max, case.rows)) >= vocab_size
                or min(map(min, case.rows)) < 0
                or not 0 <= case.filler < vocab_size,
                f"of at most {most} tokens": case.width > most,
                f"of at most {self.reader.max_batch} rows": len(case.rows) > self.reader.max_batch,
                "in one pass": bool(case.steps) and not self.reader.has_cache,
            }
            for must, is_broken in faults.items():
                if is_broken:
                    raise ConfigError(describe("case", self.reader.name, must, case.id))

    def ask_all(self, asked: Sequence[Case]) -> None:
        """Ask every case, a few at a time so that their answers fit in memory."""
        total = sum(_cost(case) for case in asked)
        done = 0
        for chunk in _chunks(asked):
            expected = expect(self.source, chunk)
            for case in chunk:
                self._ask_one(case, expected)
                done += _cost(case)
                departed = sum(each.departure is not None for each in self.outcomes)
                words = f"case {len(self.outcomes)} of {len(asked)}"
                if departed:
                    words += f", {departed} depart"
                self.progress(words, done / total)

    def _ask_one(self, case: Case, expected: Expected) -> None:
        found, departure = self._judged(case, expected)
        if isinstance(found, Comparison):
            self.compared.append((len(self.outcomes), found))
            difference = float(found.difference.max())
            divergence = float(found.divergence.mean()) if found.divergence.numel() else np.nan
        else:
            difference, divergence = np.inf, np.nan
        self.outcomes.append(Outcome(case, departure, difference, divergence))
        if self.crashes >= MOST_CRASHES:
            step = f"See how {case.id} crashes it: deepseek verify … --case {case.id}"
            got = f"{self.crashes} crashes, one after another"
            raise VerifyError(describe("runtime", self.reader.name, "kept alive", got, step))

    def _judged(self, case: Case, expected: Expected) -> tuple[Comparison | str, Departure | None]:
        try:
            found = compare(case, ask(self.reader, case), expected, self.source.kind)
            self.crashes = 0
        except ReaderCrash as error:
            self.crashes += 1
            found = str(error)
        except DeepseekError as error:
            found = str(error)
        except Exception as error:  # a foreign runtime's own: the case fails, the run goes on
            found = f"{type(error).__name__}: {error}"
        return found, judge(case, found, self.tolerance, lambda needed: self._off(case, needed))

    def _off(self, case: Case, needed: Tensor) -> Tensor:
        """Return how far float32 is off at the positions of a case where `needed` is not 0: how far
        the source is from itself in float64, as it is and with the last bits of its products drawn
        anew, until all that is needed came up or will not."""
        if self.exact is None:
            self.exact = exact(self.model)
        cut, places = _cut(case, needed > 0, is_causal=self.source.kind == "decoder")
        wanted = expect(self.exact, [cut])
        off = torch.zeros(len(needed))
        for draw in range(MOST_JITTERED + 1):
            reader = JitteredReader(self.model, draw) if draw else self.source
            answers = expect(reader, [cut])
            found = compare(cut, [answers[row] for row in cut.rows], wanted, self.source.kind)
            assert isinstance(found, Comparison)
            off[places] = off[places].maximum(found.difference)
            is_hopeless = draw >= FEWEST_JITTERED and bool((off < needed / 4).any())
            if is_hopeless or bool((off >= needed).all()):
                break
        return off

    def fails(self, case: Case) -> Departure | None:
        """Return how a case departs, or None."""
        return self._judged(case, expect(self.source, [case]))[1]

    def explain(self) -> None:
        """Make the smallest failing case of a few kinds smaller still, and find its layer."""
        chosen: dict[str, Outcome] = {}
        for outcome in sorted(self.outcomes, key=lambda each: _cost(each.case)):
            if outcome.departure is not None:
                chosen.setdefault(outcome.case.kind, outcome)
        failing = [*chosen.values()][:MOST_SHRUNK]
        for number, outcome in enumerate(failing):
            self.progress(f"making {outcome.case.id} smaller", number / len(failing))
            assert outcome.departure is not None
            plain = self.model.config.vocab_size // 2
            case, departure = shrink(outcome.case, outcome.departure, self.fails, plain=plain)
            self.crashes = 0
            same = (dataclasses.replace(each.smallest, kind=case.kind) for each in self.smallest)
            if any(dataclasses.replace(each, id=case.id) == case for each in same):
                continue
            case = dataclasses.replace(case, id=f"{outcome.case.id}-smallest")
            self.smallest.append(Smallest(outcome.case, case, departure, self._locate(case)))

    def _locate(self, case: Case) -> Location:
        try:
            return locate(case, self.source, self.reader, self.tolerance.noise)
        except Exception as error:
            return Location(f"layers could not be read: {error}")

    def verified(
        self,
        source: object,
        exported: object,
        asked: Sequence[Case],
        longest: int,
        seconds: float,
    ) -> Verified:
        """Return what was found until now."""
        positions = _positions(self.compared)
        return Verified(
            source=_shown(source),
            exported=_shown(exported),
            reader=self.reader.name,
            kind=self.source.kind,
            tolerance=self.tolerance,
            seed=self.seed,
            num_cases=len(asked),
            vocab_size=self.model.config.vocab_size,
            longest=longest,
            outcomes=tuple(self.outcomes),
            positions=positions,
            failures=_failures(positions, self.tolerance),
            smallest=tuple(self.smallest),
            seconds=seconds,
            is_partial=len(self.outcomes) < len(asked),
        )


def _cut(case: Case, beyond: Tensor, *, is_causal: bool) -> tuple[Case, Tensor]:
    """Return the rows of a case that have positions beyond a tolerance, each up to the last of
    them where what comes later does not matter, and the numbers of their positions."""
    rows, places, start = [], [], 0
    lengths = [len(row) for row in case.rows]
    per_row = lengths if len(beyond) == sum(lengths) else [1] * len(lengths)
    for row, count in zip(case.rows, per_row, strict=True):
        there = beyond[start : start + count].nonzero().flatten()
        if len(there):
            stop = int(there[-1]) + 1 if is_causal else count
            rows.append(row[:stop] if is_causal else row)
            places.append(torch.arange(start, start + stop))
        start += count
    kept = dataclasses.replace(case, rows=tuple(rows), steps=(), forks=False, extra=0)
    return kept, torch.cat(places)


def _cost(case: Case) -> int:
    return case.num_tokens + 8 * (1 + len(case.steps))


def _chunks(asked: Sequence[Case]) -> Iterator[list[Case]]:
    chunk: list[Case] = []
    for case in asked:
        if chunk and sum(each.num_tokens for each in (*chunk, case)) > CHUNK_TOKENS:
            yield chunk
            chunk = []
        chunk.append(case)
    if chunk:
        yield chunk


def _positions(compared: Sequence[tuple[int, Comparison]]) -> Positions:
    def joined(name: str) -> Tensor:
        parts = [getattr(found, name) for _, found in compared]
        return torch.cat(parts) if parts else torch.empty(0)

    places = [place for _, found in compared for _, place in found.places]
    numbers = [number for number, found in compared for _ in found.places]
    return Positions(
        joined("difference").numpy(),
        joined("absolute").numpy(),
        joined("divergence").double().numpy(),
        joined("agreement").bool().numpy(),
        joined("chance").numpy(),
        np.array(places, np.int32),
        np.array(numbers, np.int32),
    )


def _failures(positions: Positions, tolerance: Tolerance) -> tuple[str, ...]:
    if len(positions.difference) < FEWEST_POSITIONS:
        return ()
    failures = []
    typical = float(np.median(positions.difference))
    if tolerance.typical is not None and not typical <= tolerance.typical:
        words = f"median difference {typical:.3g} standard deviations"
        failures.append(f"{words}, at most {tolerance.typical:g}")
    if len(positions.divergence):
        mean, agreed = float(positions.divergence.mean()), float(positions.agreement.mean())
        if tolerance.mean_divergence is not None and not mean <= tolerance.mean_divergence:
            words = f"mean divergence {mean:.3g} nats a position"
            failures.append(f"{words}, at most {tolerance.mean_divergence:g}")
        if tolerance.agreement is not None and agreed < tolerance.agreement:
            words = f"the same token is likeliest at {agreed:.1%} of positions"
            failures.append(f"{words}, at least {tolerance.agreement:.0%}")
    return tuple(failures)


def _shown(what: object) -> str:
    if isinstance(what, Bundle):
        return str(what.path)
    if isinstance(what, str | Path):
        return str(what)
    return getattr(what, "name", None) or type(what).__name__
