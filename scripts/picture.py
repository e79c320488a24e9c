"""Draws the README's picture from a benchmark.

deepseek bench smollm2-135m --dtype bfloat16 --json > bench.json
python scripts/picture.py bench.json docs/assets/speed.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

PANELS = (
    ("decode_tokens_per_s", "decoding, batch 1", "tokens/s", 1),
    ("prefill_tokens_per_s", "reading a prompt", "tokens/s", 1),
    ("load_s", "loading, files warm", "s", 1),
    ("process_peak_rss_bytes", "peak memory", "MiB", 2**20),
)
COLOURS = {"deepseek": "#3b6ea5", "transformers": "#b0b7bf"}


def main() -> int:
    """Read a benchmark's object, write an SVG."""
    source, target = map(Path, sys.argv[1:])
    result = json.loads(source.read_text())
    figure = Figure(figsize=(9, 2.1), layout="constrained")
    threads = result["measurements"][0]["conditions"]["threads"]
    title = f"{result['model']}, {result['dtype']}, {threads} threads"
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    for axes, (name, title, unit, scale) in zip(figure.subplots(1, 4), PANELS, strict=True):
        sides = {
            item["conditions"]["engine"]: item["value"] / scale
            for item in result["measurements"]
            if item["name"] == name
        }
        bars = axes.bar(list(sides), list(sides.values()), color=[COLOURS[side] for side in sides])
        axes.bar_label(bars, [f"{value:.3g}" for value in sides.values()], padding=2, fontsize=8)
        axes.set_title(f"{title} ({unit})", fontsize=9)
        axes.margins(y=0.2)
        axes.set_yticks([])
        axes.tick_params(labelsize=8, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(target, format="svg", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
