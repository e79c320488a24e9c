"""The benchmark of routed attention: its contenders, its figures, and the whole of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import routing
from deepseek import hub
from deepseek.errors import ConfigError
from deepseek.models import Decoder
from deepseek.records import Measurement
from tests.generate.conftest import TINY, byte_tokenizer
from tests.ops.native import NEEDS_KERNELS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a tiny bundle for 4096 tokens."""
    torch.manual_seed(0)
    model = Decoder(TINY.replace(max_positions=4096))
    model.tokenizer = byte_tokenizer(bos_token="<begin>", eos_token="<end>")
    return str(hub.save(model, tmp_path_factory.mktemp("long") / "bundle", name="long").path)


def test_recent_sees_as_many_tokens_as_routed_attention() -> None:
    for length in (1000, 4096, 8192, 50_000):
        (_, recent), (_, routed) = routing.contenders(("recent", "routed-8"), length)
        assert recent is not None and routed is not None and routed.refresh == 8
        block = (length - 1) // 64
        assert recent.blocks_seen(block) == routed.blocks_seen(block) == recent.recent + 1


def test_documents_are_spread_over_the_text() -> None:
    assert routing.documents(range(100), 40, 3) == [list(range(at, at + 40)) for at in (0, 30, 60)]
    with pytest.raises(ConfigError, match="at least 101 tokens long; got '100 tokens'"):
        routing.documents(range(100), 101, 2)


def test_exponents_are_slopes_of_three_lengths_at_least() -> None:
    def seconds(contender: str, length: int, value: float) -> Measurement:
        about = {"contender": contender, "length": length}
        return Measurement(name="attention_s", value=value, unit="s", conditions=about)

    square = [seconds("dense", n, n**2 / 1e6) for n in (100, 200, 400)]
    (found,) = routing.exponents([*square, seconds("routed-1", 100, 1.0)])
    assert found.value == pytest.approx(2.0) and found.conditions["contender"] == "dense"


@NEEDS_KERNELS
def test_quality_of_dense_is_its_own(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quality", "--model", folder, "--lengths", "1300", "--items", "2", "--probes", "1"]
    assert routing.main([*words, "--contenders", "routed-4", "recent", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["measurements"]
    ratios = {
        each["conditions"]["contender"]: each["value"]
        for each in figures
        if each["name"] == "perplexity_ratio"
    }
    assert ratios["dense"] == 1.0
    assert 0 < abs(ratios["routed-4"] - 1) < 0.1 and math.isfinite(ratios["recent"])
    names = {each["name"] for each in figures}
    assert {"perplexity", "kl_divergence", "copy_accuracy", "needle_accuracy"} <= names


@NEEDS_KERNELS
def test_speed_is_measured_and_drawn(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["speed", "--model", folder, "--lengths", "1100", "1500", "2000", "--rounds", "1"]
    drawn = tmp_path / "routing.svg"
    assert routing.main([*words, "--contenders", "dense", "routed-4", "--plot", str(drawn)]) == 0
    told = capsys.readouterr().out
    assert "routed-4 2000" in told and "exponent" in told and "sdpa 1100" in told
    assert drawn.read_text().startswith("<?xml")


def test_a_text_that_is_too_short_is_one_line(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    words = ["quality", "--model", folder, "--lengths", "1300", "--text", str(short)]
    assert routing.main(words) == 2
    assert "must be at least 1300 tokens long" in capsys.readouterr().err
