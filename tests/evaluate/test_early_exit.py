"""Exits on given texts, and thresholds that keep their promise."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek.errors import ConfigError, FormatError
from deepseek.evaluate import ExitCalibration, calibrate_exits, score_exits
from deepseek.evaluate.exit_calibration import boldest, fewest_texts, p_value
from deepseek.models import Decoder, DecoderConfig, Exits, forward_with_exits
from tests.evaluate.conftest import ByteTokenizer

CONFIG = DecoderConfig(
    vocab_size=257,
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_positions=128,
    init_std=0.4,
)
EXITS = Exits(layers=(1, 2, 3), threshold=0.2)


@pytest.fixture
def model(tokenizer: ByteTokenizer) -> Decoder:
    torch.manual_seed(3)
    made = Decoder(CONFIG).eval()
    made.tokenizer = tokenizer  # type: ignore[assignment]
    return made


def texts(count: int, length: int = 40) -> list[str]:
    drawn = np.random.default_rng(0).integers(97, 123, (count, length))
    return ["".join(map(chr, row)) for row in drawn]


@torch.inference_mode()
def test_scores_are_those_of_single_steps(model: Decoder) -> None:
    rows = [list(text.encode()) for text in texts(3)]
    scores, whole = score_exits(
        model, rows, [EXITS, EXITS.replace(threshold=1.0)], num_prompt_tokens=8
    )
    for number, row in enumerate(rows):
        cache, tokens = model.new_cache(1, 64), torch.tensor([row])
        model(tokens[:, :8], cache=cache)
        steps = [
            forward_with_exits(model, each, cache, EXITS) for each in tokens[:, 8:].split(1, 1)
        ]
        logits = torch.cat([step.logits[0] for step in steps])
        expected = model(tokens).logits[0, 8:]
        differs = logits.argmax(-1) != expected.argmax(-1)
        assert torch.equal(scores.differs[number], differs)
        assert scores.depths[number].tolist() == [int(step.depths) for step in steps]
        losses = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 9:], reduction="none")
        torch.testing.assert_close(scores.losses[number], losses.double(), rtol=1e-5, atol=1e-5)
    assert 0 < scores.disagreements.mean() < 1
    assert whole.disagreements.tolist() == [0.0] * 3 and whole.depths.unique().tolist() == [4]
    named = {each.name: each for each in scores.measurements({"model": "x"})}
    assert named["disagreement"].value == pytest.approx(scores.disagreements.mean())
    assert named["mean_layers"].value == pytest.approx(scores.depths.double().mean())
    assert named["perplexity"].value == pytest.approx(math.exp(scores.losses.mean()))
    assert named["perplexity"].conditions["threshold"] == 0.2
    assert all(each.spread is not None for each in named.values())


@pytest.mark.parametrize("rows", [[], [[1] * 9], [[1] * 12, [1] * 13]])
def test_texts_that_cannot_be_scored(model: Decoder, rows: list[list[int]]) -> None:
    with pytest.raises(ConfigError, match="of one length"):
        score_exits(model, rows, [EXITS], num_prompt_tokens=8)


@pytest.mark.parametrize("delta", [0.03, 0.1, 0.4])
@pytest.mark.parametrize("count", [1, 4, 10])
def test_p_values_are_small_no_more_often_than_they_say(count: int, delta: float) -> None:
    """Of losses of 0 or 1 with a mean of just `delta`, by the chance of every sequence."""
    drawn = list(itertools.product((0.0, 1.0), repeat=count))
    values = [p_value(losses, delta, 0.05) for losses in drawn]
    chances = [delta ** sum(losses) * (1 - delta) ** (count - sum(losses)) for losses in drawn]
    for level in {*values} - {1.0}:
        chance = sum(c for p, c in zip(values, chances, strict=True) if p <= level)
        assert chance <= level + 1e-12


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0.01, 0.99), st.floats(0.01, 0.5)
)
def test_p_values_are_the_least_capital_of_a_gambler(
    losses: list[float], delta: float, alpha: float
) -> None:
    capital, most = 1.0, 1.0
    for place in range(len(losses)):
        means = [(0.5 + sum(losses[: n + 1])) / (n + 2) for n in range(place)]
        variance = 0.25 + sum((x - m) ** 2 for x, m in zip(losses[:place], means, strict=True))
        variance /= place + 1
        stake = min((2 * math.log(1 / alpha) / (len(losses) * variance)) ** 0.5, 1 / (1 - delta))
        capital *= max(1 - stake * (losses[place] - delta), 0.0)
        most = max(most, capital)
    assert p_value(losses, delta, alpha) == pytest.approx(1 / most, rel=1e-9)


def test_the_promise_is_kept_over_many_draws() -> None:
    """Thresholds whose true means are known; a choice above the bound is a broken promise."""
    generator, delta, means = np.random.default_rng(0), 0.1, [0.02, 0.08, 0.105, 0.3]
    chosen = []
    for _ in range(400):
        drawn = [generator.binomial(20, mean, 120) / 20 for mean in means]
        chosen.append(boldest([p_value(losses.tolist(), delta, 0.2) for losses in drawn], 0.2))
    assert 0 < np.mean([place is not None and place >= 2 for place in chosen]) <= 0.2
    assert np.mean([place is not None and place >= 1 for place in chosen]) > 0.8


def test_the_first_failure_ends_the_test() -> None:
    assert boldest([0.01, 0.02, 0.06, 0.0], 0.05) == 1
    assert boldest([0.06, 0.0], 0.05) is None
    assert boldest([0.01, 0.05], 0.05) == 1


@given(st.floats(0.01, 0.9), st.floats(0.001, 0.5))
def test_the_fewest_texts_are_just_enough(delta: float, alpha: float) -> None:
    count = fewest_texts(delta, alpha)
    assert p_value([0.0] * count, delta, alpha) <= alpha
    if count > 1:
        assert p_value([0.0] * (count - 1), delta, alpha) > alpha - 1e-9


def calibrated(model: Decoder, **changes: Any) -> ExitCalibration:
    asked = {"delta": 0.5, "num_prompt_tokens": 8, "num_tokens": 20, **changes}
    return calibrate_exits(model, EXITS, texts(40), **asked)


def test_the_boldest_threshold_that_passes_is_chosen(model: Decoder) -> None:
    found = calibrated(model)
    assert found.exits is not None and found.exits.layers == EXITS.layers
    tried = [each.conditions["threshold"] for each in found.measurements if each.name == "p_value"]
    place = tried.index(found.exits.threshold)
    values = [found.at(threshold)["p_value"].value for threshold in tried]
    assert max(values[: place + 1]) <= 0.05 < values[place + 1]
    here = found.at(found.exits.threshold)
    assert 0 < here["disagreement"].value < 0.5 and here["mean_layers"].value < 4
    assert here["disagreement"].conditions["prompt_tokens"] == 8


def test_a_model_that_cannot_leave_early_gets_no_exits(model: Decoder) -> None:
    assert calibrated(model, delta=0.08, thresholds=(0.1, 0.0)).exits is None


def test_a_calibration_is_read_back(model: Decoder, tmp_path: Path) -> None:
    found = calibrated(model, thresholds=(0.9, 0.5))
    found.save(tmp_path / "exits.json")
    assert ExitCalibration.read(tmp_path / "exits.json") == found
    none = calibrated(model, delta=0.08, thresholds=(0.1,))
    assert ExitCalibration.from_dict(none.to_dict()) == none


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"delta": 0.01}, "at least 305 texts of 28 tokens"),
        ({"num_tokens": 50}, "at least 5 texts of 58 tokens"),
        ({"max_texts": 3}, "at least 5 texts"),
        ({"delta": 0.0}, "delta of calibrate_exits must be between 0 and 1"),
        ({"confidence": 1.0}, "confidence of calibrate_exits"),
        ({"thresholds": (0.1, 0.2)}, "from safe to bold"),
        ({"thresholds": ()}, "from safe to bold"),
    ],
)
def test_what_cannot_be_calibrated(model: Decoder, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        calibrated(model, **changes)


@pytest.mark.parametrize("text", ["{", "[]", '{"exits": null}', '{"a": 1}'])
def test_files_that_are_no_calibration(tmp_path: Path, text: str) -> None:
    (tmp_path / "wrong.json").write_text(text)
    with pytest.raises(FormatError):
        ExitCalibration.read(tmp_path / "wrong.json")
    with pytest.raises(ConfigError, match="calibration of early exit must be a file"):
        ExitCalibration.read(tmp_path / "none.json")
