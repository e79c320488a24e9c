"""Attention that computes what a static pattern lists, forward alone and with gradients, against
PyTorch's dense attention.

    python benchmarks/sparse_attention.py
    python benchmarks/sparse_attention.py --lengths 4096 8192 --dtype bfloat16 --json
    python benchmarks/sparse_attention.py --impl gathered
    python benchmarks/sparse_attention.py --routed --lengths 16384

One layer of SmolLM2's shape. The pattern sees the first block, four recent ones and random ones; on
average a query sees 1024 tokens of 4096, 2048 from 8192 on, and behind 16,384 more as the logarithm
grows. PyTorch's attention has its keys and values repeated for their query heads, which with
gradients is faster here than `enable_gqa`, and runs in the asked dtype or in float32, whichever was
faster.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from deepseek.cli.models import positive
from deepseek.models import Pattern
from deepseek.models.static import pattern_table
from deepseek.ops.attention import AttentionImpl, BlockTable, DenseKV, Layout, attention
from deepseek.ops.attention.choice import choose_blocks
from deepseek.ops.memory import keep_freed_memory
from deepseek.ops.routing import Routing
from deepseek.records import Measurement, summarize

HEADS, KV_HEADS, DIM = 9, 3, 64
BLOCK = 64
ALWAYS = 5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def tokens_seen(length: int) -> int:
    """Return how many tokens a query sees on average."""
    most = 1024 if length <= 4096 else 2048
    return int(most * max(1.0, math.log(length) / math.log(16384)))


def pattern_of(length: int) -> Pattern:
    """Return the pattern by which a query sees `tokens_seen` on average."""
    left = max(1, length // BLOCK - ALWAYS) / 2
    random = tokens_seen(length) / BLOCK - ALWAYS
    return Pattern(recent=ALWAYS - 1, sparsity=max(0.0, 1 - random / left))


def sparse(length: int, impl: AttentionImpl = "auto") -> tuple[Run, BlockTable]:
    """Return attention by the pattern, and its table."""
    layout = Layout.dense(1, length)
    table = pattern_table(layout, pattern_of(length), 0, torch.device("cpu"))

    def run(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return attention(queries, DenseKV(keys, values), layout, table=table, impl=impl)

    return run, table


def routed(length: int) -> tuple[Run, BlockTable]:
    """Return attention in which each token chooses its blocks first, as many as `tokens_seen`, and
    the table of one such choice."""
    seen = tokens_seen(length)
    routing = Routing(threshold=0.0, share=1.0, least=seen, most=seen, most_from=length)
    layout = Layout.dense(1, length)
    channels = list(range(DIM // 2))

    def run(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        kv = DenseKV(keys, values)
        table = choose_blocks(queries, kv, layout, routing, channels)
        return attention(queries, kv, layout, table=table)

    queries, keys, values = random_inputs(length, torch.float32)
    return run, choose_blocks(queries, DenseKV(keys, values), layout, routing, channels)


def dense(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return PyTorch's causal attention."""
    keys, values = (each.repeat_interleave(HEADS // KV_HEADS, 1) for each in (keys, values))
    return scaled_dot_product_attention(queries, keys, values, is_causal=True)


def timed(run: Run, inputs: list[Tensor], with_gradients: bool) -> float:
    """Return seconds of one pass."""
    leaves = [each.clone().requires_grad_(with_gradients) for each in inputs]
    start = time.perf_counter()
    out = run(*leaves)
    if with_gradients:
        out.backward(torch.ones_like(out))
    return time.perf_counter() - start


def check(impl: AttentionImpl) -> None:
    """Exit if the execution does not compute what a mask does."""
    layout = Layout.dense(1, 1024)
    run, table = sparse(1024, impl)
    inputs = random_inputs(1024, torch.float32)
    masked = attention(inputs[0], DenseKV(*inputs[1:]), layout, table=table, impl="sdpa")
    difference = float((run(*inputs) - masked).abs().max())
    if difference > 1e-5:
        sys.exit(f"sparse_attention: {impl} differs from the mask by {difference}")


def random_inputs(length: int, dtype: torch.dtype) -> list[Tensor]:
    """Return queries, keys and values."""
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(1, each, length, DIM).to(dtype) for each in heads]


def measured(length: int, with_gradients: bool, args: argparse.Namespace) -> list[Measurement]:
    """Return the seconds of both, and their ratio round by round."""
    run, table = routed(length) if args.routed else sparse(length, args.impl)
    inputs = random_inputs(length, DTYPES[args.dtype])
    peers = {args.dtype: inputs, "float32": [each.float() for each in inputs]}
    firsts = {name: timed(dense, peer, with_gradients) for name, peer in peers.items()}
    peer = min(firsts, key=firsts.__getitem__)
    timed(run, inputs, with_gradients)
    rounds = [
        (timed(run, inputs, with_gradients), timed(dense, peers[peer], with_gradients))
        for _ in range(args.rounds)
    ]
    ours, theirs = zip(*rounds, strict=True)
    command = shlex.join(["python", "benchmarks/sparse_attention.py", *sys.argv[1:]])
    about = {
        "length": length,
        "dtype": args.dtype,
        "impl": args.impl,
        "routed": args.routed,
        "threads": torch.get_num_threads(),
        "pass": "forward and backward" if with_gradients else "forward",
        "listed": round(float(table.counts.float().mean()) * BLOCK),
        "peer": f"SDPA, {peer}",
    }
    return [
        summarize("sparse_s", ours, "s", conditions=about, command=command),
        summarize("dense_s", theirs, "s", conditions=about, command=command),
        summarize("speedup", [t / o for o, t in rounds], "1", conditions=about, command=command),
    ]


def show(found: list[Measurement]) -> None:
    """Print a line for each length and pass."""
    table = Table("tokens", "pass", "seen", "sparse, s", "dense, s", "times", "dense runs")
    for ours, theirs, ratio in zip(found[::3], found[1::3], found[2::3], strict=True):
        about, spread = ratio.conditions, ratio.spread
        assert spread is not None
        table.add_row(
            f"{about['length']:,}",
            str(about["pass"]),
            str(about["listed"]),
            f"{ours.value:.3f}",
            f"{theirs.value:.3f}",
            f"{ratio.value:.2f} ({spread.low:.2f} to {spread.high:.2f})",
            str(about["peer"]),
        )
    Console().print(table)


def main() -> int:
    """Measure, show or print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--lengths", type=positive, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--impl", choices=("auto", "gathered", "tiled"), default="auto")
    parser.add_argument("--routed", action="store_true", help="by content, the choice included")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    check(args.impl)
    found = []
    for length in args.lengths:
        for with_gradients in (False, True):
            found += measured(length, with_gradients, args)
    if args.json:
        print(json.dumps({"measurements": [item.to_dict() for item in found]}, indent=2))
    else:
        show(found)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped: nothing was kept")
