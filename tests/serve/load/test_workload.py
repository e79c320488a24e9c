"""Workloads: the same for the same seed, of the lengths that were asked for, unlike each other."""

from __future__ import annotations

import dataclasses
import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.errors import ConfigError
from deepseek.serve.load import KINDS, Lengths, Load, Workload, arrival_times, plan_dialogues
from deepseek.serve.load.lengths import VARIES
from deepseek.serve.load.sweep import ends_of_sweep, rates_between
from deepseek.serve.load.words import WORDS

TEXT = "once upon a time there was a king who had three sons and a horse of glass"

workloads = st.builds(
    lambda kind, **rest: Workload(kind=kind, text=TEXT if kind == "text" else "", **rest),
    kind=st.sampled_from(KINDS),
    num_dialogues=st.integers(1, 12),
    prompt_tokens=st.integers(1, 60),
    new_tokens=st.integers(1, 40),
    vary=st.sampled_from(VARIES),
    prefix_tokens=st.integers(1, 30),
    turns=st.integers(1, 4),
    follow_tokens=st.integers(1, 20),
    hang_up_share=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 5),
)


@given(workloads, st.integers(-1, 3))
def test_a_seed_always_asks_the_same(workload: Workload, part: int) -> None:
    assert list(plan_dialogues(workload, part)) == list(plan_dialogues(workload, part))


@given(workloads)
def test_a_dialogue_is_as_it_was_described(workload: Workload) -> None:
    found = list(plan_dialogues(workload))
    assert [each.number for each in found] == list(range(workload.num_dialogues))
    for each in found:
        assert len(each.turns) == (workload.turns if workload.kind == "dialogue" else 1)
        assert bool(each.system) == (workload.kind == "shared-prefix")
        words = len(each.system.split())
        for turn in each.turns:
            assert turn.max_tokens >= 1
            words += len(turn.text.split()) + turn.max_tokens
        assert words <= workload.longest_tokens + (workload.kind == "copy")
        assert all(turn.hang_up_after is None for turn in each.turns[:-1])
        after = each.turns[-1].hang_up_after
        assert after is None or 0 <= after <= each.turns[-1].max_tokens // 2
        if workload.hang_up_share in (0.0, 1.0):
            assert (after is None) == (workload.hang_up_share == 0)


@given(workloads, st.integers(0, 2))
def test_more_dialogues_begin_with_the_same(workload: Workload, part: int) -> None:
    more = dataclasses.replace(workload, num_dialogues=workload.num_dialogues + 3)
    few = list(plan_dialogues(workload, part))
    assert list(plan_dialogues(more, part))[: len(few)] == few


@pytest.mark.parametrize("kind", ["random", "shared-prefix", "dialogue", "copy"])
def test_no_prompt_helps_another(kind: str) -> None:
    """Neither within a measurement nor from one to the next, but for the prefix that is shared."""
    parts = [list(plan_dialogues(Workload(kind=kind), part)) for part in range(3)]  # type: ignore[arg-type]
    texts = [turn.text for part in parts for each in part for turn in each.turns]
    beginnings = {" ".join(text.split()[:8]) for text in texts}
    assert len(beginnings) == len(texts)
    systems = {each.system for part in parts for each in part}
    assert len(systems) == (3 if kind == "shared-prefix" else 1)
    other = list(plan_dialogues(Workload(kind=kind, seed=1)))  # type: ignore[arg-type]
    assert {each.turns[0].text for each in other}.isdisjoint(texts)


def test_later_turns_are_as_short_as_is_said() -> None:
    workload = Workload(kind="dialogue", turns=3, prompt_tokens=100, follow_tokens=5)
    for each in plan_dialogues(workload):
        assert [len(turn.text.split()) for turn in each.turns] == [100, 5, 5]
    assert workload.longest_tokens == 100 + 2 * 5 + 3 * 64


def test_what_is_copied_stands_in_the_prompt_twice() -> None:
    first, second, rest = next(plan_dialogues(Workload(kind="copy"))).turns[0].text.split("\n")
    assert first == second and len(first.split()) == 64 and rest == ""


def test_passages_are_of_the_text() -> None:
    workload = Workload(kind="text", text=TEXT, prompt_tokens=5, num_dialogues=30)
    around = f"{TEXT} {TEXT}"
    prompts = [each.turns[0].text for each in plan_dialogues(workload)]
    assert all(prompt in around for prompt in prompts) and len(set(prompts)) > 5


