"""Figures of runs whose times are known; bounds; what is drawn of them."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.errors import ConfigError
from deepseek.records import Measurement
from deepseek.serve.load import (
    Cost,
    Load,
    Outcome,
    Run,
    draw_load,
    error_examples,
    meets,
    read_objectives,
    summarize_run,
    worst_cases,
)
from deepseek.serve.load.objectives import percentile


def answer(number: int, first_s: float, *gaps_s: float, **rest: Any) -> Outcome:
    """Return an answer that was sent at its number's second, with the times between its pieces."""
    times = [number + first_s]
    for gap in gaps_s:
        times.append(times[-1] + gap)
    given = {"planned_s": float(number), "sent_s": float(number), "ended_s": times[-1], **rest}
    return Outcome(dialogue=number, piece_times_s=times, **given)


def failed(number: int, kind: str, detail: str = "") -> Outcome:
    """Return a request that failed at once."""
    return Outcome(
        dialogue=number, planned_s=number, sent_s=number, ended_s=number, error=kind, detail=detail
    )


def figures(run: Run, **rest: Any) -> dict[str, float]:
    """Return the values of a run by name and statistic."""
    found = {}
    for each in summarize_run(run, {"model": "fake"}, **rest):
        about = each.conditions
        assert about["model"] == "fake" and about["concurrency"] == 2
        keys = [about[key] for key in ("statistic", "turn", "kind") if key in about]
        name = " ".join(map(str, [each.name, *keys]))
        assert name not in found
        found[name] = each.value
    return found


def of(*outcomes: Outcome, **rest: Any) -> Run:
    """Return a run."""
    wall_s = max((each.ended_s for each in outcomes), default=0.0)
    return Run(load=Load(concurrency=2), outcomes=list(outcomes), wall_s=wall_s, **rest)


def test_latencies_are_those_of_the_answers() -> None:
    run = of(answer(0, 0.5, 0.1, 0.3), answer(1, 0.2, 0.1, 0.1), failed(2, "dropped"))
    found = figures(run)
    assert found["requests"] == 3 and found["requests_answered"] == 2 and found["errors"] == 1
    assert found["first_token_s p50"] == pytest.approx(0.35)
    assert found["first_token_s max"] == pytest.approx(0.5)
    assert found["first_token_s p90"] == pytest.approx(0.47)
    assert found["inter_piece_s p50"] == pytest.approx(0.1)
    assert found["inter_piece_s max"] == pytest.approx(0.3)
    assert found["time_per_output_token_s p50"] == pytest.approx(0.15)
    assert found["end_to_end_s max"] == pytest.approx(0.9)
    assert found["queue_s max"] == 0
    # two seconds from the start to the failure, which was the last to end
    assert found["requests_per_s"] == pytest.approx(1.0)
    assert found["new_tokens_per_s"] == pytest.approx(3.0)
    assert found["errors_of_kind dropped"] == 1


def test_tokens_of_one_piece_share_its_time() -> None:
    """Five tokens in three pieces: 0.6 s over four steps."""
    run = of(answer(0, 0.5, 0.4, 0.2, answer_tokens=5))
    found = figures(run)
    assert found["inter_piece_s max"] == pytest.approx(0.4)
    assert found["inter_token_s max"] == pytest.approx(0.2)
    assert found["time_per_output_token_s p50"] == pytest.approx(0.15)
    assert found["new_tokens_per_s"] == pytest.approx(5 / 1.1)


def test_a_token_without_text_makes_no_token_faster_than_its_piece() -> None:
    """More pieces than tokens, as of a server that cuts a token's text in two."""
    assert answer(0, 0.1, 0.2, 0.2, answer_tokens=2).token_gaps_s == pytest.approx([0.2, 0.2])
    assert answer(0, 0.1, answer_tokens=1).token_gaps_s == []


def test_counts_are_told_only_where_the_server_counts() -> None:
    counted = answer(0, 0.5, 0.5, prompt_tokens=100, answer_tokens=2, cached_tokens=75)
    found = figures(of(counted))
    assert found["prompt_tokens_per_s"] == pytest.approx(100)
    assert found["prompt_tokens_mean"] == 100 and found["prompt_cached_share"] == 0.75
    (first, *_) = summarize_run(of(counted), {})
    assert first.conditions["tokens_by"] == "usage"
    mixed = of(counted, answer(1, 0.5, 0.5))
    assert "prompt_tokens_per_s" not in figures(mixed)
    assert summarize_run(mixed, {})[0].conditions["tokens_by"] == "pieces"


def test_who_hung_up_is_no_answer_and_no_failure() -> None:
    run = of(answer(0, 0.5), answer(1, 0.1, hung_up=True), failed(2, "timeout"))
    found = figures(run, objectives={"ttft": 1.0})
    assert found["hung_up"] == 1 and found["requests_answered"] == 1 and found["errors"] == 1
    assert found["first_token_s max"] == pytest.approx(0.5)
    assert found["goodput_share"] == 0.5 and found["goodput_requests_per_s"] == 0.5


def test_turns_are_told_apart() -> None:
    run = of(answer(0, 0.8), answer(1, 0.1, turn=1), answer(2, 0.3, turn=1))
    found = figures(run)
    assert found["first_token_of_turn_s p50 1"] == pytest.approx(0.8)
    assert found["first_token_of_turn_s p50 2"] == pytest.approx(0.2)
    assert not any("turn" in name for name in figures(of(answer(0, 0.8))))


