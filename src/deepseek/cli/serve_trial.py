"""The loads that `deepseek bench serve` puts on a server, one after another."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from deepseek.cli.kept import Kept
from deepseek.cli.output import Progress
from deepseek.errors import BackendError, describe
from deepseek.evaluate.resources import EnergyCounters
from deepseek.serve.load import (
    Client,
    Cost,
    Dialogue,
    Load,
    Outcome,
    Run,
    ServerProcess,
    Target,
    Workload,
    error_examples,
    plan_dialogues,
    rates_between,
    run_load,
    summarize_run,
    worst_cases,
)

Point = dict[str, Any]
"""What one load gave, JSON-ready: `load`, `measurements`, `worst`, `errors`."""
Told = Callable[[Outcome], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which loads are put on a server, and what is told of them."""

    workload: Workload
    loads: tuple[Load, ...]
    """Those that are known beforehand; of a sweep its two ends."""
    sweep: int = 0
    """Rates between the two ends."""
    burstiness: float = 1.0
    """Of those rates."""
    objectives: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])
    price_per_kwh: float | None = None


class Trial:
    """Measures the loads of a plan and gathers what each gave in `points`.

    Args:
        plan: what is measured.
        target: the server, with its model's name.
        server: its process, if it was started here.
        kept: what an earlier command measured of the same.
    """

    def __init__(
        self, plan: Plan, target: Target, server: ServerProcess | None, kept: Kept
    ) -> None:
        self.points: list[Point] = []
        self.was_interrupted = False
        self._plan = plan
        self._target = target
        self._server = server
        self._kept = kept

    def run(self, progress: Progress) -> None:
        """Measure every load, until one is interrupted."""
        try:
            for part, load in enumerate(self._loads()):
                step = [part, load.conditions()]
                self.points.append(self._kept.step(step, self._measuring(load, part, progress)))
        except _Interrupted as stop:
            self.was_interrupted = True
            self.points.append(stop.point)
        except KeyboardInterrupt:
            self.was_interrupted = True

    def _loads(self) -> Iterator[Load]:
        plan = self._plan
        yield from plan.loads
        if plan.sweep:
            slowest, fastest = (_answered_per_s(point) for point in self.points)
            yield from rates_between(slowest, fastest, plan.sweep, plan.burstiness)

    def _measuring(self, load: Load, part: int, progress: Progress) -> Callable[[], Point]:
        def measure() -> Point:
            told = _counting(progress, load.name, self._plan.workload.num_dialogues)
            return self._measure(load, part, told)

        return measure

    def _measure(self, load: Load, part: int, told: Told) -> Point:
        workload, server = self._plan.workload, self._server
        dialogues = list(plan_dialogues(workload, part))
        counters = EnergyCounters()
        energy, before_s = counters.read(), server and server.cpu_s()
        run = asyncio.run(_drive(self._target, dialogues, load, workload.seed, told))
        after_s = server and server.cpu_s()
        cost = Cost(
            server_cpu_s=None if after_s is None or before_s is None else after_s - before_s,
            server_peak_rss_bytes=server and server.peak_rss_bytes(),
            energy_j=counters.since(energy),
            price_per_kwh=self._plan.price_per_kwh,
        )
        found = summarize_run(run, self._conditions(), self._plan.objectives, cost)
        point: Point = {
            "load": load.name,
            "measurements": [each.to_dict() for each in found],
            "worst": worst_cases(run),
            "errors": error_examples(run),
        }
        if run.was_interrupted:
            raise _Interrupted(point)
        return point

    def _conditions(self) -> dict[str, Any]:
        workload = self._plan.workload
        about: dict[str, Any] = {
            "model": self._target.model,
            "endpoint": self._target.endpoint,
            "workload": workload.kind,
            "prompt_tokens": workload.prompt_tokens,
            "new_tokens": workload.new_tokens,
            "vary": workload.vary,
            "seed": workload.seed,
        }
        if workload.kind == "shared-prefix":
            about["prefix_tokens"] = workload.prefix_tokens
        if workload.kind == "dialogue":
            about["turns"] = workload.turns
            about["follow_tokens"] = workload.follow_tokens
        if workload.hang_up_share:
            about["hang_up_share"] = workload.hang_up_share
        return about


class _Interrupted(Exception):
    """A load was stopped; what there was of it is not kept."""

    def __init__(self, point: Point) -> None:
        super().__init__()
        self.point = point


def _counting(progress: Progress, name: str, count: int) -> Told:
    """Return what is told of each answer and tells how many there are."""
    ended = 0

    def told(outcome: Outcome) -> None:
        nonlocal ended
        ended += outcome.turn == 0
        progress(f"{name}, {ended} of {count}", min(1.0, ended / count))

    progress(name, 0.0)
    return told


async def _drive(
    target: Target, dialogues: Sequence[Dialogue], load: Load, seed: int, told: Told
) -> Run:
    async with Client(target) as client:
        return await run_load(client, dialogues, load, seed=seed, on_end=told)


def _answered_per_s(point: Point) -> float:
    rates = [each["value"] for each in point["measurements"] if each["name"] == "requests_per_s"]
    return rates[0] if rates else 0.0


def warm_up(target: Target, workload: Workload) -> Target:
    """Return the target with its model's name, after two answers that are not counted.

    Raises:
        BackendError: there was no answer.
    """
    return asyncio.run(_warm_up(target, workload))


async def _warm_up(target: Target, workload: Workload) -> Target:
    if not target.model:
        async with Client(target) as client:
            target = dataclasses.replace(target, model=await client.first_model())
    few = dataclasses.replace(workload, num_dialogues=2, hang_up_share=0.0)
    dialogues = list(plan_dialogues(few, -1))
    run = await _drive(target, dialogues, Load(concurrency=1), 0, lambda outcome: None)
    if run.was_interrupted:
        raise KeyboardInterrupt("interrupted")
    if not any(each.is_answered for each in run.outcomes):
        last = run.outcomes[-1]
        got = f"{last.error}: {last.detail}"
        raise BackendError(describe("URL", "bench serve", "a server that answers", got))
    return target
