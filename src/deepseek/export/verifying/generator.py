"""Draws the cases: by a seed, each kind its share, and together as many ids as can be."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from deepseek.errors import ConfigError, describe
from deepseek.export.verifying.cases import Case, Space

SHORT = 48
"""Tokens of a usual row."""
BORDERS = (15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
"""Lengths around the sizes that kernels, pages and blocks have."""
MOST_LONG = 20
LONG_BORDERS = (1025, 1024, 1023, 513, 511)
MOST_ROWS = 6

SHARES: dict[str, int] = {
    "lengths": 15,
    "boundary": 14,
    "repeats": 8,
    "outliers": 8,
    "text": 12,
    "batch": 10,
    "padding": 15,
    "cache": 10,
    "cache-batch": 8,
}
"""Parts that the kinds of short cases have."""


def generate(space: Space, num_cases: int, seed: int = 0) -> list[Case]:
    """Return the cases of a seed, the same ones every time, short ones first.

    Of 50 or more, one in fifty is long, twenty at most. Ids are dealt from a shuffled vocabulary
    that is shuffled anew when it is used up, so that no id comes twice before all have come once.

    Raises:
        ConfigError: fewer than one case.
    """
    if num_cases < 1:
        raise ConfigError(describe("cases", "verify", "at least 1", num_cases))
    draw = _Draw(space, seed)
    num_long = min(MOST_LONG, num_cases // 50)
    made = []
    for kind, count in _counts(space, num_cases - num_long).items():
        make = _MAKERS[kind]
        made += [_case(kind, number, make(draw, number)) for number in range(count)]
    made.sort(key=lambda case: case.num_tokens)
    for number in range(num_long):
        made.append(_case("long", number, _long(draw, number)))
    return made


def _case(kind: str, number: int, fields: dict[str, Any]) -> Case:
    return Case(id=f"{kind}-{number:04d}", kind=kind, **fields)


def _counts(space: Space, total: int) -> dict[str, int]:
    """Return how many cases each kind has; largest remainders get what rounding leaves."""
    can = {
        "text": bool(space.texts),
        "batch": space.max_batch > 1,
        "cache": space.has_cache and space.max_tokens > 1,
        "cache-batch": space.has_cache and space.max_tokens > 1 and space.max_batch > 1,
    }
    shares = {kind: share for kind, share in SHARES.items() if can.get(kind, True)}
    whole = sum(shares.values())
    counts = {kind: total * share // whole for kind, share in shares.items()}
    rest = sorted(shares, key=lambda kind: -(total * shares[kind] % whole))
    for kind in rest[: total - sum(counts.values())]:
        counts[kind] += 1
    return counts


class _Draw:
    """Random numbers of a seed, and a shuffled vocabulary that ids are dealt from."""

    def __init__(self, space: Space, seed: int) -> None:
        self.space = space
        self.random = random.Random(seed)
        self.deck: list[int] = []
        lengths = {*range(1, SHORT + 1), *BORDERS}
        self.lengths = sorted(length for length in lengths if length <= space.max_tokens)

    def ids(self, count: int) -> tuple[int, ...]:
        """Return ids that were not dealt yet, as long as there are some."""
        dealt: list[int] = []
        while len(dealt) < count:
            if not self.deck:
                self.deck = list(range(self.space.vocab_size))
                self.random.shuffle(self.deck)
            wanted = count - len(dealt)
            dealt += self.deck[:wanted]
            self.deck = self.deck[wanted:]
        return tuple(dealt)

    def length(self, least: int = 1, most: int = SHORT) -> int:
        """Return a number of tokens, small ones as often as all larger ones together."""
        most = min(most, self.space.max_tokens)
        least = min(least, most)
        return self.random.choice(
            (self.random.randint(least, most), self.random.randint(least, min(most, least + 7)))
        )

    def batch(self) -> int:
        """Return a number of rows above one where the reader takes as many."""
        most = min(self.space.max_batch, MOST_ROWS)
        return self.random.randint(min(2, most), most)


def _lengths(draw: _Draw, number: int) -> dict[str, Any]:
    lengths = draw.lengths
    length = lengths[number] if number < len(lengths) else draw.length()
    return {"rows": (draw.ids(length),)}


def _boundary(draw: _Draw, number: int) -> dict[str, Any]:
    """Put an id with a meaning alone, first, last, within, twice or everywhere in a row."""
    token = draw.space.boundaries[number % len(draw.space.boundaries)]
    form = number // len(draw.space.boundaries) % 6
    room = max(0, draw.length(2) - 1)
    before, after = draw.ids(room // 2), draw.ids(room - room // 2)
    rows = (
        (token,),
        (token, *before, *after),
        (*before, *after, token),
        (*before, token, *after),
        (token, *before, token)[: draw.space.max_tokens],
        (token,) * (room + 1),
    )
    return {"rows": (rows[form],)}


def _repeats(draw: _Draw, number: int) -> dict[str, Any]:
    period = (1, 2, 3, 1, 5)[number % 5]
    length = draw.length(2)
    pattern = draw.ids(period)
    return {"rows": ((pattern * (length // period + 1))[:length],)}


def _outliers(draw: _Draw, number: int) -> dict[str, Any]:
    length = draw.length(1, 24)
    drawn = draw.random.choices(draw.space.outliers, k=length)
    if number % 2:
        drawn = [draw.random.choice((token, *draw.ids(1))) for token in drawn]
    return {"rows": (tuple(drawn),)}


def _text(draw: _Draw, number: int) -> dict[str, Any]:
    texts = draw.space.texts
    tokens = texts[number % len(texts)]
    if number >= len(texts):
        tokens += draw.random.choice(texts)
    return {"rows": (tokens[: min(64, draw.space.max_tokens)],)}


def _batch(draw: _Draw, number: int) -> dict[str, Any]:
    length = draw.length(1, 24)
    rows = [draw.ids(length) for _ in range(draw.batch())]
    if number % 4 == 3:
        rows = [rows[0]] * len(rows)
    return {"rows": tuple(rows)}


def _padding(draw: _Draw, number: int) -> dict[str, Any]:
    rows = 1 if number % 3 == 0 else draw.batch()
    lengths = [draw.length(1, 24) for _ in range(rows)]
    room = draw.space.max_tokens - max(lengths)
    extra = min(room, draw.random.randint(1, 9)) if rows == 1 or number % 5 == 0 else 0
    fillers = (*draw.space.boundaries, *draw.ids(1))
    return {
        "rows": tuple(draw.ids(length) for length in lengths),
        "side": "left" if draw.space.pads_left and number % 2 else "right",
        "extra": extra,
        "filler": draw.random.choice(fillers),
    }


def _cache(draw: _Draw, number: int) -> dict[str, Any]:
    long_enough = [length for length in draw.lengths if length > 1]
    length = draw.length(2)
    if number % 3 == 0:
        borders = [size for size in long_enough if size in BORDERS and size > SHORT]
        length = draw.random.choice(borders or long_enough)
    return {
        "rows": (draw.ids(length),),
        "steps": _cuts(draw, length, number),
        "forks": number % 4 == 1,
    }


def _cache_batch(draw: _Draw, number: int) -> dict[str, Any]:
    length = draw.length(2, 24)
    rows = tuple(draw.ids(length) for _ in range(draw.batch()))
    return {"rows": rows, "steps": _cuts(draw, length, number), "forks": number % 4 == 1}


def _cuts(draw: _Draw, length: int, number: int) -> tuple[int, ...]:
    """Cut a length of at least two into pieces: token by token, one at the end, behind a border,
    or anywhere."""
    form = number % 4
    if form == 0:
        first = max((border for border in BORDERS if border < length), default=1)
        ones = min(3, length - first)
        rest = length - first - ones
    elif form == 1:
        ones = min(6, length - 1)
        first, rest = length - ones, 0
    elif form == 2:
        first, ones, rest = 1, min(3, length - 1), length - 1 - min(3, length - 1)
    else:
        first = draw.random.randint(1, length - 1)
        ones = 0
        rest = length - first
    return (first, *(1,) * ones, *((rest,) if rest else ()))


def _long(draw: _Draw, number: int) -> dict[str, Any]:
    """Use the longest row there is, its neighbour, the large borders, then lengths in between; one
    of five in pieces, one in two pieces, one beside a short row that is padded."""
    most = draw.space.max_tokens
    borders = [length for length in LONG_BORDERS if most // 8 <= length < most - 1]
    lengths = [most, max(1, most - 1), most, *borders]
    length = draw.random.randint(max(1, most // 4), most)
    length = lengths[number] if number < len(lengths) else length
    row, form = draw.ids(length), number % 5
    fields: dict[str, Any] = {"rows": (row,)}
    if draw.space.has_cache and length > 4 and form == 2:
        fields["steps"] = (length - 3, 1, 1, 1)
    elif draw.space.has_cache and length > 4 and form == 3:
        fields["steps"] = (length // 2, length - length // 2)
    elif draw.space.max_batch > 1 and form == 4:
        short = draw.ids(draw.length(1, min(length, 24)))
        fields |= {"rows": (row, short), "side": "left" if draw.space.pads_left else "right"}
    return fields


_MAKERS: dict[str, Callable[[_Draw, int], dict[str, Any]]] = {
    "lengths": _lengths,
    "boundary": _boundary,
    "repeats": _repeats,
    "outliers": _outliers,
    "text": _text,
    "batch": _batch,
    "padding": _padding,
    "cache": _cache,
    "cache-batch": _cache_batch,
}


def coverage(cases: Sequence[Case], vocab_size: int) -> float:
    """Return the share of the vocabulary that the cases ask for."""
    seen = {token for case in cases for row in case.rows for token in row}
    return len(seen) / vocab_size
