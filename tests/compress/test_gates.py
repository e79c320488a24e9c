"""Gates: they pass what is equal, refuse what is damaged, and say so when they cannot tell."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from deepseek import hub
from deepseek.compress.gates import (
    Contest,
    GateConfig,
    SizeGate,
    SpeedGate,
    TaskGate,
    TextGate,
    judge,
)
from deepseek.errors import ConfigError
from deepseek.models import Decoder
from deepseek.records import BundleCard, Verdict


def quiet(words: str, share: float | None) -> None:
    """Report nothing."""


@pytest.fixture
def model(start: Path) -> Decoder:
    found = hub.load(start, dtype="float32")
    assert isinstance(found, Decoder)
    return found


def damaged(start: Path, by: float) -> Decoder:
    found = hub.load(start, dtype="float32")
    assert isinstance(found, Decoder)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(1 + by * torch.randn_like(parameter))
    return found


def contest(model: Decoder, reference: Decoder, num_bytes: int = 100) -> Contest:
    return Contest(model, reference, reference, num_bytes, reference_parameters=100)


def text_gate(text: Path, **settings: float) -> TextGate:
    return TextGate(text=str(text), tokens=2048, window=64, **settings)


def test_what_is_equal_passes(model: Decoder, text: Path) -> None:
    limits = {"most_perplexity_ratio": 1.01, "most_divergence": 0.01, "least_agreement": 0.8}
    verdict = judge(text_gate(text, **limits), contest(model, model), quiet)
    assert verdict.holds
    names = {item.name for item in verdict.measurements}
    assert names >= {"perplexity_ratio", "kl_divergence", "top1_agreement"}


@pytest.mark.parametrize("limit", ["most_perplexity_ratio", "most_divergence", "least_agreement"])
def test_each_limit_refuses_damage(start: Path, model: Decoder, text: Path, limit: str) -> None:
    value = {"most_perplexity_ratio": 1.005, "most_divergence": 0.001, "least_agreement": 0.99}
    limits = {name: None for name in value} | {limit: value[limit]}
    verdict = judge(text_gate(text, **limits), contest(damaged(start, 0.3), model), quiet)
    assert not verdict.holds
    assert verdict.words.count("at ") == 1


def test_a_broken_model_is_refused(start: Path, model: Decoder, text: Path) -> None:
    broken = damaged(start, 0.0)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    assert not judge(text_gate(text), contest(broken, model), quiet).holds


def test_too_few_windows_do_not_pass_and_say_so(start: Path, model: Decoder, text: Path) -> None:
    other = damaged(start, 0.02)
    few = judge(text_gate(text).replace(tokens=192), contest(other, model), quiet)
    ratio = next(item for item in few.measurements if item.name == "perplexity_ratio")
    limit = (ratio.value + ratio.spread.high) / 2
    gate = text_gate(text, most_perplexity_ratio=limit).replace(tokens=192)
    verdict = judge(gate, contest(other, model), quiet)
    assert not verdict.holds
    assert "too few to tell: about" in verdict.words


def test_what_was_calibrated_on_is_not_measured(model: Decoder, tmp_path: Path) -> None:
    path = tmp_path / "two.txt"
    path.write_text("1 and 1 are 2.\n" * 400 + "ZZZ QQQ\n" * 200)
    found = judge(
        TextGate(text=str(path), tokens=512, window=64), contest(model, model), quiet
    ).measurements
    plain = judge(
        TextGate(text=str(path), tokens=100_000, window=64), contest(model, model), quiet
    ).measurements
    # the last fifth holds none of the sums that the model knows
    assert found[0].value > 50
    assert plain[0].value > 50


def test_tasks_are_paired(start: Path, model: Decoder, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    lines = [
        f'{{"context": "{a} and {b} are", "choices": ["{a + b}.", "and", "are"], "answer": 0}}'
        for a in range(12)
        for b in range(10)
    ]
    path.write_text("\n".join(lines))
    gate = TaskGate(items=str(path), most_loss=0.05, least_kept=0.9)
    assert judge(gate, contest(model, model), quiet).holds
    verdict = judge(gate, contest(damaged(start, 3.0), model), quiet)
    assert not verdict.holds
    few = judge(gate.replace(num_items=4), contest(model, model), quiet)
    assert not few.holds and "about" in few.words


def test_size_counts_all_bytes(model: Decoder) -> None:
    gate = SizeGate(most_share=0.25)
    assert judge(gate, contest(model, model, num_bytes=100), quiet).holds
    assert not judge(gate, contest(model, model, num_bytes=101), quiet).holds
    half = SizeGate(most_share=0.5, against="bfloat16")
    assert judge(half, contest(model, model, num_bytes=100), quiet).holds


def test_speed_refuses_what_is_slower(start: Path, model: Decoder) -> None:
    slow = hub.load(start, dtype="float32")
    assert isinstance(slow, Decoder)
    gate = SpeedGate(
        prompt_tokens=16, new_tokens=4, rounds=3, least_decode=1e-6, least_prefill=1e-6
    )
    both = dataclasses.replace(contest(model, model), replaced=slow)
    assert judge(gate, both, quiet).holds
    assert not judge(gate.replace(least_decode=1e6), both, quiet).holds


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TextGate(most_perplexity_ratio=None), "at least"),
        (lambda: TextGate(tokens=100, window=64), "two windows"),
        (lambda: TaskGate(most_loss=None), "at least"),
        (lambda: TaskGate(num_items=1), "at least 2"),
    ],
)
def test_gates_that_can_tell_nothing_are_refused(make: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("gate", [TextGate(), TaskGate(), SizeGate(), SpeedGate()])
def test_gates_are_data(gate: GateConfig) -> None:
    assert type(gate).from_dict(gate.to_dict()) == gate


def test_verdicts_stand_on_the_card(model: Decoder, text: Path) -> None:
    verdict = judge(text_gate(text), contest(model, model), quiet)
    card = BundleCard(name="x", verdicts=(verdict, dataclasses.replace(verdict, holds=False)))
    again = BundleCard.from_dict(card.to_dict())
    assert again == card
    assert again.is_refused and not BundleCard(name="y").is_refused
    assert "verdicts" not in BundleCard(name="y").to_dict()
    assert Verdict.from_dict(verdict.to_dict()) == verdict
