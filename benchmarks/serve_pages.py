"""What paging saves of the cache's memory, and what looking up pages costs, without a model.

    python benchmarks/serve_pages.py

Requests with exponential lengths run through the scheduler on the executor without weights,
sixteen at a time; time is virtual. Waste is the share of reserved places that hold no token, the
mean over all steps: of pages, and of slots as long as the context. The scheduler's own processor
time is real: with prompts that are never found again, and with the cache off.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

from deepseek.records import Measurement
from deepseek.serve.core.ledger import waste
from deepseek.serve.core.pages import PagePool
from deepseek.serve.core.request import Request
from deepseek.serve.core.scheduler import Scheduler, SchedulerConfig
from deepseek.serve.generation import GenerationRequest
from deepseek.serve.sim import SimExecutor, VirtualClock

CONTEXT, PAGE_SIZE, NUM_PAGES, USERS = 8192, 64, 4096, 16
LENGTHS = {"chat": (128, 64), "documents": (2000, 200)}
COMMAND = "python benchmarks/serve_pages.py"


def run(prompt: int, new: int, count: int, seed: int, *, caches: bool) -> tuple[list, float, int]:
    """Return the waste of every step, the scheduler's processor seconds, and the steps."""
    rng, clock = random.Random(seed), VirtualClock()
    executor = SimExecutor(
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        max_step_tokens=512,
        context=CONTEXT,
        vocab_size=50_000,
        spend=clock.advance,
        language=lambda tokens: 1,
    )
    config = SchedulerConfig(context=CONTEXT, max_running=USERS, max_waiting=count)
    scheduler = Scheduler(config, PagePool(NUM_PAGES, PAGE_SIZE))
    for number in range(count):
        length = min(CONTEXT // 2, 1 + int(rng.expovariate(1 / prompt)))
        tokens = tuple(rng.randrange(50_000) for _ in range(length))
        most = min(CONTEXT // 2, 1 + int(rng.expovariate(1 / new)))
        request = Request(id=str(number), prompt=tokens, max_tokens=most, reads_cache=caches)
        request.writes_cache = caches
        executor.open(request.id, GenerationRequest(prompt=tokens, max_tokens=most))
        scheduler.add(request, 0.0)
    found, spent_s = [], 0.0
    while not scheduler.is_idle:
        start_s = time.process_time()
        step = scheduler.plan(clock.now_s)
        spent_s += time.process_time() - start_s
        results = executor.execute(step.work)
        chosen = [[choice.token_id for choice in result.tokens] for result in results]
        found.append(waste(scheduler))
        start_s = time.process_time()
        scheduler.commit(step, chosen, [None] * len(chosen), clock.now_s)
        spent_s += time.process_time() - start_s
    return found, spent_s, len(found)


def measure(name: str, count: int, rounds: int) -> list[Measurement]:
    """Return the figures of one kind of request."""
    prompt, new = LENGTHS[name]
    about = {"requests": name, "prompt_tokens": prompt, "new_tokens": new, "users": USERS}
    about |= {"page_tokens": PAGE_SIZE, "context": CONTEXT}
    found, costs = [], {True: [], False: []}
    for seed in range(rounds):
        for caches in (True, False):
            wastes, spent_s, steps = run(prompt, new, count, seed, caches=caches)
            costs[caches].append(spent_s / steps)
        found += wastes
    paged = statistics.fmean(each.share for each in found)
    contiguous = statistics.fmean(each.contiguous_share for each in found)
    figures = {
        "waste_pages": (paged, "1"),
        "waste_contiguous": (contiguous, "1"),
        "waste_saved": (1 - paged / contiguous, "1"),
        "schedule_s_no_hits": (statistics.median(costs[True]), "s/step"),
        "schedule_s_no_cache": (statistics.median(costs[False]), "s/step"),
    }
    return [
        Measurement(name=key, value=value, unit=unit, conditions=about, command=COMMAND)
        for key, (value, unit) in figures.items()
    ]


def main() -> None:
    """Measure, and print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = [each for name in LENGTHS for each in measure(name, options.requests, options.rounds)]
    if options.json:
        print(json.dumps({"measurements": [item.to_dict() for item in found]}, indent=2))
        return
    for item in found:
        print(f"{item.conditions['requests']:10} {item.name:22} {item.value:.4g} {item.unit}")


if __name__ == "__main__":
    main()
