"""What every engine's program shares: request, prompts, clock, and the protocol. Standard library
only, so that a cold start pays nothing for it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Event = tuple[float, int]
Once = Callable[[list[list[int]], int], tuple[list[list[int]], Event, Event]]
"""Reads prompts and makes tokens: their ids, and (time, tokens so far) when every sequence has its
first token and when all are done."""

Text = tuple[Callable[[str], list[int]], Callable[[list[int]], str]]
"""Text to ids, and ids to text."""

QUESTION = "The capital of France is"

_OUT = os.fdopen(os.dup(1), "w")


def request() -> dict[str, Any]:
    """Return the request, with the thread limits in the environment before a library is loaded."""
    # what libraries print goes to standard error
    os.dup2(2, 1)
    found: dict[str, Any] = json.loads(sys.argv[1])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(found["threads"])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"
    return found


def prompts(asked: dict[str, Any], repeat: int) -> list[list[int]]:
    """Return prompts of fixed ids; the second differs, so that nothing is reused."""
    count, length = asked["batch"], asked["prompt_tokens"]
    made = []
    for sequence in range(count):
        ids = [1, *((17 + 7 * place) % 40000 for place in range(length - 1))]
        if length > 1:
            ids[1] = (17 + 13 * (repeat * count + sequence)) % 40000
        made.append(ids)
    return made


def serve(asked: dict[str, Any], once: Once, version: str, load_text: Callable[[], Text]) -> None:
    """Warm up, say so, and measure once for each line on standard input; then leave at once.

    A cold start is from a text to the text of the first token, the tokenizer's loading included.
    """
    if asked["mode"] == "cold":
        encode, decode = load_text()
        ids, _, _ = once([encode(QUESTION)], 1)
        assert isinstance(decode(ids[0]), str)
        _say({"cold_s": _since_start(), "peak_rss_bytes": _peak_rss_bytes(), "version": version})
        os._exit(0)
    once(prompts(asked, 0), asked["new_tokens"])
    _say({"ready": True, "version": version})
    for repeat, _ in enumerate(sys.stdin, start=1):
        given = prompts(asked, repeat)
        busy, start = time.process_time(), time.perf_counter()
        ids, (first_s, first), (last_s, last) = once(given, asked["new_tokens"])
        wall = time.perf_counter() - start
        if asked["mode"] == "prefill":
            rate = asked["prompt_tokens"] / (first_s - start)
        else:
            assert all(len(each) == asked["new_tokens"] for each in ids)
            rate = (last - first) / (last_s - first_s)
        share = (time.process_time() - busy) / wall
        _say({"tokens_per_s": rate, "cores_used": share, "peak_rss_bytes": _peak_rss_bytes()})
    os._exit(0)


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), file=_OUT, flush=True)


def _since_start() -> float:
    """Return seconds since the process began, in steps of 10 ms."""
    with open("/proc/self/stat") as file:
        ticks = int(file.read().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _peak_rss_bytes() -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
