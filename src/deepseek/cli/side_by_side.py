"""This package and transformers on the same weights: speed by turns, memory by process."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from deepseek.cli.output import Progress
from deepseek.errors import VerifyError
from deepseek.evaluate import speed_side_by_side
from deepseek.models import Decoder
from deepseek.ops.cpu import default_threads
from deepseek.records import Measurement, summarize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """An engine in a process of its own."""

    name: str
    engine: str
    """One of `engine_process.ENGINES`."""
    model: str
    """Its folder or file."""
    scheme: str
    """How it stores the weights, in its own words."""


def compare_speed(
    ours: Decoder,
    theirs: Any,
    *,
    num_prompt_tokens: int,
    num_new_tokens: int,
    num_repeats: int,
    command: str,
    progress: Progress,
) -> list[Measurement]:
    """Return speeds of both engines, which take turns, and the ratios of each round."""
    return speed_side_by_side(
        {"deepseek": ours, "transformers": theirs},
        num_prompt_tokens=num_prompt_tokens,
        num_new_tokens=num_new_tokens,
        num_repeats=num_repeats,
        command=command,
        progress=progress,
    )


def compare_processes(
    contenders: Sequence[Contender],
    *,
    num_prompt_tokens: int,
    num_new_tokens: int,
    num_rounds: int,
    command: str,
    progress: Progress,
) -> list[Measurement]:
    """Return what engines cost and give, each in processes of its own, by turns.

    The first round warms the file cache and does not count.

    Returns:
        per engine `cold_start_s` (from the start of the process until the first token is there),
        `prefill_tokens_per_s` and `decode_tokens_per_s` (the best of three of a process) and
        `process_peak_rss_bytes`, with the condition `engine`.

    Raises:
        VerifyError: a process failed.
    """
    threads = default_threads()
    rounds: dict[str, list[dict[str, float]]] = {each.name: [] for each in contenders}
    for number in range(num_rounds + 1):
        for place, each in enumerate(contenders):
            share = (number + place / len(contenders)) / (num_rounds + 1)
            progress(f"a process of {each.name}", share)
            asked = {
                "engine": each.engine,
                "model": each.model,
                "scheme": each.scheme,
                "threads": threads,
                "prompt_tokens": num_prompt_tokens,
                "new_tokens": num_new_tokens,
            }
            sample = _run(each.name, asked)
            if number > 0:
                rounds[each.name].append(sample)
    found = []
    for key, unit in _UNITS.items():
        for each in contenders:
            conditions = {
                "engine": each.name,
                "threads": threads,
                "prompt_tokens": num_prompt_tokens,
                "new_tokens": num_new_tokens,
            }
            values = [sample[key] for sample in rounds[each.name]]
            found.append(summarize(key, values, unit, conditions=conditions, command=command))
    return found


def _run(name: str, asked: dict[str, Any]) -> dict[str, float]:
    words = [sys.executable, "-m", "deepseek.cli.engine_process"]
    asked = {**asked, "started_at": time.time()}
    done = subprocess.run([*words, json.dumps(asked)], capture_output=True, text=True)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:]
        raise VerifyError(f"the process of {name} failed: {' '.join(last)}")
    return json.loads(done.stdout.splitlines()[-1])


_UNITS = {
    "cold_start_s": "s",
    "prefill_tokens_per_s": "tokens/s",
    "decode_tokens_per_s": "tokens/s",
    "process_peak_rss_bytes": "bytes",
}
