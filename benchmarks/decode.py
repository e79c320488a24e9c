"""Decoding speed at batch size 1 against `transformers.generate`: same bundle, dtype and threads.

    python benchmarks/decode.py --json

The two take turns, so that whatever else the machine does meets both, and each round gives a ratio
of its own. In float32 both must give the same tokens before any figure is shown.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation import BaseStreamer

from deepseek.errors import VerifyError
from deepseek.generate import generate
from deepseek.hub import load, pull
from deepseek.models import Decoder
from deepseek.records import Measurement, summarize

TEXT = (
    "A river is a natural stream of fresh water that flows on land towards another body of water. "
)


@dataclasses.dataclass(frozen=True)
class Timing:
    """One generation: seconds to the first token, tokens per second behind it, and the tokens."""

    first_token_s: float
    tokens_per_s: float
    tokens: tuple[int, ...]


class Clock(BaseStreamer):
    """Notes when `transformers.generate` hands out each token."""

    def __init__(self) -> None:
        """Start without a token; the prompt comes first and is not one."""
        self.times_s: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note the time of a prompt or token."""
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: the last token has been noted."""


def timing(start_s: float, times_s: Sequence[float], tokens: Sequence[int]) -> Timing:
    """Return the timing of tokens that came at the given moments."""
    rate = (len(times_s) - 1) / (times_s[-1] - times_s[0])
    return Timing(times_s[0] - start_s, rate, tuple(tokens))


def run_ours(model: Decoder, prompt: list[int], count: int) -> Timing:
    """Generate `count` tokens with this package."""
    times_s: list[float] = []
    start_s = time.perf_counter()
    result = generate(
        model,
        prompt,
        max_tokens=count,
        ignore_eos=True,
        on_piece=lambda _: times_s.append(time.perf_counter()),
    )
    assert not isinstance(result, list)
    return timing(start_s, times_s, result.token_ids)


def run_theirs(model: PreTrainedModel, prompt: list[int], count: int) -> Timing:
    """Generate `count` tokens with transformers."""
    ids, clock = torch.tensor([prompt]), Clock()
    start_s = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        streamer=clock,
    )
    return timing(start_s, clock.times_s[1:], output[0, len(prompt) :].tolist())


def compare(folder: Path, dtype: str, options: argparse.Namespace) -> list[Measurement]:
    """Return speeds and their ratios for one dtype.

    Raises:
        VerifyError: in float32 the tokens differ.
    """
    ours = load(folder, dtype=dtype)
    assert isinstance(ours, Decoder) and ours.tokenizer is not None
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    words = ours.tokenizer.encode(TEXT * (options.prompt_tokens // 8))
    prompt = words[: options.prompt_tokens]
    # the first round warms up caches and libraries on both sides
    rounds = [
        (run_ours(ours, prompt, options.tokens), run_theirs(theirs, prompt, options.tokens))
        for _ in range(options.rounds + 1)
    ][1:]
    equal = agreement(rounds[0][0].tokens, rounds[0][1].tokens)
    if dtype == "float32" and equal < 1:
        raise VerifyError(f"float32 tokens are equal to transformers' for {equal:.0%} only")
    conditions = {
        "model": options.model,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "prompt_tokens": len(prompt),
        "new_tokens": options.tokens,
        "rounds": options.rounds,
    }
    return measurements(rounds, equal, conditions)


def agreement(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Return the share of tokens before the first difference."""
    same = 0
    for one, other in zip(ours, theirs, strict=True):
        if one != other:
            break
        same += 1
    return same / len(ours)


def measurements(
    rounds: Sequence[tuple[Timing, Timing]], equal: float, conditions: dict[str, object]
) -> list[Measurement]:
    """Return medians and spreads of both sides, and of the ratio of each round."""
    rates = [(ours.tokens_per_s, theirs.tokens_per_s) for ours, theirs in rounds]
    firsts = [(ours.first_token_s, theirs.first_token_s) for ours, theirs in rounds]
    command = "python benchmarks/decode.py --json"
    samples = {
        ("decode_tokens_per_s", "tokens/s"): [ours for ours, _ in rates],
        ("decode_tokens_per_s_transformers", "tokens/s"): [theirs for _, theirs in rates],
        ("decode_speedup", "1"): [ours / theirs for ours, theirs in rates],
        ("first_token_s", "s"): [ours for ours, _ in firsts],
        ("first_token_s_transformers", "s"): [theirs for _, theirs in firsts],
        ("first_token_speedup", "1"): [theirs / ours for ours, theirs in firsts],
    }
    shown = [
        summarize(name, values, unit, conditions=conditions, command=command)
        for (name, unit), values in samples.items()
    ]
    same = Measurement(
        name="tokens_equal_share", value=equal, unit="1", conditions=conditions, command=command
    )
    return [*shown, same]


def main() -> int:
    """Measure, and print one JSON object or a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="name or folder")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = Path(options.model)
    if not folder.is_dir():
        folder = pull(options.model).path
    found = [item for dtype in options.dtypes for item in compare(folder, dtype, options)]
    if options.json:
        print(json.dumps({"measurements": [item.to_dict() for item in found]}, indent=2))
        return 0
    for item in found:
        spread = f"  [{item.spread.low:.3g} to {item.spread.high:.3g}]" if item.spread else ""
        print(f"{item.conditions['dtype']:9} {item.name:34} {item.value:9.3g} {item.unit}{spread}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
