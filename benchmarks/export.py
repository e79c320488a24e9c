"""Exported models in ONNX Runtime beside PyTorch on the same weights, by turns.

    python benchmarks/export.py                            # a decoder: decoding, prompts
    python benchmarks/export.py --model all-minilm-l6-v2   # an encoder: a pass of a batch
    python benchmarks/export.py --small FOLDER             # a bundle on grids too

Every contender takes its turn in every round, so that whatever else the machine does meets all of
them; ratios are to the others of the same round. Nothing is timed before the answers in float32 are
within 1e-3 of PyTorch's and, of a decoder, the same 64 tokens are chosen. What is rounded is told
with its divergence.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepseek.export import Reader, export, open_exported
from deepseek.hub import load
from deepseek.models import Decoder, Encoder
from deepseek.records import Measurement, summarize

TEXT = (
    "The history of the Roman Empire began when Augustus became its first emperor in 27 BC. Over "
    "the following centuries the empire spread across Europe, Africa and Asia, building roads, "
    "cities and aqueducts, before it slowly declined. In the same way a program is built:\n"
    "def main():\n    for number in range(10):\n        print(number ** 2)\n"
)
KINDS: dict[str, dict[str, Any]] = {
    "onnx": {},
    "onnx, optimized": {"optimize": True},
    "onnx int8": {"quantize": "int8"},
    "onnx int8, optimized": {"quantize": "int8", "optimize": True},
    "onnx int4, optimized": {"quantize": "int4", "optimize": True},
}
EAGER, SMALL = "pytorch eager", "onnx of --small, optimized"
PROMPT, STEPS, GREEDY = 64, 24, 64
LARGEST_DIFFERENCE = 1e-3
Turn = Callable[[], float]
"""Does the work once and returns the seconds it took."""


def read(name: str, model: str, small: str | None, threads: int) -> Reader:
    """Return an exported model, opened; its files are gone when it is."""
    source = small if name == SMALL else model
    options = {"optimize": True} if name == SMALL else KINDS[name]
    with tempfile.TemporaryDirectory() as folder:
        export(str(source), "onnx", Path(folder) / "out", progress=None, **options)
        return open_exported(Path(folder) / "out", threads=threads)


def chosen_tokens(logits_of: Callable[[np.ndarray], np.ndarray], prompt: np.ndarray) -> list[int]:
    """Return the likeliest tokens behind a prompt, one after the other."""
    found, fed = [], prompt
    for _ in range(GREEDY):
        found.append(int(logits_of(fed)[0, -1].argmax()))
        fed = np.array([found[-1:]])
    return found


def stepping(reader: Reader) -> Callable[[np.ndarray], np.ndarray]:
    """Return what feeds tokens to a reader from the beginning on and gives their logits."""
    state: list[object] = [None]

    def feed(ids: np.ndarray) -> np.ndarray:
        logits, state[0] = reader.step(ids, state[0])
        return logits

    return feed


def stepping_eager(model: Decoder) -> Callable[[np.ndarray], np.ndarray]:
    """Return the same of PyTorch's modules."""
    cache = model.new_cache(1, PROMPT + GREEDY + STEPS)

    def feed(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(ids), cache=cache, last_only=True).logits.numpy()

    return feed


def decoding(begin: Callable[[], Callable[[np.ndarray], np.ndarray]], ids: np.ndarray) -> Turn:
    """Return a turn of decoding: the prompt and two steps are not timed."""

    def turn() -> float:
        feed = begin()
        token = feed(ids[:, :PROMPT])[:, -1:].argmax(-1)
        for _ in range(2):
            token = feed(token)[:, -1:].argmax(-1)
        before = time.perf_counter()
        for _ in range(STEPS):
            token = feed(token)[:, -1:].argmax(-1)
        return time.perf_counter() - before

    return turn


def once(call: Callable[[], object]) -> Turn:
    """Return a turn of one call, behind one that is not timed."""

    def turn() -> float:
        call()
        before = time.perf_counter()
        call()
        return time.perf_counter() - before

    return turn


def compare(found: np.ndarray, expected: np.ndarray, *, is_decoder: bool) -> dict[str, float]:
    """Return how far answers are from PyTorch's: [tokens, values]."""
    made = {"largest_difference": float(np.abs(found - expected).max())}
    if is_decoder:
        one, other = (torch.from_numpy(each).log_softmax(-1) for each in (expected, found))
        made["kl_nats"] = float((one.exp() * (one - other)).sum(-1).mean())
        made["same_top"] = float((one.argmax(-1) == other.argmax(-1)).float().mean())
    else:
        products = (found * expected).sum(-1)
        norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(expected, axis=-1)
        made["cosine"] = float((products / norms).mean())
    return made


def check(name: str, made: dict[str, float], same_text: bool) -> None:
    """Refuse to time what computes something else."""
    is_float = name in ("onnx", "onnx, optimized")
    if is_float and (made["largest_difference"] > LARGEST_DIFFERENCE or not same_text):
        sys.exit(f"{name} computes something else: {made}, same text: {same_text}")


