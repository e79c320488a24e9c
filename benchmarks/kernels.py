"""Each kernel alone, as a share of what this machine can do: of the memory bandwidth for few rows,
of the products that its instructions can start for many.

    python benchmarks/kernels.py
    DEEPSEEK_ISA=avx2 python benchmarks/kernels.py --threads 1 --json

Both limits are measured in the same process, before and after the kernels, and the larger figure
counts: products that never leave the registers, and memory that is read once. Weights are more than
the caches hold; keys and values mostly are not, so their share of the bandwidth can pass 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys

import numpy as np
from rich.console import Console
from rich.table import Table

from deepseek.cli.models import positive
from deepseek.errors import DeepseekError
from deepseek.ops.cpu import chosen_instruction_set, default_threads, kernels

SHAPES = {"576 x 1536": (576, 1536), "2048 x 8192": (2048, 8192)}
"""Input and output channels: the feed-forward of a model of 135 million, and of a billion."""
ROWS = (1, 16, 512)
STORAGES = ("float32", "bfloat16", "int8", "int4")
COLD_BYTES = 192 << 20
PAGE_SIZE = 64
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
ATTENTION = {"1 row, context 8192": (1, 8192), "16 rows, context 1024": (16, 1024)}
PROMPTS = (512, 2048)
SHARES = ("share_of_bandwidth", "share_of_products")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the machine can do, measured."""

    bytes_per_second: float
    products_per_second: dict[str, float]

    def or_larger(self, other: Limits) -> Limits:
        """Return the larger figure of each."""
        products = {
            kind: max(value, other.products_per_second[kind])
            for kind, value in self.products_per_second.items()
        }
        return Limits(max(self.bytes_per_second, other.bytes_per_second), products)


@dataclasses.dataclass(frozen=True)
class Figure:
    """One kernel at one size."""

    kernel: str
    storage: str
    size: str
    seconds: float
    num_bytes: float
    """Of weights, or of keys and values, that are read."""
    num_products: float
    """Multiply-adds."""

    def shares(self, limits: Limits) -> tuple[float, float]:
        """Return what it reaches of the bandwidth and of the products."""
        bandwidth = self.num_bytes / self.seconds / limits.bytes_per_second
        return bandwidth, self.num_products / self.seconds / limits.products_per_second[
            self.storage
        ]


def measure_limits(isa: str, threads: int) -> Limits:
    """Return the limits of this machine."""
    native = kernels()
    products = {
        kind: native.measure_products(isa, "int8" if kind == "int4" else kind, threads)
        for kind in STORAGES
    }
    return Limits(native.measure_bandwidth(isa, 2 * COLD_BYTES, threads), products)


def seconds_of(program, step: tuple, instructions: range, repeats: int) -> float:
    """Return the median time of some instructions of a program, per instruction."""
    program.is_timed = True
    program.run(*step)
    samples = []
    for _ in range(repeats):
        before = np.array(program.seconds)
        program.run(*step)
        samples.append(float((np.array(program.seconds) - before)[list(instructions)].sum()))
    return statistics.median(samples) / len(instructions)


