"""How long a request will take, and how long until it begins: from what others took."""

from __future__ import annotations

import math

from deepseek.serve.core.cost import Average, CostModel
from deepseek.serve.core.policy import Entry
from deepseek.serve.core.request import FinishReason, Request
from deepseek.serve.core.roster import Roster

FIRST_SERVICE_S = 1.0
"""What a request is taken to need before the first one has finished."""


class Forecast:
    """Expected times in seconds, by the cost of steps and by how earlier requests went."""

    def __init__(self, roster: Roster, max_running: int, max_step_tokens: int) -> None:
        """Forecast for steps of at most so many requests and tokens."""
        self.cost = CostModel()
        self._roster = roster
        self._max_running = max_running
        self._max_step_tokens = max_step_tokens
        self._answer_tokens = Average(0.1)
        self._service_s = Average(0.1)

    def learn(self, request: Request, reason: FinishReason, now_s: float) -> None:
        """Learn from a request that ends how long answers are, and how long one keeps its place."""
        if reason in ("stop", "length", "deadline") and request.num_chosen:
            self._answer_tokens.observe(request.num_chosen)
        if request.first_run_s is not None:
            self._service_s.observe(now_s - request.first_run_s)

    def wait_s(self, priority: int) -> float:
        """Return the seconds until a request that comes now would be begun."""
        ahead = self._roster.waiting.num_ahead(priority)
        busy = sum(entry.request.priority <= priority for entry in self._roster.running)
        if ahead == 0 and busy < self._max_running:
            return 0.0
        num_ends = max(ahead + busy + 1 - self._max_running, 1)
        return num_ends / self._max_running * (self._service_s.value or FIRST_SERVICE_S)

    def answer_s(self, entry: Entry) -> float:
        """Return the seconds until a new request has its answer; 0 while nothing is known.

        Answers are taken to be as long as answers usually are; before the first one has ended, one
        token long, so that nothing is refused on a guess.
        """
        if not self.cost.is_ready:
            return 0.0
        request, pool = entry.request, self._roster.pool
        found = pool.match(entry.chain, request.prompt) if request.reads_cache else []
        num_new = len(request.prompt) - len(found) * pool.page_size
        prompt_s = self.cost.seconds(num_new, math.ceil(num_new / self._max_step_tokens))
        num_steps = min(self._answer_tokens.value or 1.0, request.max_tokens) - 1
        num_rows = min(len(self._roster.running) + 1, self._max_running)
        decode_s = num_steps * self.cost.seconds(num_rows)
        return self.wait_s(request.priority) + prompt_s + decode_s