def test_costs_are_of_what_is_known() -> None:
    run = of(answer(0, 0.5, 0.5), answer(1, 0.5, 0.5), client_cpu_s=0.02)
    found = figures(run)
    assert found["client_cpu_s"] == 0.02 and found["client_cpu_s_per_piece"] == 0.005
    assert not any("server" in name or "energy" in name or "cost" in name for name in found)
    cost = Cost(server_cpu_s=2.0, server_peak_rss_bytes=1000, energy_j=72.0, price_per_kwh=0.5)
    found = figures(run, cost=cost)
    assert found["server_cpu_s_per_token"] == 0.5 and found["server_peak_rss_bytes"] == 1000
    assert found["energy_j_per_request"] == 36.0 and found["energy_j_per_token"] == 18.0
    assert found["cost_per_request"] == pytest.approx(36.0 / 3.6e6 * 0.5)
    assert "cost_per_request" not in figures(run, cost=Cost(energy_j=72.0))


@pytest.mark.parametrize("outcomes", [[], [failed(0, "refused"), failed(0, "refused")]])
def test_nothing_answered_has_no_latency(outcomes: list[Outcome]) -> None:
    found = figures(
        of(*outcomes), objectives={"ttft": 1.0}, cost=Cost(server_cpu_s=1.0, energy_j=1)
    )
    assert found["requests_answered"] == 0 and not any("first" in name for name in found)
    assert worst_cases(of(*outcomes)) == []


def test_every_figure_can_be_written() -> None:
    run = of(answer(0, 0.5, 0.1), failed(1, "http_429"), answer(2, 0.1, retries=2))
    for each in summarize_run(run, {}, {"ttft": 0.2}):
        assert Measurement.from_dict(each.to_dict()) == each
    assert figures(run)["retries"] == 2


def test_the_worst_are_named() -> None:
    run = of(*(answer(n, 0.1 * n, 0.1) for n in range(9)), answer(9, 0.01, 5.0), failed(10, "x"))
    found = worst_cases(run, 2)
    assert [each["dialogue"] for each in found[:3]] == [8, 7, 9]
    assert found[2]["longest_gap_s"] == pytest.approx(5.0)
    assert error_examples(of(failed(0, "x", "one"), failed(1, "x", "two"))) == {"x": "one"}


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40), st.floats(0, 100))
def test_percentiles_lie_in_order(values: list[float], share: float) -> None:
    ordered = sorted(values)
    found = percentile(ordered, share)
    assert ordered[0] <= found <= ordered[-1]
    assert percentile(ordered, 0) == ordered[0] and percentile(ordered, 100) == ordered[-1]
    assert percentile(ordered, 50) == pytest.approx(statistics.median(ordered))
    assert percentile(ordered, max(0.0, share - 10)) <= found


def test_bounds_are_kept_or_not() -> None:
    one = answer(0, 0.5, 0.1, 0.1, 0.4)
    for name, value in {"ttft": 0.5, "stall": 0.4, "tpot": 0.2, "e2e": 1.1, "itl": 0.37}.items():
        assert meets(one, {name: value + 1e-9}) and not meets(one, {name: value - 1e-3}), name
    assert meets(one, {}) and not meets(failed(0, "x"), {})
    assert meets(one, {"ttft": 0.5})  # a bound itself is within
    uneven = answer(0, 0.1, 0.4, 0.1, 0.1)
    assert not meets(uneven, {"itl": 0.36}) and meets(uneven, {"itl": 0.38})
    assert not meets(one, {"ttft": 1.0, "stall": 0.1})
    assert meets(answer(0, 0.1), {"itl": 0.001, "tpot": 0.001, "stall": 0.001})


def test_bounds_are_read() -> None:
    assert read_objectives(["ttft:0.5", "itl:1e-1"]) == {"ttft": 0.5, "itl": 0.1}
    for wrong in ("ttft", "ttft:", "ttft:x", "ttft:0", "ttft:-1", "ttft:nan", "p95:1", ":1"):
        with pytest.raises(ConfigError, match="NAME:SECONDS"):
            read_objectives([wrong])
    with pytest.raises(ConfigError, match="each name once"):
        read_objectives(["ttft:1", "ttft:2"])


def loads(*given: Load) -> list[Measurement]:
    """Return the figures of runs at loads."""
    found = []
    for place, load in enumerate(given):
        run = Run(load=load, outcomes=[answer(0, 0.1 * (place + 1), 0.1)], wall_s=1.0 + place)
        found += summarize_run(run, {}, {"ttft": 0.15})
    return found


def test_latencies_are_drawn_over_the_load() -> None:
    figure = draw_load(loads(Load(concurrency=4), Load(concurrency=1)))
    first, *_, goodput = figure.axes
    assert first.get_xlabel() == "users at once"
    lines = {line.get_label(): line.get_xydata().tolist() for line in first.get_lines()}  # type: ignore[union-attr]
    assert list(lines) == ["p50", "p95", "p99"]
    assert lines["p50"] == [[1, pytest.approx(0.2)], [4, pytest.approx(0.1)]]
    assert goodput.get_lines()[0].get_ydata().tolist() == [0.0, 1.0]  # type: ignore[union-attr]
    rates = draw_load(loads(Load(rate=2.0), Load(rate=0.5)))
    assert rates.axes[0].get_xlabel() == "requests a second"
    sweep = draw_load(loads(Load(concurrency=1), Load(rate=3.0)))
    assert sweep.axes[0].get_xlabel() == "requests answered a second"
    assert sweep.axes[0].get_lines()[0].get_xdata().tolist() == [0.5, 1.0]  # type: ignore[union-attr]
