"""The server's own values where nobody gave one: how many pages, how many rows, and why."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np

from deepseek.errors import CapacityError, ConfigError, describe
from deepseek.generate.engine import MAX_STEP_TOKENS, PAGE_SIZE
from deepseek.ops import cgroup
from deepseek.serve.stepping import StepEngine

LONGEST_STEP_S = 0.15
"""What a step that reads prompts may take, so that answers beside it go on smoothly."""
KEPT_SHARE = 0.5
"""Share of the free memory that pages may take."""
MAX_RUNNING = 64
_LEAST_STEP_TOKENS = 64
_MEASURED_TOKENS, _MEASURED_STEPS = 2 * PAGE_SIZE, 5


@dataclasses.dataclass(frozen=True)
class Value:
    """A setting as it is used."""

    name: str
    value: int
    why: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What the user gave; None for what is to be chosen."""

    pages: int | None = None
    max_running: int | None = None
    step_tokens: int | None = None
    max_waiting: int | None = None


@dataclasses.dataclass(frozen=True)
class Values:
    """All settings that depend on the machine."""

    threads: Value
    pages: Value
    max_running: Value
    step_tokens: Value
    max_waiting: Value

    def listed(self) -> list[Value]:
        """Return them in the order of their fields."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


def choose_values(engine: StepEngine, asked: Asked) -> Values:
    """Return the settings for an engine on this machine.

    Raises:
        CapacityError: there is no room for one request of full length.
        ConfigError: a step would hold less than a token of each running request.
    """
    context = engine.config.max_positions
    running = asked.max_running or MAX_RUNNING
    if asked.step_tokens is not None and asked.step_tokens < running:
        must = f"at least {running}, a token for each request that runs"
        step = "Give a smaller --max-running"
        raise ConfigError(describe("--step-tokens", "the server", must, asked.step_tokens, step))
    told = f"as asked: requests that run together; each may be {context:,} tokens long"
    if asked.max_running is None:
        told = "rows of one step; more rows read the weights no oftener, but each waits longer"
    pages = _pages(engine, asked.pages, running)
    waiting = asked.max_waiting or 4 * running
    why_waiting = "as asked" if asked.max_waiting else "four times those that run; more are refused"
    return Values(
        _threads(engine),
        pages,
        Value("max_running", running, told),
        _step_tokens(engine, asked.step_tokens),
        Value("max_waiting", waiting, why_waiting),
    )


def _threads(engine: StepEngine) -> Value:
    quota = cgroup.cgroup_cores()
    limit = "" if quota is None else f", of which its control group may use {quota:g}"
    return Value("threads", engine.threads, f"cores of this process{limit}, or as asked")


def _pages(engine: StepEngine, asked: int | None, running: int) -> Value:
    page_bytes = int(engine.new_pages(1).num_bytes)
    whole = -(-engine.config.max_positions // PAGE_SIZE)
    if asked is not None:
        count, why = asked, "as asked"
    else:
        free, whose = free_memory()
        count, most = int(free * KEPT_SHARE) // page_bytes, running * whole
        why = f"half of the {free / 2**30:.1f} GiB that {whose} leaves free"
        if count > most:
            count, why = most, f"all that {running} requests of full length could hold"
    if count < whole:
        must = f"at least {whole}, for one request of {engine.config.max_positions:,} tokens"
        step = "Free memory, give --pages, or shorten --context"
        raise CapacityError(describe("pages", "the server", must, count, step))
    room = count * page_bytes / 2**20
    return Value("pages", count, f"{room:,.0f} MiB of {PAGE_SIZE}-token pages: {why}")


def _step_tokens(engine: StepEngine, asked: int | None) -> Value:
    if asked is not None:
        return Value("step_tokens", min(asked, MAX_STEP_TOKENS), "as asked")
    rate = _tokens_per_s(engine)
    count = int(rate * LONGEST_STEP_S) // _LEAST_STEP_TOKENS * _LEAST_STEP_TOKENS
    count = max(_LEAST_STEP_TOKENS, min(MAX_STEP_TOKENS, count))
    why = f"measured: {rate:,.0f} tokens/s are read here, and a step shall take {LONGEST_STEP_S} s"
    return Value("step_tokens", count, why)


def _tokens_per_s(engine: StepEngine) -> float:
    """Return how fast this machine reads a prompt, by the fastest of a few steps: what else runs at
    the start does not count."""
    table = np.arange(_MEASURED_TOKENS // PAGE_SIZE)[None]
    pages = engine.new_pages(table.size)
    places = np.arange(_MEASURED_TOKENS)
    tokens, rows = places % engine.config.vocab_size, np.zeros(_MEASURED_TOKENS)
    seconds: list[float] = []
    for _ in range(_MEASURED_STEPS):
        start_s = time.perf_counter()
        engine.step(pages, tokens, places, rows, table, [])
        seconds.append(time.perf_counter() - start_s)
    return _MEASURED_TOKENS / min(seconds)


def free_memory(
    info: Path = Path("/proc/meminfo"), root: Path = cgroup.ROOT, own: Path = cgroup.OWN
) -> tuple[int, str]:
    """Return bytes that this process may still take, and who sets that limit.

    Args:
        info: what the system says of its memory.
        root, own: as in `cgroup_memory`.
    """
    free, whose = 2**30, "a machine that does not tell"
    if info.is_file():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        free, whose = int(lines["MemAvailable"].split()[0]) * 1024, "this machine"
    limit = cgroup.cgroup_memory(root, own)
    return (limit[1], "its control group") if limit and limit[1] < free else (free, whose)
