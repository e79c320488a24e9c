"""The figures of a run, as measurements.

Latencies are of answers that came whole; each has the median with the spread of the middle 80 %,
the 90th, 95th and 99th percentile and the worst case, told apart by the condition `statistic`.
Rates are over the whole run, from the first request to the last answer's end.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek.records import Measurement, summarize
from deepseek.serve.load.objectives import Objectives, meets, percentile
from deepseek.serve.load.outcome import Outcome
from deepseek.serve.load.run import Run

PERCENTILES = {"p90": 90.0, "p95": 95.0, "p99": 99.0, "max": 100.0}
"""Names of the statistics beside the median, `p50`."""

LATENCIES: dict[str, str] = {
    "first_token_s": "time to first token",
    "inter_piece_s": "between pieces",
    "inter_token_s": "between tokens",
    "time_per_output_token_s": "per output token",
    "end_to_end_s": "end to end",
    "queue_s": "waited here",
}
"""The latencies of a run, by their names."""

Conditions = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run used, where it can be known."""

    server_cpu_s: float | None = None
    server_peak_rss_bytes: int | None = None
    energy_j: float | None = None
    """Energy of the processor packages, whoever used them."""
    price_per_kwh: float | None = None


def summarize_run(
    run: Run, conditions: Conditions, objectives: Objectives | None = None, cost: Cost | None = None
) -> list[Measurement]:
    """Return every figure of a run.

    Args:
        run: what was gathered.
        conditions: what it held under, for all of them; the load is added.
        objectives: bounds that goodput is counted under; None for no such figure.
        cost: what it used beside this process.
    """
    about = {**conditions, **run.load.conditions()}
    answered = [each for each in run.outcomes if each.is_answered]
    counted = all(each.answer_tokens is not None for each in answered)
    about["tokens_by"] = "usage" if counted else "pieces"
    found = [*_rates(run, answered, about), *_failures(run, about)]
    if objectives:
        found += _goodput(run, objectives, about)
    for name, samples in _samples(answered).items():
        found += _statistics(name, samples, about)
    found += _later_turns(answered, about)
    return found + _costs(run, answered, cost or Cost(), about)


def _samples(answered: Sequence[Outcome]) -> dict[str, list[float]]:
    per_token = [each.time_per_output_token_s for each in answered]
    return {
        "first_token_s": [each.first_token_s for each in answered],
        "inter_piece_s": [gap for each in answered for gap in each.gaps_s],
        "inter_token_s": [gap for each in answered for gap in each.token_gaps_s],
        "time_per_output_token_s": [each for each in per_token if each is not None],
        "end_to_end_s": [each.end_to_end_s for each in answered],
        "queue_s": [each.queue_s for each in answered],
    }


def _statistics(name: str, samples: Sequence[float], about: Conditions) -> list[Measurement]:
    if not samples:
        return []
    ordered = sorted(samples)
    about = {**about, "samples": len(ordered)}
    found = [summarize(name, ordered, "s", conditions={**about, "statistic": "p50"})]
    for statistic, share in PERCENTILES.items():
        conditions = {**about, "statistic": statistic}
        value = percentile(ordered, share)
        found.append(Measurement(name=name, value=value, unit="s", conditions=conditions))
    return found


def _rates(run: Run, answered: Sequence[Outcome], about: Conditions) -> list[Measurement]:
    figures: list[tuple[str, float, str]] = [
        ("requests", len(run.outcomes), "1"),
        ("requests_answered", len(answered), "1"),
        ("wall_s", run.wall_s, "s"),
    ]
    if run.wall_s > 0:
        new = sum(each.tokens for each in run.outcomes)
        figures += [
            ("requests_per_s", len(answered) / run.wall_s, "1/s"),
            ("new_tokens_per_s", new / run.wall_s, "tokens/s"),
        ]
        counts = [each.prompt_tokens for each in answered]
        if counts and None not in counts:
            read = sum(count or 0 for count in counts)
            figures.append(("prompt_tokens_per_s", read / run.wall_s, "tokens/s"))
            figures.append(("prompt_tokens_mean", read / len(counts), "tokens"))
    cached = [each for each in answered if each.cached_tokens is not None and each.prompt_tokens]
    if cached:
        share = sum(each.cached_tokens or 0 for each in cached)
        whole = sum(each.prompt_tokens or 0 for each in cached)
        figures.append(("prompt_cached_share", share / whole, "1"))
    return [_exact(*figure, about) for figure in figures]


