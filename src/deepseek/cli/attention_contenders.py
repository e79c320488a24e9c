"""What attention is measured with: engines of one model whose attention differs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek.errors import ConfigError, describe
from deepseek.generate.engine import MAX_STEP_TOKENS, PAGE_SIZE, Engine, build_engine
from deepseek.generate.modules import weights_of
from deepseek.models import Decoder
from deepseek.ops.routing import BLOCK, Routing
from deepseek.ops.scheme import Scheme

DECODED = 64
"""Tokens that are timed behind a prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """What is measured, and how often."""

    lengths: tuple[int, ...]
    """Tokens of a text."""
    contenders: tuple[str, ...]
    """Names, see `routing_of`."""
    scheme: str
    """How the engines store and compute the weights."""
    threads: int
    rounds: int
    """Times that each speed is measured."""
    documents: int
    """Pieces of the text, of each length."""
    probes: int
    """Copies, and needles, of each kind."""
    longest_dense: int
    """Behind so many tokens dense attention is left out of what is timed."""


def routing_of(name: str, length: int, seen: float | None = None) -> Routing | None:
    """Return the routing of a contender.

    Args:
        name: "dense", which has none; "recent", the first block and the most recent tokens alone;
            "routed-N" or "bare-N", where N tokens share a choice, and what is not seen counts by
            its means or not at all; "judged-N", where blocks are judged by summaries first.
            "routed-N:T" has the threshold T.
        length: tokens of a text.
        seen: tokens that "recent" sees; None for half as many as routed attention may see, which is
            about what it does see.

    Raises:
        ConfigError: no contender has this name.
    """
    if name == "dense":
        return None
    if name == "recent":
        half = Routing().blocks_seen((length - 1) // BLOCK) // 2
        blocks = half if seen is None else max(2, round(seen / BLOCK))
        tokens = blocks * BLOCK
        return Routing(
            recent=blocks - 1,
            threshold=0,
            least=tokens,
            most=tokens,
            most_from=max(tokens, length),
            means=False,
        )
    match = _CONTENDER.fullmatch(name)
    if match is None:
        must = "dense, recent, routed-N, bare-N, judged-N or routed-N:THRESHOLD, as in routed-1"
        raise ConfigError(describe("contenders", "bench attention", must, name))
    kind = match["kind"]
    routing = Routing(
        refresh=int(match["refresh"]), means=kind != "bare", summaries=kind == "judged"
    )
    if match["threshold"] is not None:
        routing = routing.replace(threshold=float(match["threshold"]))
    return routing


_CONTENDER = re.compile(
    r"(?P<kind>routed|bare|judged)-(?P<refresh>\d+)(:(?P<threshold>\d*\.?\d+))?"
)


def new_engine(model: Decoder, trial: Trial, routing: Routing | None) -> Engine:
    """Return an engine of a model, made for the longest length too."""
    longest = max(model.config.max_positions, max(trial.lengths) + DECODED + 1)
    return build_engine(
        model.config.replace(max_positions=longest),
        weights_of(model),
        Scheme.named(trial.scheme),
        tokenizer=model.tokenizer,
        bundle=model.bundle,
        threads=trial.threads,
        routing=routing,
    )


def read(
    engine: Engine, tokens: Sequence[int], *, logits_from: int | None = None, room: int = 0
) -> tuple[np.ndarray, Any, np.ndarray]:
    """Read a prompt; return logits, its pages and their table.

    Args:
        engine: that reads.
        tokens: the prompt.
        logits_from: place of the first token whose logits are wanted, and of all behind it; None
            for those of the last token.
        room: tokens that will follow.
    """
    first = len(tokens) - 1 if logits_from is None else logits_from
    count = -(-(len(tokens) + room) // PAGE_SIZE)
    pages, table = engine.new_pages(count), np.arange(count, dtype=np.int32)[None]
    logits = []
    for start in range(0, len(tokens), MAX_STEP_TOKENS):
        part = tokens[start : start + MAX_STEP_TOKENS]
        places = np.arange(start, start + len(part), dtype=np.int32)
        wanted = range(max(0, first - start), len(part))
        found = engine.step(pages, part, places, np.zeros_like(places), table, wanted)
        if len(wanted):
            logits.append(found)
    return np.concatenate(logits), pages, table