def take_turns(turns: dict[str, dict[str, Turn]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of each work, contender and round."""
    times: dict[str, dict[str, list[float]]] = {
        work: {name: [] for name in named} for work, named in turns.items()
    }
    for number in range(rounds):
        for work, named in turns.items():
            order = list(named) if number % 2 == 0 else list(reversed(named))
            for name in order:
                times[work][name].append(named[name]())
    return times


def report(
    times: dict[str, dict[str, list[float]]], tokens: dict[str, int], about: dict[str, Any]
) -> list[Measurement]:
    """Return rates, and ratios to PyTorch and to the same file without `optimize`."""
    found = []
    for work, named in times.items():
        for name, seconds in named.items():
            conditions = {**about, "work": work, "contender": name}
            rates = [tokens[work] / each for each in seconds]
            found.append(summarize("rate", rates, "tokens/s", conditions=conditions))
            for other in (EAGER, name.removesuffix(", optimized")):
                if other != name and other in named:
                    ratios = [b / a for a, b in zip(seconds, named[other], strict=True)]
                    conditions = {**conditions, "than": other}
                    found.append(summarize("times_faster", ratios, "1", conditions=conditions))
    return found


def decoder_turns(
    model: Decoder, readers: dict[str, Reader], ids: np.ndarray
) -> dict[str, dict[str, Turn]]:
    """Return the turns of decoding and of reading a prompt."""
    tensor = torch.from_numpy(ids)

    def eager() -> None:
        with torch.inference_mode():
            model(tensor)

    turns: dict[str, dict[str, Turn]] = {
        "decode": {EAGER: decoding(lambda: stepping_eager(model), ids)},
        "prompt": {EAGER: once(eager)},
    }
    for name, reader in readers.items():
        turns["decode"][name] = decoding(lambda reader=reader: stepping(reader), ids)
        turns["prompt"][name] = once(lambda reader=reader: reader.step(ids, None))
    return turns


def encoder_turns(
    model: Encoder, readers: dict[str, Reader], ids: np.ndarray
) -> dict[str, dict[str, Turn]]:
    """Return the turns of a pass over a batch without padding."""
    tensor, mask = torch.from_numpy(ids), np.ones_like(ids)

    def eager() -> None:
        with torch.inference_mode():
            model(tensor)

    turns: dict[str, Turn] = {EAGER: once(eager)}
    for name, reader in readers.items():
        turns[name] = once(lambda reader=reader: reader.forward(ids, mask))
    return {"pass": turns}


def main() -> None:
    """Export, check, take turns and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--small", metavar="FOLDER", help="a bundle on grids, of the same model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load(args.model, dtype="float32")
    assert model.tokenizer is not None
    ids = np.array([model.tokenizer.encode(TEXT)[: PROMPT + 1]])
    is_decoder = isinstance(model, Decoder)
    if not is_decoder:
        ids = np.repeat(ids[:, :PROMPT], 8, 0)
    with torch.inference_mode():
        output = model(torch.from_numpy(ids))
    expected = (output.logits if is_decoder else output.last_hidden_state).numpy()
    names = [*KINDS, *([SMALL] if args.small else [])]
    readers, quality, found = {}, {}, []
    for name in names:
        reader = readers[name] = read(name, args.model, args.small, args.threads)
        made = compare(reader.forward(ids, np.ones_like(ids)), expected, is_decoder=is_decoder)
        same = True
        if isinstance(model, Decoder):
            same = chosen_tokens(stepping(reader), ids[:, :8]) == chosen_tokens(
                stepping_eager(model), ids[:, :8]
            )
            made["same_64_tokens"] = float(same)
        check(name, made, same)
        quality[name] = made
        print(name, made, file=sys.stderr, flush=True)
    make = decoder_turns if is_decoder else encoder_turns
    times = take_turns(make(model, readers, ids), args.rounds)  # type: ignore[arg-type]
    about = {"model": args.model, "threads": args.threads, "rounds": args.rounds}
    about["runtime"] = next(iter(readers.values())).name
    for name, made in quality.items():
        for what, value in made.items():
            conditions = {**about, "contender": name}
            found.append(Measurement(name=what, value=value, unit="1", conditions=conditions))
    tokens = {"decode": STEPS, "prompt": ids.size, "pass": ids.size}
    found += report(times, tokens, about)
    for item in found:
        if item.name in ("rate", "times_faster"):
            words = [str(item.conditions[key]) for key in ("work", "contender")]
            spread = item.spread
            assert spread is not None
            shown = f"{item.value:.4g} ({spread.low:.4g} to {spread.high:.4g})"
            than = item.conditions.get("than", "")
            print(*words, item.name, shown, than, file=sys.stderr)
    print(json.dumps([item.to_dict() for item in found]))


if __name__ == "__main__":
    main()
