"""Our engine. Options: `scheme`, `isa`."""

from __future__ import annotations

import os
import time

import clock

asked = clock.request()
if asked.get("isa"):
    os.environ["DEEPSEEK_ISA"] = asked["isa"]

from deepseek.face import load_engine  # noqa: E402 (threads are set first)
from deepseek.generate import stream  # noqa: E402

engine = load_engine(asked["model"], scheme=asked["scheme"], threads=asked["threads"])
assert engine is not None


def once(prompts: list[list[int]], new: int) -> tuple[list[list[int]], clock.Event, clock.Event]:
    """As a user calls it: the token loop with text, all rows together."""
    out: list[list[int]] = [[] for _ in prompts]
    first, total = None, 0
    for piece in stream(engine, prompts, max_tokens=new, ignore_eos=True):
        out[piece.row].append(piece.token_id)
        total += 1
        if first is None and total == len(prompts):
            first = (time.perf_counter(), total)
    assert first is not None
    return out, first, (time.perf_counter(), total)


def load_text() -> clock.Text:
    """The tokenizer came with the engine."""
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    return tokenizer.encode, tokenizer.decode


clock.serve(asked, once, f"deepseek {engine.instruction_set}", load_text)
