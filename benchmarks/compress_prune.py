"""What a model loses and gains by leaving units out, without any recovery: perplexity and speed.

    python benchmarks/compress_prune.py
    python benchmarks/compress_prune.py --methods layers-activation search-taylor --share 0.2 --json

Each method saves the same share of the parameters, by some parts of the model alone (each is cut to
a half at most) or by a search over all, units chosen by each importance; one saves the share of
the seconds. Perplexity is that of the half of a text that the calibration does not look at, through
PyTorch in float32; speed that of the engine, the whole model and every cut one in turns. What
training gives back is measured elsewhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import deepseek
from deepseek.cli.models import positive
from deepseek.compress import Calibration, Work
from deepseek.compress.prune import Prune, Sparsify, Workload, sparsify, structured
from deepseek.compress.prune.shape import Part
from deepseek.errors import ConfigError, DeepseekError, describe
from deepseek.evaluate import default_corpus, perplexity, read_corpus, speed_side_by_side
from deepseek.models import Decoder
from deepseek.records import Measurement

COMMAND = shlex.join(["python", "benchmarks/compress_prune.py", *sys.argv[1:]])
ALL: tuple[Part, ...] = ("layers", "width", "heads", "channels")
METHODS: Mapping[str, tuple[tuple[Part, ...], str, str]] = {
    "layers": (("layers",), "activation", "parameters"),
    "width-activation": (("width",), "activation", "parameters"),
    "channels-magnitude": (("channels", "heads"), "magnitude", "parameters"),
    "channels-activation": (("channels", "heads"), "activation", "parameters"),
    "channels-taylor": (("channels", "heads"), "taylor", "parameters"),
    "search-magnitude": (ALL, "magnitude", "parameters"),
    "search-activation": (ALL, "activation", "parameters"),
    "search-taylor": (ALL, "taylor", "parameters"),
    "latency-activation": (ALL, "activation", "latency"),
}
SPARSE: Mapping[str, tuple[str, str, float]] = {
    "sparse-magnitude": ("magnitude", "unstructured", 0.0),
    "sparse-wanda": ("wanda", "unstructured", 0.0),
    "2:4-magnitude": ("magnitude", "2:4", 0.5),
    "2:4-wanda": ("wanda", "2:4", 0.5),
}


def loaded(source: str) -> Decoder:
    """Return a decoder in float32.

    Raises:
        ConfigError: it is none.
    """
    model = deepseek.load(source, dtype="float32")
    if not isinstance(model, Decoder):
        raise ConfigError(describe("model", "the benchmark of pruning", "a decoder", source))
    return model


def pruned(method: str, args: argparse.Namespace) -> tuple[Decoder, list[Measurement]]:
    """Return a model that a method made smaller, and what the stage measured."""
    folder = args.calibration.parent
    start = time.perf_counter()
    work = Work(loaded(args.model), folder, folder, report=say)
    calibration = Calibration(text=str(args.calibration), samples=args.samples, length=256)
    if method in SPARSE:
        importance, pattern, share = SPARSE[method]
        stage = Sparsify.from_dict(
            {
                "importance": importance,
                "pattern": pattern,
                "share": share or args.share,
                "calibration": calibration.to_dict(),
            }
        )
        outcome = sparsify.apply(stage, work)
    else:
        parts, importance, target = METHODS[method]
        workload = Workload(threads=args.threads)
        structure = Prune.from_dict(
            {
                "parts": list(parts),
                "importance": importance,
                "target": target,
                "share": args.share,
                "multiple": args.multiple,
                "calibration": calibration.to_dict(),
                "workload": workload.to_dict(),
            }
        )
        outcome = structured.apply(structure, work)
    assert isinstance(work.model, Decoder)
    took = Measurement(name="stage_s", value=time.perf_counter() - start, unit="s")
    return work.model, [*outcome, took]


def say(words: str, share: float | None) -> None:
    """Tell of progress on standard error."""
    shown = "" if share is None else f" {share:.0%}"
    print(f"  {words}{shown}", file=sys.stderr, flush=True)


def measured(model: Decoder, args: argparse.Namespace) -> list[Measurement]:
    """Return the perplexity of a model."""
    return perplexity(model, args.unseen, window=512, max_tokens=args.tokens).measurements


def speeds(models: Mapping[str, Decoder], args: argparse.Namespace) -> list[Measurement]:
    """Return the engine's speeds in bfloat16, the models in turns."""
    return speed_side_by_side(
        models,
        num_prompt_tokens=512,
        num_new_tokens=args.new_tokens,
        num_repeats=args.rounds,
        command=COMMAND,
    )


