"""`deepseek bench attention`: its contenders, its figures, its tables, and users' mistakes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from deepseek import hub
from deepseek.cli.attention_contenders import routing_of
from deepseek.cli.attention_quality import documents
from deepseek.cli.attention_speed import exponents
from deepseek.cli.main import main
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
        recent, routed = routing_of("recent", length), routing_of("routed-8", length)
        assert recent is not None and routed is not None and routed.refresh == 8
        assert routed.means and not recent.means and not routing_of("bare-1", 4096).means  # type: ignore[union-attr]
        block = (length - 1) // 64
        seen = routed.blocks_seen(block) // 2
        assert recent.blocks_seen(block) == seen == recent.recent + 1


def test_documents_are_spread_over_the_text() -> None:
    assert documents(range(100), 40, 3) == [list(range(at, at + 40)) for at in (0, 30, 60)]
    with pytest.raises(ConfigError, match="at least 101 tokens long; got '100 tokens'"):
        documents(range(100), 101, 2)


def test_exponents_are_slopes_of_three_lengths_at_least() -> None:
    def seconds(contender: str, length: int, value: float) -> Measurement:
        about = {"contender": contender, "length": length}
        return Measurement(name="attention_s", value=value, unit="s", conditions=about)

    square = [seconds("dense", n, n**2 / 1e6) for n in (100, 200, 400)]
    (found,) = exponents([*square, seconds("routed-1", 100, 1.0)])
    assert found.value == pytest.approx(2.0) and found.conditions["contender"] == "dense"


@NEEDS_KERNELS
def test_quality_of_dense_is_its_own(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "attention", folder, "--quality", "--lengths", "1300", "--documents", "2"]
    words += ["--probes", "1", "--contenders", "routed-4", "recent"]
    assert main([*words, "--json"]) == 0
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
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "1,300 recent" in told and "KL, nats" in told and "1.0000" in told


@NEEDS_KERNELS
def test_speed_is_measured_and_drawn(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = tmp_path / "attention.svg"
    words = ["bench", "attention", folder, "--lengths", "1100", "1500", "2000", "--repeats", "1"]
    words += ["--contenders", "dense", "routed-1", "--plot", str(drawn), "--longest-dense", "1500"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "2,000 routed-1" in told and "power" in told and "1,100 sdpa" in told
    assert "1,500 dense" in told and "2,000 dense" not in told
    assert drawn.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["attention", "FOLDER", "--contenders", "routed-x"], "must be dense, recent, routed-N"),
        (["attention", "FOLDER", "--contenders", "routed-3"], "divisor of 64"),
        (["attention", "FOLDER", "--quality", "--plot", "x.svg"], "plot of bench attention"),
        (["attention", "FOLDER", "--plot", "x.doc"], "ends in .svg, .png, .pdf"),
        (["attention", "FOLDER", "--plot", "/nowhere/x.svg"], "in a folder that is there"),
        (["attention", "nobody"], "nobody"),
        (["FOLDER", "--lengths", "100"], "behind the word attention"),
        (["FOLDER", "FOLDER"], "behind the word attention"),
    ],
)
def test_a_mistake_is_one_line(
    folder: str, words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *(folder if word == "FOLDER" else word for word in words)]) == 2
    told = capsys.readouterr().err
    assert line in told and len(told.strip().splitlines()) == 1


def test_a_text_that_is_too_short_is_one_line(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    words = ["bench", "attention", folder, "--quality", "--lengths", "1300", "--text", str(short)]
    assert main(words) == 2
    assert "must be at least 1300 tokens long" in capsys.readouterr().err
