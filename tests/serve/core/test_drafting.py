"""Guesses from the text itself, and how many are worth checking."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.errors import ConfigError
from deepseek.serve.core.cost import CostModel
from deepseek.serve.core.drafting import MOST_PLACES, DraftControl, PromptLookup
from deepseek.serve.core.request import Request
from tests.serve.core.simulation import Simulation


def request_of(tokens: Sequence[int], name: str = "r") -> Request:
    """Return a request whose text so far is `tokens`."""
    return Request(id=name, prompt=tuple(tokens), max_tokens=10)


def best_guess(tokens: list[int], max_ngram: int, min_ngram: int, most: int) -> list[int]:
    """Return the guess by a search through the whole text."""
    key = tokens[-min_ngram:]
    places = [
        place
        for place in range(min_ngram, len(tokens))
        if len(key) == min_ngram and tokens[place - min_ngram : place] == key
    ]

    def length(place: int) -> int:
        count = 0
        while count < min(max_ngram, place) and tokens[place - 1 - count] == tokens[-1 - count]:
            count += 1
        return count

    if not places:
        return []
    best = max(places[-MOST_PLACES:], key=lambda place: (length(place), place))
    text = list(tokens)
    for place in range(best, best + most):
        text.append(text[place])
    return text[len(tokens) :]


@pytest.mark.parametrize(
    ("tokens", "guesses"),
    [
        ([1, 2, 3, 4, 9, 1, 2], [3, 4, 9]),
        ([7, 1, 2, 5, 8, 1, 2, 6, 7, 1, 2], [5, 8, 1]),  # the longer end decides
        ([1, 2, 5, 1, 2, 6, 1, 2], [6, 1, 2]),  # then the more recent one
        ([4, 4, 4], [4, 4, 4]),  # beyond its own end
        ([1, 2, 1, 2], [1, 2, 1]),
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_text_goes_on_as_it_did_before(tokens: list[int], guesses: list[int]) -> None:
    assert PromptLookup().draft(request_of(tokens), 3) == guesses


@settings(deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    cut=st.integers(1, 60),
    sizes=st.sampled_from([(1, 1), (4, 1), (4, 2), (8, 3)]),
    most=st.integers(1, 9),
)
def test_index_that_grows_equals_a_search_of_the_whole_text(
    tokens: list[int], cut: int, sizes: tuple[int, int], most: int
) -> None:
    lookup = PromptLookup(*sizes)
    request = request_of(tokens[:cut])
    assert lookup.draft(request, most) == best_guess(request.tokens, *sizes, most)
    for token in tokens[cut:]:
        request.tokens.append(token)
        assert lookup.draft(request, most) == best_guess(request.tokens, *sizes, most)


def test_each_token_is_read_once() -> None:
    class Counted(list[int]):
        num_read = 0

        def __getitem__(self, place: object) -> object:  # pyright: ignore
            taken = super().__getitem__(place)  # pyright: ignore
            self.num_read += len(taken) if isinstance(taken, list) else 1
            return taken

    lookup, request = PromptLookup(), request_of([0])
    request.tokens = Counted()
    per_token = []
    for place in range(400):
        request.tokens.append(place % 5)
        before = request.tokens.num_read
        lookup.draft(request, 4)
        per_token.append(request.tokens.num_read - before)
    assert max(per_token[200:]) == max(per_token[50:200])
    assert max(per_token) < 200


def test_closed_requests_leave_nothing() -> None:
    lookup, request = PromptLookup(), request_of([1, 2, 1, 2])
    lookup.draft(request, 2)
    assert len(lookup) == 1
    lookup.close(request)
    lookup.close(request)
    assert len(lookup) == 0


@pytest.mark.parametrize("sizes", [(2, 0), (2, 3)])
def test_sizes_that_make_no_sense_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ConfigError):
        PromptLookup(*sizes)


def control_of(base_s: float, token_s: float, most: int = 16) -> DraftControl:
    """Return a control that knows what steps cost."""
    cost = CostModel()
    for size in [1, 2, 4, 8, 16, 32, 64, 128]:
        cost.observe(size, base_s + token_s * size)
    return DraftControl(cost, most)


def show(control: DraftControl, request: Request, drafts: int, accepted: int, rounds: int) -> None:
    """Let rounds of guesses fare alike."""
    for _ in range(rounds):
        control.observe(request, drafts, accepted)


def test_more_are_allowed_the_more_are_right() -> None:
    control = control_of(0.010, 0.001)
    allowed = []
    for accepted in (0, 2, 4, 6, 8):
        request = request_of([1], str(accepted))
        show(control, request, 8, accepted, 20)
        allowed.append(control.most(request, 1))
    assert allowed == sorted(allowed)
    assert allowed[0] == 0
    assert allowed[-1] == 16


def test_fewer_are_allowed_the_fuller_the_step() -> None:
    control, request = control_of(0.010, 0.001), request_of([1])
    show(control, request, 8, 5, 20)
    allowed = [control.most(request, size) for size in (1, 2, 4, 8, 16, 64, 512)]
    assert allowed == sorted(allowed, reverse=True)
    assert allowed[0] >= 4
    assert allowed[-1] == 0


def test_none_where_tokens_cost_as_much_as_steps() -> None:
    control, request = control_of(1e-9, 0.001), request_of([1])
    show(control, request, 8, 8, 20)
    assert {control.most(request, size) for size in (1, 16) for _ in range(300)} == {0}


def test_probes_are_single_and_become_seldom_and_success_brings_guesses_back() -> None:
    control, request = control_of(0.010, 0.001), request_of([1])
    show(control, request, 8, 0, 10)
    asked_at = []
    for step in range(2000):
        allowed = control.most(request, 1)
        assert allowed <= 1
        if allowed:
            asked_at.append(step)
            control.observe(request, 1, 0)
    gaps = [after - before for before, after in itertools.pairwise(asked_at)]
    assert gaps == sorted(gaps)
    assert gaps[-1] == 256
    while control.most(request, 1) == 0:
        pass
    control.observe(request, 1, 1)
    for _ in range(20):
        allowed = control.most(request, 1)
        if allowed:
            control.observe(request, allowed, allowed)
    assert control.most(request, 1) >= 8


def test_no_guesses_when_none_are_wanted() -> None:
    control, request = control_of(0.010, 0.001, most=0), request_of([1])
    assert [control.most(request, 1) for _ in range(300)] == [0] * 300
    assert len(control) == 0


def test_a_success_makes_probes_frequent_again() -> None:
    control, request = control_of(0.010, 0.001), request_of([1])
    show(control, request, 1, 0, 20)
    show(control, request, 1, 1, 1)
    show(control, request, 8, 0, 1)
    show(control, request, 1, 0, 2)
    steps = 1
    while control.most(request, 1) == 0:
        steps += 1
    assert 1 < steps <= 64


def copying(tokens: Sequence[int]) -> int:
    """A language that says everything again and again."""
    return tokens[-12]


def seconds_of(sim: Simulation, num_users: int, prompt_of: int) -> float:
    """Return the virtual seconds until so many users have their answers."""
    for user in range(num_users):
        sim.add(range(prompt_of * user, prompt_of * user + 12), 80, tenant=str(user))
    sim.run()
    return sim.clock.now_s


LARGE = {
    "num_pages": 800,
    "context": 120,
    "max_running": 16,
    "max_step_tokens": 64,
    "is_checked": False,
}


def test_copying_for_one_user_gains() -> None:
    plain = seconds_of(Simulation(language=copying, **LARGE), 1, 100)
    lookup = PromptLookup()
    drafting = Simulation(language=copying, drafter=lookup, **LARGE)
    assert plain / seconds_of(drafting, 1, 100) > 1.5
    drafting.assert_nothing_held()
    assert len(lookup) == 0
    counters = drafting.scheduler.counters
    assert 0 < counters.accepted_tokens <= counters.drafted_tokens


@pytest.mark.parametrize("num_users", [1, 16])
def test_never_a_loss(num_users: int) -> None:
    """Text whose guesses are mostly wrong: as the one before, with every third token changed."""

    def contrary(tokens: Sequence[int]) -> int:
        return tokens[-12] if len(tokens) % 3 else (tokens[-12] * 7 + len(tokens)) % 50

    for language in (contrary, copying):
        plain = seconds_of(Simulation(language=language, **LARGE), num_users, 100)
        sim = Simulation(language=language, drafter=PromptLookup(), **LARGE)
        assert plain / seconds_of(sim, num_users, 100) > 0.97


@pytest.mark.parametrize("length", [12, 13])
def test_guesses_do_not_reach_beyond_the_context(length: int) -> None:
    sim = Simulation(language=copying, drafter=PromptLookup(), context=40)
    request = sim.add(range(length), 100)
    sim.run()
    assert sim.scheduler.counters.accepted_tokens
    assert len(request.tokens) == 40


def test_guesses_are_given_up_before_anybody_is_turned_back() -> None:
    """The simulation checks each step; here some have guesses and some turn a request back."""
    sim = Simulation(language=copying, drafter=PromptLookup(), num_pages=10, max_running=2)
    for user in range(2):
        sim.add(range(100 * user, 100 * user + 12), 28)
    sim.run()
    assert sim.scheduler.counters.preemptions
    assert sim.scheduler.counters.drafted_tokens


def test_answers_are_the_same_with_guesses() -> None:
    for language in (copying, lambda tokens: (tokens[-1] + len(tokens) // 9) % 7):
        sim = Simulation(language=language, drafter=PromptLookup(), **LARGE)
        requests = [sim.add(range(user, user + 14), 60) for user in range(6)]
        sim.run()
        assert sim.scheduler.counters.drafted_tokens
        for request in requests:
            sim.assert_answered(request)
            assert request.finish_reason == "length"
