"""The engine's own numbers, step by step: what runs and waits, pages, cache, guesses, cost."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from deepseek.evaluate.resources import POWERCAP, EnergyCounters
from deepseek.serve.api.metrics import Metrics
from deepseek.serve.audit import AuditResult
from deepseek.serve.core.ledger import waste
from deepseek.serve.core.request import Phase, Request, Step
from deepseek.serve.core.scheduler import Scheduler

SELDOM_S = 1.0
"""Between two looks at what is dear to find out."""
_COUNTED: Mapping[str, str] = {
    "queried_tokens": "vllm:prefix_cache_queries",
    "cached_tokens": "vllm:prefix_cache_hits",
    "preemptions": "vllm:num_preemptions",
    "drafted_tokens": "vllm:spec_decode_num_draft_tokens",
    "accepted_tokens": "vllm:spec_decode_num_accepted_tokens",
}


@dataclasses.dataclass
class _Spent:
    """What a request has cost so far."""

    compute_s: float = 0.0
    first_token_s: float | None = None


class Telemetry:
    """Feeds the metrics of a server from its engine's thread.

    A step's seconds are shared out among its requests by their tokens: what one costs is its share
    of the machine, whoever ran beside it.

    Args:
        metrics: gets the numbers.
        scheduler: that the steps are of.
        price_per_hour: of the machine, in any currency; None where cost is not counted.
        clock: seconds, as the scheduler's.
        powercap: folder of the energy counters.
    """

    def __init__(
        self,
        metrics: Metrics,
        scheduler: Scheduler,
        *,
        price_per_hour: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        powercap: Path = POWERCAP,
    ) -> None:
        self._metrics, self._scheduler, self._clock = metrics, scheduler, clock
        self._price_per_s = None if price_per_hour is None else price_per_hour / 3600
        self._before = dict.fromkeys(_COUNTED, 0)
        self._spent: dict[str, _Spent] = {}
        self._energy = EnergyCounters(powercap)
        self._energy_read = self._energy.read()
        self._seldom_at_s = clock()

    def on_step(self, step: Step, seconds: float) -> None:
        """Take one step that took so many seconds and is committed."""
        now_s, observe = self._clock(), self._metrics.observe
        observe("vllm:iteration_tokens_total", step.num_tokens)
        observe("vllm:num_requests_waiting", self._scheduler.num_waiting)
        pool = self._scheduler.pool
        observe("vllm:kv_cache_usage_perc", 1 - pool.num_free / pool.num_pages)
        observe("vllm:spec_decode_num_drafts", sum(work.num_drafts > 0 for work in step.work))
        for field, name in _COUNTED.items():
            count = getattr(self._scheduler.counters, field)
            observe(name, count - self._before[field])
            self._before[field] = count
        for work in step.work:
            share_s = seconds * len(work.tokens) / step.num_tokens
            self._charge(work.request, share_s, now_s)
        for request in step.dropped:
            self._spent.pop(request.id, None)
        if now_s - self._seldom_at_s >= SELDOM_S:
            self._seldom_at_s = now_s
            self._look_around()

    def on_audit(self, result: AuditResult) -> None:
        """Take what an answer's second reading gave."""
        self._metrics.observe("deepseek:audit_kl", result.kl)
        self._metrics.observe("deepseek:audit_tokens", result.num_tokens)
        agreeing = round(result.agreement * result.num_tokens)
        self._metrics.observe("deepseek:audit_tokens_agreeing", agreeing)

    def _charge(self, request: Request, share_s: float, now_s: float) -> None:
        spent = self._spent.setdefault(request.id, _Spent())
        spent.compute_s += share_s
        if request.num_chosen and spent.first_token_s is None:
            spent.first_token_s = now_s
        if request.phase is Phase.FINISHED:
            self._finish(request, self._spent.pop(request.id), now_s)

    def _finish(self, request: Request, spent: _Spent, now_s: float) -> None:
        observe = self._metrics.observe
        observe("deepseek:request_compute_seconds", spent.compute_s)
        if self._price_per_s is not None:
            observe("deepseek:request_cost", spent.compute_s * self._price_per_s)
        if request.first_run_s is None:
            return
        observe("vllm:request_queue_time_seconds", request.first_run_s - request.arrival_s)
        observe("vllm:request_inference_time_seconds", now_s - request.first_run_s)
        if spent.first_token_s is not None:
            observe("vllm:request_prefill_time_seconds", spent.first_token_s - request.first_run_s)

    def _look_around(self) -> None:
        """Count what is dear to find out."""
        self._metrics.observe("deepseek:kv_waste", waste(self._scheduler).share)
        used_j = self._energy.since(self._energy_read)
        if used_j is not None:
            self._energy_read = self._energy.read()
            self._metrics.observe("deepseek:energy_joules", used_j)
