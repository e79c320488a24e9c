"""Puts a load on a server: sends dialogues as they arrive, and gathers what becomes of them."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

from deepseek.serve.load.arrivals import Load, arrival_times
from deepseek.serve.load.client import Client, Message
from deepseek.serve.load.outcome import Outcome
from deepseek.serve.load.workload import Dialogue

CANCEL_S = 5.0
"""Seconds after which a request that was given up is given up again."""


@dataclasses.dataclass(kw_only=True)
class Run:
    """What one load gave."""

    load: Load
    outcomes: list[Outcome] = dataclasses.field(default_factory=list[Outcome])
    """In the order in which they ended."""
    wall_s: float = 0.0
    """From the start to the end of the last answer."""
    client_cpu_s: float = 0.0
    """Processor time of this process meanwhile."""
    was_interrupted: bool = False
    """Whether it was stopped before all were answered; those under way are left out."""


async def run_load(
    client: Client,
    dialogues: Sequence[Dialogue],
    load: Load,
    *,
    seed: int = 0,
    on_end: Callable[[Outcome], None] = lambda outcome: None,
) -> Run:
    """Return what becomes of all dialogues. When it is cancelled it returns what there is.

    Args:
        client: one that is open.
        dialogues: what is asked, in the order in which it comes.
        load: when they come.
        seed: of the times.
        on_end: is told of every request that has ended.
    """
    run = Run(load=load)
    start_s, start_cpu_s = client.clock(), time.process_time()

    def keep(outcome: Outcome) -> None:
        run.outcomes.append(outcome)
        on_end(outcome)

    if load.concurrency is not None:
        waiting = iter(dialogues)
        work = [_user(client, waiting, keep) for _ in range(min(load.concurrency, len(dialogues)))]
    else:
        times = arrival_times(load, len(dialogues), seed)
        work = [
            _arrive(client, dialogue, start_s + after_s, keep)
            for dialogue, after_s in zip(dialogues, times, strict=True)
        ]
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        # not `gather`, whose own cancellation waits for tasks that have lost theirs
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in ended:
            task.result()
    except asyncio.CancelledError:
        run.was_interrupted = True
    finally:
        await _give_up(tasks)
    run.client_cpu_s = time.process_time() - start_cpu_s
    end_s = max((each.ended_s for each in run.outcomes), default=start_s)
    run.wall_s = end_s - start_s
    return run


async def _give_up(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel what has not ended, and again where that was lost on the way: whoever pressed Ctrl-C
    does not wait for a server that hangs."""
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=CANCEL_S)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # told to nobody: the outcomes say what became of each


async def _user(
    client: Client, waiting: Iterator[Dialogue], keep: Callable[[Outcome], None]
) -> None:
    """One user of a closed loop: takes the next dialogue as soon as one has ended."""
    for dialogue in waiting:
        await _talk(client, dialogue, client.clock(), keep)


async def _arrive(
    client: Client, dialogue: Dialogue, planned_s: float, keep: Callable[[Outcome], None]
) -> None:
    """One arrival of an open loop: comes at its time, whatever became of the others."""
    await asyncio.sleep(max(0.0, planned_s - client.clock()))
    await _talk(client, dialogue, planned_s, keep)


async def _talk(
    client: Client, dialogue: Dialogue, planned_s: float, keep: Callable[[Outcome], None]
) -> None:
    """Ask turn after turn, each with the answers before it; stop at a failure."""
    messages: list[Message] = []
    if dialogue.system:
        messages.append({"role": "system", "content": dialogue.system})
    for number, turn in enumerate(dialogue.turns):
        messages.append({"role": "user", "content": turn.text})
        outcome = Outcome(
            dialogue=dialogue.number, turn=number, planned_s=planned_s, sent_s=planned_s
        )
        await client.ask(messages, turn.max_tokens, outcome, turn.hang_up_after)
        keep(outcome)
        if not outcome.is_answered:
            return
        messages.append({"role": "assistant", "content": outcome.text})
        planned_s = client.clock()
