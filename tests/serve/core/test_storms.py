"""200 users who come, go, and hang up by the dozen: nothing is lost, nothing grows."""

from __future__ import annotations

import gc
import random
import tracemalloc

import pytest

from deepseek.serve.core import ledger
from deepseek.serve.core.drafting import PromptLookup
from deepseek.serve.core.errors import DeadlineError, QueueFull
from deepseek.serve.core.request import Request
from tests.serve.core.simulation import Simulation

NUM_USERS = 200


class Users:
    """Each asks, reads, thinks, goes on with the dialogue; a storm cuts many off at once."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.sim = Simulation(
            num_pages=400,
            page_size=16,
            context=400,
            max_running=16,
            max_step_tokens=128,
            max_waiting=150,
            drafter=PromptLookup(),
            is_checked=False,
        )
        self.asking: dict[int, Request] = {}
        self.texts: dict[int, list[int]] = {}
        self.wakes_at: dict[int, float] = {
            user: self.rng.uniform(0, 10) for user in range(NUM_USERS)
        }
        self.num_refused = self.num_done = self.num_cut = 0

    def live(self, until_s: float, check_every: int) -> None:
        """Serve until a time; look at every invariant now and then."""
        sim, num_steps = self.sim, 0
        next_storm_s = sim.clock.now_s + 7
        while sim.clock.now_s < until_s:
            self.ask()
            if sim.clock.now_s > next_storm_s:
                next_storm_s += 7
                self.hang_up(self.rng.sample(sorted(self.asking), len(self.asking) * 2 // 3))
            step = sim.plan()
            if self.rng.random() < 0.02:
                self.hang_up(self.rng.sample(sorted(self.asking), min(3, len(self.asking))))
            sim.commit(step)
            if not step.work:
                sim.clock.advance(0.05)
            self.read()
            num_steps += 1
            if num_steps % check_every == 0:
                ledger.check(sim.scheduler)

    def ask(self) -> None:
        """Let those whose time has come ask, most of them about what they were told."""
        now_s = self.sim.clock.now_s
        for user in [user for user, wakes_s in self.wakes_at.items() if wakes_s <= now_s]:
            text = self.texts.get(user, [])
            if len(text) > 250 or not text:
                text = [7] * 40 + [self.rng.randrange(50) for _ in range(5)]
            prompt = text + [self.rng.randrange(50) for _ in range(self.rng.randrange(1, 40))]
            deadline_s = now_s + 60 if self.rng.random() < 0.2 else None
            try:
                self.asking[user] = self.sim.add(
                    prompt,
                    self.rng.randrange(1, 60),
                    tenant=f"team{user % 7}",
                    priority=int(user % 10 == 0),
                    deadline_s=deadline_s,
                )
                del self.wakes_at[user]
            except (QueueFull, DeadlineError):
                self.num_refused += 1
                self.wakes_at[user] = now_s + self.rng.uniform(1, 5)

    def hang_up(self, users: list[int]) -> None:
        """Let users go away in the middle."""
        for user in users:
            assert self.sim.scheduler.cancel(self.asking[user].id)
            self.num_cut += 1
            del self.asking[user]
            self.wakes_at[user] = self.sim.clock.now_s + self.rng.uniform(0, 5)

    def read(self) -> None:
        """Let those who have their answer think of the next question."""
        for user, request in list(self.asking.items()):
            if request.finish_reason is None:
                continue
            if self.num_done % 50 == 0:
                self.sim.assert_answered(request)
            self.texts[user] = request.tokens
            self.num_done += 1
            del self.asking[user]
            self.wakes_at[user] = self.sim.clock.now_s + self.rng.uniform(0, 8)

    def finish(self) -> None:
        """Serve what is left, and check that no trace of anybody is left."""
        self.sim.run(most_steps=100_000)
        self.sim.assert_nothing_held()
        roster = self.sim.scheduler._roster
        assert len(roster.computing) == 0
        assert len(self.sim.scheduler._control) == 0
        assert sum(1 for _ in roster.waiting) == 0
        assert not roster.share._num_requests
        assert not roster.share._served
        assert not self.sim.scheduler._entries


def test_storms_for_a_virtual_minute() -> None:
    users = Users(seed=1)
    users.live(30, check_every=50)
    assert users.num_done > 200
    assert users.num_cut > 100
    assert users.sim.scheduler.counters.cached_tokens > 1000
    users.finish()


@pytest.mark.slow
def test_storms_for_ten_virtual_minutes_with_flat_memory() -> None:
    users = Users(seed=2)
    users.live(120, check_every=200)
    tracemalloc.start()
    sizes = []
    for minute in range(8):
        users.live(120 + 60 * (minute + 1), check_every=200)
        gc.collect()
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert users.num_done > 2500
    assert users.num_cut > 1000
    # what was there before the tracing began is replaced within the first minutes
    assert max(sizes[4:]) < 1.1 * max(sizes[2:4])
    users.finish()
