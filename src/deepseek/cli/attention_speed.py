"""What attention costs: of all layers while a prompt is read, of the prompt, of tokens behind it.

Beside it PyTorch's `scaled_dot_product_attention`: one layer of the same shape in bfloat16, times
the layers, called in whichever way is faster. What a choice costs is part of attention. All are
measured by turns, and ratios are of the same turn: what else a machine does meets all of them.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from deepseek.cli.attention_contenders import DECODED, Trial, new_engine, read, routing_of
from deepseek.cli.output import Progress
from deepseek.evaluate.corpus import Corpus
from deepseek.generate.engine import Engine
from deepseek.models import Decoder
from deepseek.records import Measurement, Spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PEER = "sdpa"
"""The name under which PyTorch's attention stands."""
TIMED = ("attention_s", "prefill_s", "decode_s")
"""Attention and all while a prompt is read, and a token behind it; in seconds."""
MOST_TRIED = 8192
"""Tokens by which it is found in which way PyTorch's attention is faster."""
RATIOS = ("attention_speedup", "prefill_speedup", "decode_speedup")
"""Times as fast as PyTorch's attention, as a prompt with it, and as a token with it."""


class Times(NamedTuple):
    """Seconds of a contender."""

    attention: float
    """While a prompt is read."""
    prompt: float
    token: float
    """Behind the prompt."""
    token_attention: float


class Peer(NamedTuple):
    """Seconds of PyTorch's attention, all layers."""

    attention: float
    token_attention: float


def attention_speed(
    model: Decoder, corpus: Corpus, trial: Trial, progress: Progress
) -> list[Measurement]:
    """Return the seconds of each contender at each length, and how they grow with it; the text is
    read again from the start where a length goes beyond it."""
    assert model.tokenizer is not None
    tokens = model.tokenizer.encode(corpus.text)
    tokens *= max(trial.lengths) // len(tokens) + 1
    figures: list[Measurement] = []
    work = sum(length**2 for length in trial.lengths)
    done = 0
    for length in trial.lengths:
        names = [
            name for name in trial.contenders if name != "dense" or length <= trial.longest_dense
        ]
        rounds = _rounds(model, tokens[:length], trial, names, progress, done / work)
        about = {"length": length, "threads": trial.threads, "scheme": trial.scheme}
        peer = [each.attention for each in rounds[PEER]]
        figures.append(_seconds(TIMED[0], peer, {**about, "contender": PEER}))
        for name in names:
            figures += _figures(rounds[name], rounds[PEER], {**about, "contender": name})
        done += length**2
    return figures + exponents(figures)


def _rounds(
    model: Decoder,
    tokens: Sequence[int],
    trial: Trial,
    names: Sequence[str],
    progress: Progress,
    share: float,
) -> dict[str, list[Any]]:
    """Return the times of the peer and of each contender, of each round."""
    peer = sdpa_layer(model, len(tokens), trial)
    engines = {name: new_engine(model, trial, routing_of(name, len(tokens))) for name in names}
    rounds: dict[str, list[Any]] = {name: [] for name in (PEER, *names)}
    for number in range(1, trial.rounds + 1):
        where = f"{len(tokens)} tokens, round {number} of {trial.rounds}"
        progress(f"{where}, {PEER}", share)
        rounds[PEER].append(peer())
        for name, engine in engines.items():
            progress(f"{where}, {name}", share)
            rounds[name].append(_timed(engine, tokens))
    return rounds


def _figures(
    rounds: Sequence[Times], peer: Sequence[Peer], about: Mapping[str, Any]
) -> list[Measurement]:
    """Return the seconds of a contender, and its speed in the peer's: of attention, and of a prompt
    and of a token whose attention is the peer's and all else the contender's."""
    columns = zip(*(each[: len(TIMED)] for each in rounds), strict=True)
    figures = [_seconds(what, times, about) for what, times in zip(TIMED, columns, strict=True)]
    ratios = [
        (
            other.attention / own.attention,
            1 + (other.attention - own.attention) / own.prompt,
            1 + (other.token_attention - own.token_attention) / own.token,
        )
        for own, other in zip(rounds, peer, strict=True)
    ]
    for name, values in zip(RATIOS, zip(*ratios, strict=True), strict=True):
        figures.append(dataclasses.replace(_seconds(name, values, about), unit="1"))
    return figures


