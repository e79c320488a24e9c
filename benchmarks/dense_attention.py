"""Dense causal attention with gradients by our kernels, beside PyTorch's.

    python -m benchmarks.dense_attention
    python -m benchmarks.dense_attention --shapes 8x512 1x4096 --dtype float32 --json

One layer of SmolLM2's shape, rows x tokens. By turns; the peers are PyTorch's attention (keys and
values repeated for their query heads, which with gradients is faster here than `enable_gqa`) and
`blocked`, products of blocks of queries in PyTorch that keep the probabilities.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.sparse_attention import DIM, DTYPES, HEADS, KV_HEADS, Run, dense, timed
from deepseek.cli.models import positive
from deepseek.ops.attention import AttentionImpl, DenseKV, Layout, attention
from deepseek.ops.memory import keep_freed_memory
from deepseek.records import Measurement, summarize

PEERS = ("sdpa", "blocked")


def shape(text: str) -> tuple[int, int]:
    """Return rows and tokens of "8x512"."""
    rows, _, tokens = text.partition("x")
    if not (rows and tokens):
        raise argparse.ArgumentTypeError(f"must be ROWSxTOKENS, as in 8x512; got {text!r}")
    return positive(rows), positive(tokens)


def runs(rows: int, length: int) -> dict[str, Run]:
    """Return ours and its peers."""
    layout = Layout.dense(rows, length)

    def ours(impl: AttentionImpl) -> Run:
        def run(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return attention(queries, DenseKV(keys, values), layout, impl=impl)

        return run

    return {"tiled": ours("tiled"), "sdpa": dense, "blocked": ours("blocked")}


def measured(
    rows: int, length: int, with_gradients: bool, args: argparse.Namespace
) -> list[Measurement]:
    """Return ours, in seconds, and how many times as long each peer takes in the same round."""
    heads = (HEADS, KV_HEADS, KV_HEADS)
    inputs = [torch.randn(rows, each, length, DIM).to(DTYPES[args.dtype]) for each in heads]
    contenders = runs(rows, length)
    for run in contenders.values():
        timed(run, inputs, with_gradients)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, run in contenders.items():
            seconds[name].append(timed(run, inputs, with_gradients))
    command = shlex.join(["python", "-m", "benchmarks.dense_attention", *sys.argv[1:]])
    about = {
        "rows": rows,
        "length": length,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "pass": "forward and backward" if with_gradients else "forward",
    }
    found = [summarize("tiled_s", seconds["tiled"], "s", conditions=about, command=command)]
    for peer in PEERS:
        ratios = [b / a for a, b in zip(seconds["tiled"], seconds[peer], strict=True)]
        where = {**about, "peer": peer}
        found.append(summarize("speedup", ratios, "1", conditions=where, command=command))
    return found


def show(found: list[Measurement]) -> None:
    """Print a line for each shape and pass."""
    table = Table("rows x tokens", "pass", "ours, ms", *(f"times {peer}" for peer in PEERS))
    for at in range(0, len(found), 1 + len(PEERS)):
        ours, *ratios = found[at : at + 1 + len(PEERS)]
        about, cells = ours.conditions, []
        for ratio in ratios:
            assert ratio.spread is not None
            around = f"{ratio.spread.low:.2f} to {ratio.spread.high:.2f}"
            cells.append(f"{ratio.value:.2f} ({around})")
        name = f"{about['rows']} x {about['length']}"
        table.add_row(name, str(about["pass"]), f"{1e3 * ours.value:.1f}", *cells)
    Console().print(table)


def main() -> int:
    """Measure, show or print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    shapes = [(8, 128), (8, 512), (2, 1024), (2, 2048), (1, 4096)]
    parser.add_argument("--shapes", type=shape, nargs="+", default=shapes, metavar="ROWSxTOKENS")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    found = []
    for rows, length in args.shapes:
        for with_gradients in (False, True):
            found += measured(rows, length, with_gradients, args)
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