def show(found: list[Measurement]) -> None:
    """Print a line for each method."""
    names = [
        "parameters_kept",
        "sparsity",
        "perplexity",
        "decode_tokens_per_s",
        "prefill_tokens_per_s",
        "decode_speed_ratio",
        "prefill_speed_ratio",
    ]
    table = Table("method", *(name.replace("_", "\n") for name in names))
    for method in dict.fromkeys(str(item.conditions["method"]) for item in found):
        cells = {item.name: item for item in found if item.conditions["method"] == method}
        table.add_row(
            method, *(f"{cells[name].value:.4g}" if name in cells else "" for name in names)
        )
    Console().print(table)


def main() -> int:
    """Measure, show or print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="name or folder")
    choices = (*METHODS, *SPARSE)
    parser.add_argument("--methods", nargs="+", default=choices, choices=choices)
    parser.add_argument("--share", type=float, default=0.3, help="of parameters, or of seconds")
    parser.add_argument("--multiple", type=positive, default=64)
    parser.add_argument("--samples", type=positive, default=16, help="of calibration, 256 tokens")
    parser.add_argument(
        "--text",
        type=Path,
        help="its first half is calibrated on, its second measured (the text inside Python)",
    )
    parser.add_argument("--tokens", type=positive, default=8192, help="of perplexity")
    parser.add_argument("--threads", type=positive, help="(the cores of this process)")
    parser.add_argument("--new-tokens", type=int, default=64, help="generated; 0: no speeds")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    text = (default_corpus() if args.text is None else read_corpus(args.text)).text
    with tempfile.TemporaryDirectory() as folder:
        args.calibration = Path(folder) / "calibration.txt"
        args.calibration.write_text(text[: len(text) // 2], encoding="utf-8")
        args.unseen = text[len(text) // 2 :]
        found = compared(args)
    if args.json:
        print(json.dumps({"measurements": [item.to_dict() for item in found]}, indent=2))
    else:
        show(found)
    return 0


def compared(args: argparse.Namespace) -> list[Measurement]:
    """Return what was measured of the whole model and of each method."""
    models: dict[str, Decoder] = {"whole": loaded(args.model)}
    found = [(item, "whole") for item in measured(models["whole"], args)]
    models["whole"].to(torch.bfloat16)
    for method in args.methods:
        say(method, None)
        models[method], outcome = pruned(method, args)
        outcome += measured(models[method], args)
        for item in outcome:
            say(f"{method}: {item.name} {item.value:.6g}", None)
        found += [(item, method) for item in outcome]
        models[method].to(torch.bfloat16)
        if method in SPARSE:
            del models[method]  # it has the whole model's speed
    if args.new_tokens > 1:
        found += [(item, str(item.conditions["engine"])) for item in speeds(models, args)]
    return [told(item, method, args) for item, method in found]


def told(item: Measurement, method: str, args: argparse.Namespace) -> Measurement:
    """Return a measurement with what holds for it."""
    conditions = {**item.conditions, "model": args.model, "method": method, "share": args.share}
    return dataclasses.replace(item, conditions=conditions, command=COMMAND)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DeepseekError as error:
        sys.exit(f"pruning: {error}")
    except KeyboardInterrupt:
        sys.exit("pruning: stopped")
