"""What a step holds: budget, turns, preemption, cached prefixes, ends."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.errors import CapacityError, ConfigError, VerifyError
from deepseek.serve.core.pages import PagePool
from deepseek.serve.core.planning import StepPlan
from deepseek.serve.core.request import Phase, Request, Step
from deepseek.serve.core.scheduler import Scheduler, SchedulerConfig
from tests.serve.core.simulation import Simulation


def counts(step: Step) -> dict[str, int]:
    """Return how many tokens each request of a step appends."""
    return {work.request.id: len(work.tokens) for work in step.work}


def text(start: int, length: int) -> list[int]:
    """Return a prompt that no other start has."""
    return list(range(start, start + length))


def test_decoding_prompts_and_newcomers_share_one_step() -> None:
    sim = Simulation(max_step_tokens=10)
    sim.add(text(0, 4), id="a")
    assert counts(sim.step()) == {"a": 4}
    sim.add(text(100, 15), id="b")
    sim.add(text(200, 3), id="c")
    assert counts(sim.step()) == {"a": 1, "b": 9}
    assert counts(sim.step()) == {"a": 1, "b": 6, "c": 3}
    assert counts(sim.step()) == {"a": 1, "b": 1, "c": 1}
    sim.run()
    sim.assert_nothing_held()


@settings(deadline=None)
@given(prompts=st.lists(st.integers(2, 25), min_size=1, max_size=6), budget=st.integers(4, 30))
def test_without_shortage_steps_are_those_of_a_plain_reference(
    prompts: list[int], budget: int
) -> None:
    """One tenant, room for all: a token for each that lacks one, then prompts as they came."""
    sim = Simulation(num_pages=100, max_step_tokens=budget, max_running=4)
    for place, length in enumerate(prompts):
        sim.add(text(1000 * place, length), 5, id=str(place))
    lacking = {str(place): length for place, length in enumerate(prompts)}
    to_choose = dict.fromkeys(lacking, 5)
    while to_choose:
        seats = list(to_choose)[:4]
        expected = {name: 1 for name in seats if lacking[name] == 1}
        for name in seats:
            room = budget - sum(expected.values())
            if lacking[name] > 1 and room > 0:
                expected[name] = min(lacking[name], room)
        assert counts(sim.step()) == expected
        for name, count in expected.items():
            lacking[name] -= count
            if lacking[name] == 0:
                lacking[name] = 1
                to_choose[name] -= 1
        to_choose = {name: count for name, count in to_choose.items() if count}
    assert sim.scheduler.is_idle


def test_second_turn_of_a_dialogue_computes_only_what_is_new() -> None:
    sim = Simulation()
    first = sim.add(text(0, 10), 7)
    sim.run()
    second = sim.add([*first.tokens, 1, 2], 4)
    step = sim.step()
    # of the 17 tokens of the first turn the last was never computed
    assert second.num_cached == 16
    assert counts(step) == {second.id: 3}
    sim.run()
    sim.assert_answered(second)
    assert sim.scheduler.counters.cached_tokens == 16
    assert sim.scheduler.counters.queried_tokens == 10 + 19


def test_request_that_may_not_read_the_cache_computes_all() -> None:
    sim = Simulation()
    sim.add(text(0, 12))
    sim.run()
    audit = sim.add(text(0, 12), reads_cache=False)
    assert counts(sim.step()) == {audit.id: 12}
    sim.run()
    assert audit.num_cached == 0
    assert sim.scheduler.counters.queried_tokens == 12


def test_request_that_may_not_write_the_cache_leaves_nothing() -> None:
    sim = Simulation()
    sim.add(text(0, 12), writes_cache=False)
    sim.run()
    assert sim.pool.num_cached == 0


@pytest.mark.parametrize("other", [{"tenant": "bob"}, {"adapter": "lora"}])
def test_another_tenant_or_adapter_takes_as_long_as_if_nothing_were_cached(
    other: dict[str, str],
) -> None:
    """Attack 22: the time to the first token tells nothing of what others have asked."""
    sim = Simulation()
    sim.add(text(0, 20), tenant="ann")
    sim.run()
    start_s = sim.clock.now_s
    sim.add(text(0, 20), 1, **{"tenant": "ann", **other})
    sim.run()
    known_s, start_s = sim.clock.now_s - start_s, sim.clock.now_s
    sim.add(text(500, 20), 1, **{"tenant": "ann", **other})
    sim.run()
    assert known_s == pytest.approx(sim.clock.now_s - start_s)


def test_several_answers_to_one_prompt_compute_it_once() -> None:
    """n > 1, and bursts with a shared system prompt."""
    sim = Simulation(num_pages=40, max_step_tokens=8, max_running=4)
    group = [sim.add(text(0, 21), 6) for _ in range(4)]
    sim.run()
    assert [request.num_cached for request in group] == [0, 20, 20, 20]
    computed = sum(step.num_tokens for step in sim.steps)
    assert computed == 21 + 3 * 1 + 4 * 5
    for request in group:
        sim.assert_answered(request)


def test_prefix_is_no_longer_waited_for_when_its_writer_goes() -> None:
    sim = Simulation(max_step_tokens=4)
    first = sim.add(text(0, 20))
    second = sim.add(text(0, 20))
    sim.step()
    assert second.phase is Phase.WAITING
    sim.scheduler.cancel(first.id)
    assert counts(sim.step()) == {second.id: 4}
    assert second.num_cached == 4
    sim.run()
    sim.assert_nothing_held()


def test_nobody_waits_for_the_prefix_of_a_worse_priority() -> None:
    sim = Simulation(max_step_tokens=8)
    sim.add(text(0, 20), priority=5, id="batch")
    sim.step()
    sim.add(text(0, 20), id="person")
    assert counts(sim.step()) == {"person": 8}


def test_those_who_wait_for_a_prefix_do_not_block_others() -> None:
    sim = Simulation(max_step_tokens=12, max_running=4, copies=False)
    sim.add(text(0, 8), id="a")
    sim.add(text(0, 8), id="b")
    sim.add(text(50, 2), id="c")
    assert counts(sim.step()) == {"a": 8, "c": 2}
    assert counts(sim.step()) == {"a": 1, "b": 4, "c": 1}


def test_a_text_that_leaves_another_within_a_page_begins_with_a_copy() -> None:
    sim = Simulation(max_step_tokens=20)
    first = sim.add(text(0, 9), 1)
    sim.run()
    other = sim.add([*text(0, 7), 90, 91, 92], 4)
    step = sim.step()
    assert counts(step) == {"r1": 3}
    ((target, source),) = step.copies
    assert target == other.pages[1] != source
    assert sim.pool.num_users(source) == 0
    assert other.num_cached == sim.scheduler.counters.cached_tokens == 7
    sim.run()
    for request in (first, other):
        sim.assert_answered(request)
    sim.assert_nothing_held()


def test_a_page_that_is_needed_may_be_its_own_copy_or_anothers() -> None:
    """Sources are handed out in the very step that copies them: the last one to itself."""
    sim = Simulation(num_pages=5, page_size=4, context=13, max_running=3, max_step_tokens=20)
    old = [sim.add([place, *text(0, 3), 7, place], 1) for place in range(3)]
    sim.run()
    assert sim.pool.num_cached == 3
    new = [sim.add([place, *text(0, 2), 30 + place, 7], 1) for place in (0, 2, 1)]
    sim.run()
    copies = [copy for step in sim.steps for copy in step.copies]
    assert copies
    for request in (*old, *new):
        sim.assert_answered(request)
    sim.assert_nothing_held()


def test_one_who_is_turned_back_in_the_step_that_took_him_in_copies_nothing() -> None:
    sim = Simulation(max_step_tokens=16)
    sim.add(text(0, 5), 1)
    sim.run()
    request = sim.add([*text(0, 3), 50, 51], 1)
    entry = sim.scheduler._entries[request.id]
    plan = StepPlan(sim.scheduler._roster, 16, 2, 0.0)
    assert plan._admit(entry, [])
    assert len(plan.copies()) == 1
    plan._preempt(entry)
    assert (plan.copies(), plan.work()) == ((), {})


def test_one_who_reads_no_cache_copies_nothing() -> None:
    sim = Simulation(max_step_tokens=20)
    sim.add(text(0, 9), 1)
    sim.run()
    sim.add([*text(0, 7), 90, 91], 1, reads_cache=False, id="audit")
    step = sim.step()
    assert counts(step) == {"audit": 9}
    assert step.copies == ()


def test_latest_arrival_is_turned_back_when_pages_are_short() -> None:
    sim = Simulation(num_pages=6, page_size=4, context=24, max_running=3)
    first = sim.add(text(0, 7), 16)
    sim.clock.advance(0.001)
    second = sim.add(text(100, 7), 16)
    sim.run()
    assert (first.num_preempted, second.num_preempted > 0) == (0, True)
    for request in (first, second):
        sim.assert_answered(request)
    sim.assert_nothing_held()
    assert sim.scheduler.counters.preemptions == second.num_preempted


def test_nobody_is_admitted_in_place_of_a_better_one_that_was_turned_back() -> None:
    sim = Simulation(num_pages=12, page_size=4)
    first = sim.add(text(0, 14), 20)
    sim.add(text(900, 10), 1, tenant="served more")
    sim.step()
    sim.step()
    second = sim.add(text(100, 14), 20, tenant="served more")
    while sim.pool.num_free or first.num_computed < 4 * len(first.pages):
        sim.step()
    other = sim.add([1], 1, tenant="other")
    sim.step()
    assert second.num_preempted == 1
    assert other.phase is Phase.WAITING
    sim.step()
    assert other.phase is Phase.FINISHED


def test_cached_pages_that_come_back_into_use_are_not_free() -> None:
    sim = Simulation(num_pages=6, page_size=4, context=24)
    sim.add(text(0, 20), 1)
    sim.run()
    assert sim.pool.num_cached == 5
    sim.add([50], 2)
    sim.step()
    again = sim.add(text(0, 21), 1)
    sim.step()
    assert again.phase is Phase.WAITING
    sim.step()
    assert again.num_cached == 20


def test_coming_back_is_mostly_a_hit() -> None:
    sim = Simulation(num_pages=12, page_size=2, context=24, max_running=2)
    batch = sim.add(text(0, 9), 10, priority=5)
    for _ in range(4):
        sim.step()
    person = sim.add(text(100, 12), 1)
    while not batch.num_preempted:
        sim.step()
    before = batch.tokens.copy()
    while batch.phase is Phase.WAITING:
        sim.step()
    again = next(work for work in sim.steps[-1].work if work.request is batch)
    assert person.finish_reason == "length"
    assert again.start >= 6
    assert batch.tokens[: len(before)] == before
    assert batch.num_cached == 0, "it counts what earlier requests had left"
    sim.run()
    sim.assert_answered(batch)


def test_people_are_not_blocked_by_batch_work() -> None:
    sim = Simulation(num_pages=40, max_running=3)
    batch = [sim.add(text(100 * place, 8), 30, priority=10) for place in range(10)]
    sim.step()
    sim.step()
    person = sim.add(text(5000, 8), 3)
    assert person.id in counts(sim.step())
    assert sum(request.num_preempted for request in batch) == 1
    assert batch[2].num_preempted == 1
    sim.run()
    for request in batch:
        sim.assert_answered(request)


def test_tokens_of_whom_is_turned_back_are_given_to_others() -> None:
    sim = Simulation(num_pages=40, max_running=3, max_step_tokens=4)
    for place in range(3):
        sim.add([place], 9, priority=10, id=f"batch{place}")
    sim.step()
    sim.add(text(100, 8), id="person")
    assert counts(sim.step()) == {"person": 2, "batch0": 1, "batch1": 1}


def test_long_prompts_of_batch_work_do_not_hold_up_people() -> None:
    sim = Simulation(num_pages=40, max_step_tokens=8)
    sim.add(text(0, 30), priority=10, tenant="served little")
    sim.step()
    before = sim.add(text(500, 39), 1, tenant="served much")
    while before.phase is not Phase.FINISHED:
        sim.step()
    person = sim.add(text(100, 8), tenant="served much")
    assert counts(sim.step()) == {person.id: 8}


def test_equal_priority_turns_nobody_back_for_a_place() -> None:
    sim = Simulation(max_running=1)
    first = sim.add(text(0, 4), 8)
    sim.step()
    second = sim.add(text(50, 4), 8)
    sim.run()
    assert first.num_preempted == second.num_preempted == 0


def test_flooding_tenant_does_not_hold_up_a_small_one() -> None:
    """Attack 23: the small tenant is next after whoever leaves, though 200 came before it."""
    sim = Simulation(num_pages=100, max_running=4, max_waiting=300, is_checked=False)
    flood = [sim.add(text(100 * place, 8), 8, tenant="flood") for place in range(200)]
    for _ in range(20):
        sim.step()
    small = sim.add(text(90_000, 8), 8, tenant="small")
    num_steps = 0
    while small.phase is not Phase.FINISHED:
        sim.step()
        num_steps += 1
    assert num_steps <= 8 + 8 + 2
    assert sum(request.phase is Phase.FINISHED for request in flood) < 30


def test_small_tenant_gets_on_though_a_flood_leaves_no_pages() -> None:
    """The latest to come is turned back first, but by those that ran before it only."""
    sim = Simulation(num_pages=20, max_running=8, max_waiting=300, context=40)
    for place in range(60):
        sim.add(text(100 * place, 8), 24, tenant="flood")
    for _ in range(30):
        sim.step()
    assert sim.scheduler.counters.preemptions > 0
    small = sim.add(text(90_000, 8), 24, tenant="small")
    num_steps = 0
    while small.phase is not Phase.FINISHED:
        sim.step()
        num_steps += 1
    assert num_steps <= 3 * 24
    sim.assert_answered(small)


@pytest.mark.parametrize(("long", "short"), [((20, 16), (4, 3)), ((30, 1), (3, 1))])
def test_two_busy_tenants_get_equal_tokens(long: tuple[int, int], short: tuple[int, int]) -> None:
    """However long the prompts and answers of each."""
    sim = Simulation(num_pages=200, max_running=4, max_waiting=300, is_checked=False)
    requests = []
    for place in range(150):
        requests.append(sim.add(text(100 * place, long[0]), long[1], tenant="long"))
        requests.append(sim.add(text(50_000 + 100 * place, short[0]), short[1], tenant="short"))
    while sum(request.tenant == "short" for request in sim.scheduler.waiting) > 20:
        sim.step()
    served = {"long": 0, "short": 0}
    for request in requests:
        if request.phase is Phase.FINISHED:
            served[request.tenant] += len(request.tokens)
    assert 0.8 < served["long"] / served["short"] < 1.25


def test_rest_gives_no_claim() -> None:
    """A tenant that comes late does not push others aside for as long as they were alone."""
    sim = Simulation(num_pages=100, max_running=2, max_waiting=300, is_checked=False)
    for place in range(60):
        sim.add(text(100 * place, 4), 4, tenant="early")
    while sum(r.tenant == "early" for r in sim.scheduler.waiting) > 20:
        sim.step()
    for place in range(60):
        sim.add(text(20_000 + 100 * place, 4), 4, tenant="late")
    served = {"early": 0, "late": 0}
    for _ in range(40):
        for work in sim.step().work:
            served[work.request.tenant] += len(work.tokens)
    assert 0.7 < served["late"] / served["early"] < 1.4


def test_cancelled_between_plan_and_commit_leaves_nothing() -> None:
    sim = Simulation()
    gone, stays = sim.add(text(0, 6)), sim.add(text(50, 6))
    sim.step()
    step = sim.plan()
    tokens = gone.tokens.copy()
    assert sim.scheduler.cancel(gone.id)
    assert gone.pages, "the step still writes to them"
    assert not sim.scheduler.cancel(gone.id)
    assert gone not in sim.commit(step)
    assert (gone.tokens, gone.pages, gone.finish_reason) == (tokens, [], "cancelled")
    assert sim.step().dropped == (gone,)
    sim.run()
    sim.assert_answered(stays)
    sim.assert_nothing_held()


def test_cancelled_while_waiting_and_running() -> None:
    sim = Simulation(max_running=1)
    running, waiting = sim.add(text(0, 6)), sim.add(text(50, 6))
    sim.step()
    assert sim.scheduler.cancel(waiting.id)
    assert sim.scheduler.cancel(running.id)
    step = sim.plan()
    assert set(step.dropped) == {running, waiting}
    assert step.work == ()
    assert sim.scheduler.is_idle
    sim.assert_nothing_held()


def test_an_id_can_be_used_again_when_its_request_is_gone() -> None:
    sim = Simulation()
    sim.add(text(0, 6), id="x")
    with pytest.raises(ConfigError, match="no other request"):
        sim.add(text(0, 6), id="x")
    sim.run()
    sim.add(text(0, 6), id="x")
    sim.run()


@pytest.mark.parametrize("reason", ["error", "repetition"])
def test_pages_of_a_bad_request_are_not_found(reason: str) -> None:
    """Attacks 25 and 26: they never enter the cache, nor does what others computed behind them."""
    sim = Simulation()
    bad = sim.add(text(0, 12), 9)
    sim.step()
    sim.step()
    behind = sim.add(text(0, 16), 9)
    sim.step()
    assert behind.num_cached == 12
    end = {bad.id: reason}
    sim.step(lambda request, tokens: end.get(request.id))  # pyright: ignore[reportArgumentType]
    assert bad.finish_reason == reason
    sim.run()
    again = sim.add(text(0, 16), 1)
    sim.run()
    assert again.num_cached == 0


def test_distrust_while_waiting() -> None:
    sim = Simulation()
    bad = sim.add(text(0, 12), 9)
    sim.scheduler.distrust(bad.id)
    sim.run()
    assert sim.pool.num_cached == 0


def test_distrust_while_running() -> None:
    sim = Simulation()
    bad = sim.add(text(0, 12), 9)
    sim.step()
    sim.scheduler.distrust(bad.id)
    sim.scheduler.distrust("unknown")
    sim.run()
    assert sim.pool.num_cached == 0


def test_answers_end_at_the_context() -> None:
    sim = Simulation(context=20)
    request = sim.add(text(0, 15), 100)
    sim.run()
    assert request.finish_reason == "length"
    assert len(request.tokens) == 20


def test_end_of_the_engine_goes_before_length() -> None:
    sim = Simulation()
    request = sim.add(text(0, 4), 1)
    finished = sim.commit(sim.plan(), lambda request, tokens: "stop")
    assert finished == (request,)
    assert request.finish_reason == "stop"


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "error"),
    [((), 4, ConfigError), ((1,), 0, ConfigError), (tuple(range(40)), 4, CapacityError)],
)
def test_request_that_cannot_run_is_refused(
    prompt: tuple[int, ...], max_tokens: int, error: type[Exception]
) -> None:
    """Attacks 10 and 27."""
    sim = Simulation()
    with pytest.raises(error):
        sim.add(prompt, max_tokens)
    assert sim.scheduler.is_idle


@pytest.mark.parametrize(
    "limits",
    [
        {"context": 1},
        {"context": 8, "max_running": 0},
        {"context": 8, "max_running": 4, "max_step_tokens": 3},
        {"context": 8, "max_waiting": 0},
        {"context": 8, "max_drafts": -1},
    ],
)
def test_limits_that_make_no_sense_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        SchedulerConfig(**limits)


def test_pool_must_hold_one_text() -> None:
    Scheduler(SchedulerConfig(context=17), PagePool(4, 4))
    with pytest.raises(ConfigError, match="17, one more"):
        Scheduler(SchedulerConfig(context=18), PagePool(4, 4))


def test_commit_must_fit_the_step() -> None:
    sim = Simulation()
    sim.add(text(0, 4))
    step = sim.plan()
    with pytest.raises(VerifyError, match="before the one under way"):
        sim.scheduler.plan(0.0)
    for chosen, finish in [([], []), ([[]], [None]), ([[1, 2]], [None])]:
        with pytest.raises(VerifyError):
            sim.scheduler.commit(step, chosen, finish, 0.0)
    with pytest.raises(VerifyError, match="not the one under way"):
        sim.scheduler.commit(Step(step.work), [[1]], [None], 0.0)
    sim.scheduler.commit(step, [[1]], [None], 0.0)
    with pytest.raises(VerifyError, match="not the one under way"):
        sim.scheduler.commit(step, [[1]], [None], 0.0)


def test_step_without_work_needs_no_commit() -> None:
    sim = Simulation()
    assert sim.scheduler.commit(sim.scheduler.plan(0.0), [], [], 0.0) == ()
    assert sim.scheduler.plan(0.0).work == ()


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 15), max_tokens=st.integers(1, 30), page_size=st.sampled_from([1, 2, 4])
)
def test_one_request_that_fits_always_finishes(
    length: int, max_tokens: int, page_size: int
) -> None:
    """On a pool that holds just one text of the context's length, beside seven others."""
    sim = Simulation(num_pages=16 // page_size, page_size=page_size, context=17, max_running=8)
    requests = [sim.add(text(100 * place, length), max_tokens) for place in range(8)]
    sim.run(most_steps=8 * 40)
    sim.assert_nothing_held()
    for request in requests:
        assert request.finish_reason == "length"
        sim.assert_answered(request)
    assert requests[0].num_preempted == 0


def test_request_finished_elsewhere_is_refused() -> None:
    request = Request(id="x", prompt=(1,), max_tokens=1)
    request.phase = Phase.FINISHED
    with pytest.raises(ConfigError):
        Simulation().scheduler.add(request, 0.0)
