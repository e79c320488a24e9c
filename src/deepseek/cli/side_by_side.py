"""This package and transformers on the same weights: speed by turns, memory by process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from deepseek.cli.output import Progress
from deepseek.errors import VerifyError
from deepseek.evaluate import speed_side_by_side
from deepseek.models import Decoder
from deepseek.records import Measurement, summarize

_ONE_PROCESS = """
import json, sys, time
start = time.perf_counter()
engine, folder, dtype, threads = sys.argv[1:]
import torch
torch.set_num_threads(int(threads))
if engine == "deepseek":
    from deepseek.hub import load
else:
    from transformers import AutoModelForCausalLM
imported = time.perf_counter()
if engine == "deepseek":
    from deepseek.generate import generate
    model = load(folder, dtype=dtype)
    loaded = time.perf_counter()
    generate(model, list(range(5, 133)), max_tokens=8, ignore_eos=True)
else:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    loaded = time.perf_counter()
    ids = torch.arange(5, 133)[None]
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8)
from deepseek.evaluate.resources import peak_rss_bytes
peak = peak_rss_bytes()
print(json.dumps({"import_s": imported - start, "load_s": loaded - imported, "peak": peak}))
"""


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
    folder: str, dtype: str, *, num_repeats: int, command: str, progress: Progress
) -> list[Measurement]:
    """Return import and load seconds and peak memory of each engine, in processes by turns.

    A process imports, loads, reads a prompt of 128 tokens and generates 8. The first round warms
    the file cache and does not count.

    Raises:
        VerifyError: a process failed.
    """
    import torch

    threads = str(torch.get_num_threads())
    rounds: dict[str, list[dict[str, float]]] = {"deepseek": [], "transformers": []}
    for number in range(num_repeats + 1):
        for engine, samples in rounds.items():
            progress(f"a process of {engine}", (number + 0.5) / (num_repeats + 1))
            words = [sys.executable, "-c", _ONE_PROCESS, engine, folder, dtype, threads]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode != 0:
                last = done.stderr.strip().splitlines()[-1:]
                raise VerifyError(f"the process of {engine} failed: {' '.join(last)}")
            if number > 0:
                samples.append(json.loads(done.stdout.splitlines()[-1]))
    found = []
    for name, key, unit in (
        ("import_s", "import_s", "s"),
        ("load_s", "load_s", "s"),
        ("process_peak_rss_bytes", "peak", "bytes"),
    ):
        for engine, samples in rounds.items():
            conditions = {"engine": engine, "dtype": dtype, "threads": int(threads)}
            values = [sample[key] for sample in samples]
            found.append(summarize(name, values, unit, conditions=conditions, command=command))
    return found