@given(st.integers(1, 400), st.sampled_from(VARIES), st.integers(0, 2**32))
def test_lengths_keep_their_bounds(mean: int, vary: str, seed: int) -> None:
    import random

    lengths = Lengths(mean, vary)  # type: ignore[arg-type]
    drawn = [lengths.draw(random.Random(f"{seed}/{n}")) for n in range(20)]
    assert all(1 <= each <= lengths.longest for each in drawn)
    if vary == "fixed":
        assert set(drawn) == {mean}


@pytest.mark.parametrize("vary", VARIES)
@pytest.mark.parametrize("mean", [31, 128])
def test_lengths_have_their_mean(vary: str, mean: int) -> None:
    import random

    generator = random.Random(0)
    lengths = Lengths(mean, vary)  # type: ignore[arg-type]
    drawn = [lengths.draw(generator) for _ in range(20_000)]
    assert statistics.mean(drawn) == pytest.approx(mean, rel=0.02)
    spread = {"fixed": 0.0, "uniform": mean * 0.29, "exponential": mean * 0.92}[vary]
    assert statistics.pstdev(drawn) == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_arrivals_have_their_rate_and_burstiness(burstiness: float) -> None:
    load = Load(rate=5.0, burstiness=burstiness)
    times = arrival_times(load, 20_001, seed=3)
    assert times[0] == 0 and times == sorted(times)
    gaps = [after - before for before, after in pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 5, rel=0.03)
    # a gamma distribution's deviation over its mean is one over the root of its shape
    variation = statistics.pstdev(gaps) / statistics.mean(gaps)
    assert variation == pytest.approx(burstiness**-0.5, rel=0.05)
    assert times == arrival_times(load, 20_001, seed=3) != arrival_times(load, 20_001, seed=4)
    assert arrival_times(Load(concurrency=4), 3, seed=0) == [0, 0, 0]


def test_a_load_says_what_it_is() -> None:
    assert Load(concurrency=4).name == "4 at once" and Load(concurrency=4).value == 4
    assert Load(rate=0.5).name == "0.5/s" and Load(rate=0.5).value == 0.5
    bursts = Load(rate=2, burstiness=0.25)
    assert bursts.name == "2/s, burstiness 0.25"
    assert bursts.conditions() == {"rate": 2, "burstiness": 0.25}
    assert Load(concurrency=4).conditions() == {"concurrency": 4}


def test_a_sweep_goes_from_one_user_to_all() -> None:
    assert ends_of_sweep(40) == (Load(concurrency=1), Load(concurrency=40))
    rates = [load.rate for load in rates_between(1.0, 5.0, 3, 0.5)]
    assert rates == [2.0, 3.0, 4.0]
    assert [load.rate for load in rates_between(5.0, 1.0, 1, 1.0)] == [3.0]
    assert rates_between(0.00001, 0.00002, 1, 1.0)[0].rate == 0.00001
    with pytest.raises(ConfigError, match="answers some requests at both ends"):
        rates_between(0.0, 2.0, 1, 1.0)


def test_words_are_words() -> None:
    assert len(WORDS) > 500 and list(WORDS) == sorted(set(WORDS))
    assert all(word.isascii() and word.isalpha() and word.islower() for word in WORDS)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"kind": "poems"}, "kind of Workload must be one of random, shared-prefix"),
        ({"vary": "much"}, "vary of Workload must be one of fixed, uniform"),
        ({"turns": 0}, "turns of Workload must be at least 1"),
        ({"new_tokens": 0}, "new_tokens of Workload must be at least 1"),
        ({"hang_up_share": 1.1}, "a share from 0 to 1; got 1.1"),
        ({"kind": "text"}, "words for the kind text"),
        ({"kind": "text", "text": " \n"}, "words for the kind text"),
        ({"text": "words"}, "and for no other"),
    ],
)
def test_a_wrong_workload_is_told(wrong: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Workload(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"concurrency": 1, "rate": 1.0},
        {"concurrency": 0},
        {"rate": -1.0},
        {"rate": float("nan")},
        {"rate": 1.0, "burstiness": 0.0},
    ],
)
def test_a_wrong_load_is_told(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="of Load must be"):
        Load(**wrong)
    with pytest.raises(ConfigError, match="mean of Lengths must be at least 1"):
        Lengths(0)
    with pytest.raises(ConfigError, match="vary of Lengths must be one of"):
        Lengths(3, "much")  # type: ignore[arg-type]
