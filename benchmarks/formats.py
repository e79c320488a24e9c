"""Folders that `deepseek export` made of one model, each in its own runtime, by turns.

    python -m benchmarks.formats --model smollm2-135m runs/onnx runs/openvino runs/torch

An encoder reads eight texts at once, or as many as every file takes. Nothing is timed before the
answers of float32 files are within 1e-3 of PyTorch's and, of a decoder, the same 64 tokens are
chosen. What is rounded, by its folder's name, is told with its divergence.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.export import (
    LARGEST_DIFFERENCE,
    PROMPT,
    STEPS,
    TEXT,
    chosen_tokens,
    compare,
    decoder_turns,
    encoder_turns,
    report,
    stepping,
    stepping_eager,
    take_turns,
)
from deepseek.export import Reader, open_exported
from deepseek.hub import load
from deepseek.models import Decoder, Encoder
from deepseek.records import Measurement

ROUNDED = ("int8", "int4")


def judge(
    name: str, reader: Reader, model: Decoder | Encoder, ids: np.ndarray, expected: np.ndarray
) -> dict[str, float]:
    """Return how far a reader is from PyTorch; end the program where float32 is not near."""
    is_decoder = isinstance(model, Decoder)
    made = compare(reader.forward(ids, np.ones_like(ids)), expected, is_decoder=is_decoder)
    if isinstance(model, Decoder):
        texts = [
            chosen_tokens(each, ids[:, :8]) for each in (stepping(reader), stepping_eager(model))
        ]
        made["same_64_tokens"] = float(texts[0] == texts[1])
    is_near = made["largest_difference"] <= LARGEST_DIFFERENCE and made.get("same_64_tokens", 1.0)
    if not is_near and not any(part in name for part in ROUNDED):
        sys.exit(f"{name} computes something else: {made}")
    return made


def main() -> None:
    """Open, check, take turns and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--model", required=True, help="that they were made of")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load(args.model, dtype="float32")
    assert model.tokenizer is not None
    opened = [(folder, open_exported(folder, threads=args.threads)) for folder in args.folders]
    ids = np.array([model.tokenizer.encode(TEXT)[: PROMPT + 1]])
    is_decoder = isinstance(model, Decoder)
    if not is_decoder:
        ids = np.repeat(ids[:, :PROMPT], min(8, *(each.max_batch for _, each in opened)), 0)
    with torch.inference_mode():
        output = model(torch.from_numpy(ids))
    expected = (output.logits if is_decoder else output.last_hidden_state).numpy()
    about: dict[str, Any] = {"model": args.model, "threads": args.threads, "rounds": args.rounds}
    found, readers = [], {}
    for folder, reader in opened:
        name = f"{folder.name} ({reader.name})"
        made = judge(name, reader, model, ids, expected)
        made["bytes"] = float(sum(each.stat().st_size for each in folder.rglob("model*")))
        readers[name] = reader
        print(name, made, file=sys.stderr, flush=True)
        for what, value in made.items():
            conditions = {**about, "contender": name}
            found.append(Measurement(name=what, value=value, unit="1", conditions=conditions))
    make = decoder_turns if is_decoder else encoder_turns
    times = take_turns(make(model, readers, ids), args.rounds)  # type: ignore[arg-type]
    found += report(times, {"decode": STEPS, "prompt": ids.size, "pass": ids.size}, about)
    for item in found:
        if item.spread is not None:
            words = [str(item.conditions[key]) for key in ("work", "contender")]
            shown = f"{item.value:.4g} ({item.spread.low:.4g} to {item.spread.high:.4g})"
            print(*words, item.name, shown, item.conditions.get("than", ""), file=sys.stderr)
    print(json.dumps([item.to_dict() for item in found]))


if __name__ == "__main__":
    main()
