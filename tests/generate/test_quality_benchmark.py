"""The quality benchmark: what it measures on, its scores, its gates, and the whole of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import deepseek
from benchmarks import quality
from deepseek.errors import ConfigError
from deepseek.models import Decoder
from deepseek.ops.linear.reference import round_int4
from deepseek.records import Measurement
from tests.ops.native import NEEDS_KERNELS


def ratio(value: float, scheme: str = "int8") -> Measurement:
    about = {"model": "m", "scheme": scheme}
    return Measurement(name="perplexity_ratio", value=value, unit="1", conditions=about)


def test_no_token_is_measured_and_learned() -> None:
    tokens = list(range(11 * quality.WINDOW + 7))
    measured, learned = quality.split(tokens, 4)
    assert measured.shape == (4, quality.WINDOW) and learned.shape == (7, quality.WINDOW)
    together = torch.cat((measured, learned)).flatten().tolist()
    assert sorted(together) == tokens[: 11 * quality.WINDOW]
    assert (measured[:, 0] // quality.WINDOW).tolist() == [0, 2, 5, 8]


def test_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1024 tokens long; got '1023 tokens'"):
        quality.split(list(range(1023)), 2)


def test_scores_are_those_of_the_definition() -> None:
    expected = torch.tensor([[0.5, 0.5], [0.75, 0.25], [0.5, 0.5]])
    found = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]])
    scores = quality.compare(expected.log(), found.log(), torch.tensor([1, 0, 0]))
    assert scores.reference_loss == pytest.approx(-(math.log(0.5) + math.log(0.75)) / 2)
    assert scores.loss == pytest.approx(-(math.log(0.5) + math.log(0.25)) / 2)
    assert scores.divergence == pytest.approx(0.5 * math.log(3) / 3)
    assert scores.agreement == pytest.approx(2 / 3)


def test_interval_is_students_over_paired_windows() -> None:
    rows = [quality.Scores(2.0 + i, 2.0 + i + change, 0.1, 1.0) for i, change in enumerate((0, 2))]
    found = {item.name: item for item in quality.scheme_figures(rows, {})}
    difference = found["log_perplexity_difference"]
    assert difference.value == 1.0 and difference.spread is not None
    assert difference.spread.high - difference.value == pytest.approx(12.706, rel=1e-3)
    assert found["perplexity_ratio"].value == pytest.approx(math.e)


def test_rounding_error_tells_a_grid_from_none(tiny_model: Decoder) -> None:
    assert 0.003 < quality.rounding_error(tiny_model) < 0.01
    with torch.no_grad():
        for name, weight in tiny_model.named_parameters():
            if name.startswith("model.layers.") and weight.ndim > 1:
                # 48 channels are no whole groups: the last 16 are left out
                whole = weight.shape[1] // 32 * 32
                weight[:, :whole] = round_int4(weight[:, :whole], 32)
                weight[:, whole:] = 0
    assert quality.rounding_error(tiny_model) < 1e-5


def test_gates_hold_for_the_scheme_they_name() -> None:
    gates = {"int8": 1.005}
    assert quality.over_gates([ratio(1.005), ratio(2.0, "int4")], gates) == []
    for value in (1.0051, math.nan):
        (line,) = quality.over_gates([ratio(value)], gates)
        assert "m, int8" in line


@pytest.mark.parametrize(
    "words",
    [
        ["--gate", "int4"],
        ["--gate", "int5=1.1"],
        ["--gate", "int4=nan"],
        ["--schemes", "int8", "--gate", "int4=1.1"],
        ["--keep", "folder"],
        ["--finetune", "0"],
    ],
)
def test_options_that_do_not_fit_are_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        quality.read_options(words)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


@NEEDS_KERNELS
def test_whole_benchmark(
    tiny_model: Decoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, text, kept = tmp_path / "model", tmp_path / "text.txt", tmp_path / "kept"
    deepseek.save(tiny_model, source)
    text.write_text("A river flows on land towards another body of water. " * 40)
    words = ["--model", str(source), "--text", str(text), "--tokens", "1024", "--json"]
    words += ["--schemes", "float32", "int4", "--gate", "int4=0.5"]
    assert quality.main([*words, "--finetune", "2", "--keep", str(kept)]) == 1
    result = json.loads(capsys.readouterr().out)
    assert [line.split(":")[0].split(", ")[1] for line in result["over_gates"]] == ["int4", "int4"]
    found = [Measurement.from_dict(item) for item in result["measurements"]]
    exact = [item.value for item in found if item.conditions.get("scheme") == "float32"]
    assert exact == pytest.approx([1, 0, 0, 1] * 2, abs=1e-4)
    before, after = (item.value for item in found if item.name == "perplexity")
    assert before != after
    assert "--keep" in found[0].command
    assert quality.main([*words, "--finetune", "2", "--keep", str(kept)]) == 2
    assert "must be new or empty" in capsys.readouterr().err