def new_program(isa: str, threads: int, widths: list[int], instructions: list[dict], tokens: int):
    """Return a program whose buffers lie side by side."""
    shape = {
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "layers": 1,
        "vocab": tokens,
        "norm_eps": 1e-5,
        "rope_factor": 1.0,
        "score_scale": HEAD_DIM**-0.5,
        "inverse_frequencies": [0.0] * (HEAD_DIM // 2),
    }
    offsets = np.cumsum([0, *widths[:-1]]).tolist()
    buffers = list(zip(widths, offsets, strict=True))
    return kernels().make_program(isa, shape, buffers, instructions, tokens, threads)


def add_weight(program, values: np.ndarray, storage: str) -> None:
    """Pack a weight [n, k]."""
    program.add_weight(
        kind=storage,
        group=32,
        rotated=storage == "int8",
        source=values.ctypes.data,
        dtype="float32",
        n=values.shape[0],
        k=values.shape[1],
        stride=values.strides[0],
        bias=None,
    )


def linear_figures(isa: str, threads: int, storage: str) -> list[Figure]:
    """Return the figures of the products of one storage."""
    rng = np.random.default_rng(0)
    figures = []
    for size, (width, columns) in SHAPES.items():
        weight = rng.standard_normal((columns, width), np.float32)
        bits = {"float32": 32, "bfloat16": 16, "int8": 8.25, "int4": 5}[storage]
        num_bytes = columns * width * bits / 8
        copies = max(2, round(COLD_BYTES / num_bytes))
        linear = [
            {"op": "linear", "input": 0, "output": 1, "weights": [1 + i]} for i in range(copies)
        ]
        embed = {"op": "embed", "output": 0, "weights": [0]}
        program = new_program(isa, threads, [width, columns], [embed, *linear], max(ROWS))
        add_weight(program, rng.standard_normal((max(ROWS), width), np.float32), "float32")
        for _ in range(copies):
            add_weight(program, weight, storage)
        program.start()
        for rows in ROWS:
            pages = kernels().KvPages("bfloat16", program, rows)
            tokens = np.arange(rows, dtype=np.int32)
            zeros = np.zeros(rows, np.int32)
            nothing = np.zeros(0, np.int32), np.zeros((0, max(ROWS)), np.float32)
            step = (pages, tokens, zeros, tokens, tokens[:, None].copy(), *nothing)
            used = range(1, 1 + copies if rows < max(ROWS) else 1 + min(copies, 8))
            seconds = seconds_of(program, step, used, 5)
            products = rows * columns * width
            figures.append(
                Figure(
                    kernel="linear",
                    storage=storage,
                    size=f"{size}, {rows} row{'s' if rows > 1 else ''}",
                    seconds=seconds,
                    num_bytes=num_bytes,
                    num_products=products,
                )
            )
    return figures


def attention_program(isa: str, threads: int, tokens: int):
    """Return a program that attends with random queries, keys and values."""
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    attend = {"op": "attend", "input": 0, "output": 1, "layer": 0}
    embed = {"op": "embed", "output": 0, "weights": [0]}
    program = new_program(isa, threads, [width, HEADS * HEAD_DIM], [embed, attend], tokens)
    rng = np.random.default_rng(0)
    add_weight(program, rng.standard_normal((tokens, width), np.float32), "float32")
    program.start()
    return program


def attention_figures(isa: str, threads: int, storage: str) -> list[Figure]:
    """Return the figures of attention over keys and values of one storage."""
    element = {"float32": 4, "bfloat16": 2, "int8": 1}[storage]
    nothing = np.zeros(0, np.int32), np.zeros((0, max(PROMPTS)), np.float32)
    program = attention_program(isa, threads, max(PROMPTS))
    figures = []

    def figure(size: str, step: tuple, num_bytes: float, products: float) -> None:
        seconds = seconds_of(program, step, range(1, 2), 5)
        figures.append(
            Figure(
                kernel="attention",
                storage=storage,
                size=size,
                seconds=seconds,
                num_bytes=num_bytes,
                num_products=products,
            )
        )

    for size, (rows, context) in ATTENTION.items():
        per_row = context // PAGE_SIZE
        pages = kernels().KvPages(storage, program, rows * per_row)
        table = np.arange(rows * per_row, dtype=np.int32).reshape(rows, per_row)
        places = np.arange(rows, dtype=np.int32)
        step = (pages, places, np.full(rows, context - 1, np.int32), places, table, *nothing)
        kept = rows * context * KV_HEADS * HEAD_DIM * 2
        figure(size, step, kept * element, rows * context * HEADS * HEAD_DIM * 2)
    for count in PROMPTS:
        pages = kernels().KvPages(storage, program, count // PAGE_SIZE)
        table = np.arange(count // PAGE_SIZE, dtype=np.int32)[None]
        places = np.arange(count, dtype=np.int32)
        step = (pages, places, places, np.zeros(count, np.int32), table, *nothing)
        kept = count * KV_HEADS * HEAD_DIM * 2
        products = count * (count + 1) // 2 * HEADS * HEAD_DIM * 2
        figure(f"prompt of {count}", step, kept * element, products)
    return figures


def show(figures: list[Figure], limits: Limits, isa: str, threads: int) -> None:
    """Print the figures as a table."""
    peaks = ", ".join(f"{k} {v / 1e9:.0f}" for k, v in limits.products_per_second.items())
    table = Table(
        "kernel", "storage", "size", "time (us)", "of the bandwidth", "of the products",
        title=f"{isa}, {threads} threads; {limits.bytes_per_second / 1e9:.1f} GB/s; "
        f"10^9 products/s: {peaks}",
    )  # fmt: skip
    for each in figures:
        bandwidth, products = each.shares(limits)
        table.add_row(
            each.kernel,
            each.storage,
            each.size,
            f"{each.seconds * 1e6:.0f}",
            f"{bandwidth:.0%}",
            f"{products:.0%}",
        )
    Console().print(table)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--threads", type=positive, default=default_threads())
    parser.add_argument("--storages", nargs="+", choices=STORAGES, default=STORAGES)
    options = parser.parse_args()
    try:
        isa = chosen_instruction_set()
    except DeepseekError as error:
        print(error, file=sys.stderr)
        return 2
    limits = measure_limits(isa, options.threads)
    figures = []
    for storage in options.storages:
        figures += linear_figures(isa, options.threads, storage)
    for storage in options.storages:
        if storage != "int4":
            figures += attention_figures(isa, options.threads, storage)
    limits = limits.or_larger(measure_limits(isa, options.threads))
    if options.json:
        result = {
            "instruction_set": isa,
            "threads": options.threads,
            "limits": dataclasses.asdict(limits),
            "measurements": [
                dataclasses.asdict(each)
                | dict(
                    zip(
                        ("share_of_bandwidth", "share_of_products"),
                        each.shares(limits),
                        strict=True,
                    )
                )
                for each in figures
            ],
        }
        print(json.dumps(result, indent=2))
    else:
        show(figures, limits, isa, options.threads)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped: nothing was kept")