def _failures(run: Run, about: Conditions) -> list[Measurement]:
    kinds = Counter(each.error for each in run.outcomes if each.error is not None)
    found = [_exact("errors", kinds.total(), "1", about)]
    found += [
        _exact("errors_of_kind", count, "1", {**about, "kind": kind})
        for kind, count in sorted(kinds.items())
    ]
    if hung := sum(each.hung_up for each in run.outcomes):
        found.append(_exact("hung_up", hung, "1", about))
    if retries := sum(each.retries for each in run.outcomes):
        found.append(_exact("retries", retries, "1", about))
    return found


def _goodput(run: Run, objectives: Objectives, about: Conditions) -> list[Measurement]:
    """Of all requests whose user stayed: failures are not good either."""
    bounds = {**about, "objectives": " ".join(f"{k}:{v:g}" for k, v in objectives.items())}
    stayed = [each for each in run.outcomes if not each.hung_up]
    good = sum(meets(each, objectives) for each in stayed)
    found = []
    if stayed:
        found.append(_exact("goodput_share", good / len(stayed), "1", bounds))
    if run.wall_s > 0:
        found.append(_exact("goodput_requests_per_s", good / run.wall_s, "1/s", bounds))
    return found


def _later_turns(answered: Sequence[Outcome], about: Conditions) -> list[Measurement]:
    """Return the time to first token of each turn, where there is more than one."""
    turns = sorted({each.turn for each in answered})
    found = []
    for turn in turns if len(turns) > 1 else []:
        samples = [each.first_token_s for each in answered if each.turn == turn]
        found += _statistics("first_token_of_turn_s", samples, {**about, "turn": turn + 1})
    return found


def _costs(
    run: Run, answered: Sequence[Outcome], cost: Cost, about: Conditions
) -> list[Measurement]:
    figures: list[tuple[str, float, str]] = [("client_cpu_s", run.client_cpu_s, "s")]
    pieces = sum(len(each.piece_times_s) for each in run.outcomes)
    if pieces:
        figures.append(("client_cpu_s_per_piece", run.client_cpu_s / pieces, "s"))
    tokens = sum(each.tokens for each in run.outcomes)
    if cost.server_cpu_s is not None:
        figures.append(("server_cpu_s", cost.server_cpu_s, "s"))
        if tokens:
            figures.append(("server_cpu_s_per_token", cost.server_cpu_s / tokens, "s/token"))
    if cost.server_peak_rss_bytes is not None:
        figures.append(("server_peak_rss_bytes", cost.server_peak_rss_bytes, "bytes"))
    if cost.energy_j is not None and answered:
        figures.append(("energy_j_per_request", cost.energy_j / len(answered), "J/request"))
        figures.append(("energy_j_per_token", cost.energy_j / max(1, tokens), "J/token"))
        if cost.price_per_kwh is not None:
            paid = cost.energy_j / 3.6e6 * cost.price_per_kwh / len(answered)
            figures.append(("cost_per_request", paid, "currency/request"))
    return [_exact(*figure, about) for figure in figures]


def _exact(name: str, value: float, unit: str, about: Conditions) -> Measurement:
    return Measurement(name=name, value=value, unit=unit, conditions=about)


def worst_cases(run: Run, count: int = 3) -> list[dict[str, Any]]:
    """Return the answers that took longest to begin, and those that stalled longest, once each."""
    answered = [each for each in run.outcomes if each.is_answered]
    slow = sorted(answered, key=lambda each: -each.first_token_s)[:count]
    stalled = sorted(answered, key=lambda each: -max(each.gaps_s, default=0.0))[:count]
    chosen = {id(each): each for each in [*slow, *stalled]}
    return [
        {
            "dialogue": each.dialogue,
            "turn": each.turn,
            "first_token_s": each.first_token_s,
            "longest_gap_s": max(each.gaps_s, default=0.0),
            "end_to_end_s": each.end_to_end_s,
            "tokens": each.tokens,
        }
        for each in chosen.values()
    ]


def error_examples(run: Run) -> dict[str, str]:
    """Return what was said with the first error of each kind."""
    found: dict[str, str] = {}
    for each in run.outcomes:
        if each.error is not None:
            found.setdefault(each.error, each.detail)
    return found