def _timed(engine: Engine, tokens: Sequence[int]) -> Times:
    """Return the times of an engine that reads a prompt and goes on."""
    engine.native.is_timed = True

    def attention() -> float:
        ops = [item.op for item in engine.program.instructions]
        seconds = zip(engine.native.seconds, ops, strict=False)
        return float(sum(spent for spent, op in seconds if op == "attend"))

    before, start = attention(), time.perf_counter()
    _, pages, table = read(engine, tokens, room=DECODED)
    whole, between = time.perf_counter() - start, attention()
    start = time.perf_counter()
    for place in range(len(tokens), len(tokens) + DECODED):
        engine.step(pages, [tokens[place % len(tokens)]], [place], [0], table, [0])
    token = (time.perf_counter() - start) / DECODED
    return Times(between - before, whole, token, (attention() - between) / DECODED)


def sdpa_layer(model: Decoder, length: int, trial: Trial) -> Callable[[], Peer]:
    """Return a function that runs PyTorch's attention of a prompt and of a token behind it, and
    returns the seconds that they take for all layers; it has been warmed up."""
    config = model.config
    torch.set_num_threads(trial.threads)
    heads, kv_heads = config.num_heads, config.num_kv_heads
    queries, keys, values = (
        torch.randn(1, each, length, config.head_dim, dtype=torch.bfloat16)
        for each in (heads, kv_heads, kv_heads)
    )
    repeated = [each.repeat_interleave(heads // kv_heads, 1) for each in (keys, values)]
    # the heads of a KV head as queries of it, which reads its keys once
    grouped = queries[:, :, -1:].reshape(1, kv_heads, heads // kv_heads, -1)

    def grouped_heads(count: int) -> None:
        q, k, v = (each[:, :, :count] for each in (queries, keys, values))
        scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def repeated_heads(count: int) -> None:
        q, k, v = (each[:, :, :count] for each in (queries, *repeated))
        scaled_dot_product_attention(q, k, v, is_causal=True)

    def seconds(way: Callable[[int], None], count: int) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            way(count)
        return (time.perf_counter() - start) * config.num_layers

    def token(count: int) -> None:
        for _ in range(count):
            scaled_dot_product_attention(grouped, keys, values)

    for way in (grouped_heads, repeated_heads, token):
        seconds(way, min(length, DECODED))
    tried = min(length, MOST_TRIED)
    prompt = min((grouped_heads, repeated_heads), key=lambda way: seconds(way, tried))
    return lambda: Peer(seconds(prompt, length), seconds(token, DECODED) / DECODED)


def exponents(figures: Sequence[Measurement]) -> list[Measurement]:
    """Return the slopes of log seconds over log length, of each contender with three lengths."""
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for each in figures:
        key = (each.name, str(each.conditions["contender"]))
        groups.setdefault(key, []).append(
            (math.log(float(each.conditions["length"])), math.log(each.value))  # type: ignore[arg-type]
        )
    found = []
    for (name, contender), points in groups.items():
        if len(points) < 3 or name not in TIMED[:2]:
            continue
        slope = statistics.linear_regression(*zip(*points, strict=True)).slope
        where = {"contender": contender, "of": name, "points": len(points)}
        found.append(Measurement(name="exponent", value=slope, unit="1", conditions=where))
    return found


def _seconds(name: str, times: Sequence[float], about: Mapping[str, Any]) -> Measurement:
    spread = Spread(kind="min-max", low=min(times), high=max(times)) if len(times) > 1 else None
    value = statistics.median(times)
    return Measurement(name=name, value=value, unit="s", spread=spread, conditions=about)


def draw_speed(figures: Sequence[Measurement]) -> Figure:
    """Draw seconds over lengths, both by their logarithms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="tight")
    axes = figure.subplots(1, len(TIMED))
    for axis, name in zip(axes, TIMED, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for each in figures:
            if each.name == name:
                at = (float(each.conditions["length"]), each.value)  # type: ignore[arg-type]
                lines.setdefault(str(each.conditions["contender"]), []).append(at)
        for contender, points in lines.items():
            axis.loglog(*zip(*points, strict=True), marker="o", label=contender)
        axis.set(title=name.replace("_s", ", seconds"), xlabel="tokens")
    axes[0].legend()
    return figure
