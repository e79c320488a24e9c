"""What attention is measured with: engines of one model whose attention differs."""

from __future__ import annotations

import dataclasses
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


def routing_of(name: str, length: int) -> Routing | None:
    """Return the routing of a contender: None for dense; "recent", the most recent tokens alone,
    half as many as routed attention may see, which is about what it does see; "routed-N" or
    "bare-N", where N tokens share a choice, and what is not seen counts by its means or not at all.

    Raises:
        ConfigError: no contender has this name.
    """
    if name == "dense":
        return None
    if name == "recent":
        seen = Routing().blocks_seen((length - 1) // BLOCK) // 2
        tokens = seen * BLOCK
        most_from = max(tokens, length)
        return Routing(
            recent=seen - 1,
            threshold=0,
            least=tokens,
            most=tokens,
            most_from=most_from,
            means=False,
        )
    kind, _, refresh = name.partition("-")
    if kind not in ("routed", "bare") or not refresh.isdigit():
        must = "dense, recent, routed-N or bare-N, as in routed-1"
        raise ConfigError(describe("contenders", "bench attention", must, name))
    return Routing(refresh=int(refresh), means=kind == "routed")


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
    engine: Engine, tokens: Sequence[int], *, every: bool = False, room: int = 0
) -> tuple[np.ndarray, Any, np.ndarray]:
    """Read a prompt; return logits (of every token or the last), its pages and their table.

    Args:
        engine: that reads.
        tokens: the prompt.
        every: whether logits of every token are wanted.
        room: tokens that will follow.
    """
    count = -(-(len(tokens) + room) // PAGE_SIZE)
    pages, table = engine.new_pages(count), np.arange(count, dtype=np.int32)[None]
    logits = []
    for start in range(0, len(tokens), MAX_STEP_TOKENS):
        part = tokens[start : start + MAX_STEP_TOKENS]
        places = np.arange(start, start + len(part), dtype=np.int32)
        wanted = range(len(part)) if every else [len(part) - 1]
        logits.append(engine.step(pages, part, places, np.zeros_like(places), table, wanted))
    return np.concatenate(logits) if every else logits[-1], pages, table
