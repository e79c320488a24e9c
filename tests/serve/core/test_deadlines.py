"""Deadlines, the queue's limit, and when to come back."""

from __future__ import annotations

import pytest

from deepseek.serve.core.errors import DeadlineError, QueueFull
from deepseek.serve.generation import QueueFull as QueueFullOfTheSeam
from tests.serve.core.simulation import Simulation

BASE_S, TOKEN_S = 0.004, 0.001


def text(start: int, length: int) -> list[int]:
    """Return a prompt that no other start has."""
    return list(range(start, start + length))


def taught() -> Simulation:
    """Return a simulation that has seen what steps cost and how long answers are: ten tokens."""
    sim = Simulation()
    for place in range(4):
        sim.add(text(100 * place, 20), 10, tenant="teacher")
    sim.run()
    return sim


def test_costs_are_learned_from_the_steps() -> None:
    cost = taught().scheduler.cost
    assert cost.base_s == pytest.approx(BASE_S, rel=0.05)
    assert cost.token_s == pytest.approx(TOKEN_S, rel=0.05)


def test_deadline_that_cannot_be_met_is_refused() -> None:
    sim = taught()
    now_s = sim.clock.now_s
    # 20 tokens in two steps, then nine steps of one token
    needed_s = 2 * BASE_S + 20 * TOKEN_S + 9 * (BASE_S + TOKEN_S)
    with pytest.raises(DeadlineError, match="time left"):
        sim.add(text(900, 20), 10, deadline_s=now_s + 0.9 * needed_s)
    assert sim.scheduler.is_idle
    request = sim.add(text(900, 20), 10, deadline_s=now_s + 1.1 * needed_s)
    sim.run()
    assert request.finish_reason == "length"


def test_cached_prompt_meets_a_shorter_deadline() -> None:
    sim = taught()
    prompt = sim.add(text(0, 20), 1, tenant="ann").prompt
    sim.run()
    deadline_s = sim.clock.now_s + 0.012
    with pytest.raises(DeadlineError):
        sim.add(text(900, 20), 1, tenant="ann", deadline_s=deadline_s)
    request = sim.add(prompt, 1, tenant="ann", deadline_s=deadline_s)
    sim.run()
    assert request.finish_reason == "length"


def test_queue_counts_into_the_time_that_is_needed() -> None:
    sim = taught()
    wait_s = 0.15
    sim.add(text(900, 20), 10, deadline_s=sim.clock.now_s + wait_s)
    for place in range(12):
        sim.add(text(2000 + 100 * place, 20), 10)
    with pytest.raises(DeadlineError):
        sim.add(text(900, 20), 10, deadline_s=sim.clock.now_s + wait_s)
    first_in_line = sim.add(text(900, 20), 10, priority=-1, deadline_s=sim.clock.now_s + wait_s)
    sim.run()
    assert first_in_line.finish_reason == "length"


def test_deadline_that_has_passed_is_refused_even_before_anything_is_known() -> None:
    sim = Simulation()
    with pytest.raises(DeadlineError):
        sim.add(text(0, 4), deadline_s=0.0)


def test_nothing_is_refused_on_a_guess() -> None:
    """While costs are unknown, only the passing of time decides."""
    sim = Simulation()
    sim.add(text(0, 20), 10, deadline_s=0.001)


def test_running_and_waiting_requests_are_dropped_when_it_is_too_late() -> None:
    sim = Simulation(max_running=1)
    running = sim.add(text(0, 4), 20, deadline_s=0.05)
    waiting = sim.add(text(50, 4), 20, deadline_s=0.03)
    later = sim.add(text(90, 4), 3, deadline_s=9.0)
    dropped = []
    while not sim.scheduler.is_idle:
        start_s = sim.clock.now_s
        for request in sim.step().dropped:
            assert request.deadline_s is not None and request.deadline_s <= start_s
            dropped.append(request)
    assert dropped == [waiting, running]
    assert running.finish_reason == waiting.finish_reason == "deadline"
    assert 0 < running.num_chosen < 20
    assert later.finish_reason == "length"
    sim.assert_nothing_held()


def test_full_queue_says_when_to_come_back() -> None:
    sim = taught()
    for place in range(256):
        sim.add(text(1000 * place, 4), 10)
    with pytest.raises(QueueFull, match="at most 256") as caught:
        sim.add(text(0, 4))
    assert caught.type is QueueFullOfTheSeam
    # the four that run first finish in about 0.1 s; 64 such rounds are ahead
    assert 2 < caught.value.retry_after_s < 20
    start_s = sim.clock.now_s
    while sim.scheduler.num_waiting:
        sim.step()
    assert caught.value.retry_after_s == pytest.approx(sim.clock.now_s - start_s, rel=0.5)


def test_batch_work_in_the_queue_does_not_shut_people_out() -> None:
    sim = Simulation(max_waiting=8)
    for place in range(8):
        sim.add(text(100 * place, 4), priority=10)
    with pytest.raises(QueueFull):
        sim.add(text(0, 4), priority=10)
    sim.add(text(0, 4), priority=0)


def test_one_tenant_cannot_fill_the_queue_for_others() -> None:
    sim = Simulation(max_waiting=8)
    for place in range(8):
        sim.add(text(100 * place, 4), tenant="flood")
    with pytest.raises(QueueFull):
        sim.add(text(0, 4), tenant="flood")
    for place in range(4):
        sim.add(text(100 * place, 4), tenant="small")
    with pytest.raises(QueueFull):
        sim.add(text(0, 4), tenant="small")


def test_wait_is_nothing_while_there_are_places() -> None:
    sim = Simulation(max_running=2)
    assert sim.scheduler.expected_wait_s() == 0
    sim.add(text(0, 4))
    sim.step()
    assert sim.scheduler.expected_wait_s() == 0
    sim.add(text(50, 4))
    sim.step()
    assert sim.scheduler.expected_wait_s() > 0
    assert sim.scheduler.expected_wait_s(priority=-1) == 0
