"""`deepseek bench attention`: its contenders, its figures, its tables, and users' mistakes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from deepseek import hub
from deepseek.cli import attention_quality
from deepseek.cli.attention_contenders import read, routing_of
from deepseek.cli.attention_quality import documents
from deepseek.cli.attention_speed import Peer, Times, _figures, exponents
from deepseek.cli.kept import Kept
from deepseek.cli.main import main
from deepseek.errors import ConfigError, FormatError
from deepseek.evaluate import default_corpus
from deepseek.models import Decoder
from deepseek.ops.routing import Routing
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


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a file with a text of a few thousand bytes."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(default_corpus().text[:6000])
    return str(path)


def test_recent_sees_as_many_tokens_as_routed_attention() -> None:
    for length in (1000, 4096, 8192, 50_000):
        recent, routed = routing_of("recent", length), routing_of("routed-8", length)
        assert recent is not None and routed is not None and routed.refresh == 8
        assert routed.means and not recent.means and not routing_of("bare-1", 4096).means  # type: ignore[union-attr]
        block = (length - 1) // 64
        seen = routed.blocks_seen(block) // 2
        assert recent.blocks_seen(block) == seen == recent.recent + 1


@pytest.mark.parametrize("seen", [200, 700.5, 950, 1400])
def test_recent_sees_as_many_tokens_as_it_is_told_to(seen: float) -> None:
    recent = routing_of("recent", 2048, seen)
    assert recent is not None and recent.recent + recent.first == recent.blocks_seen(31)
    assert 64 * recent.blocks_seen(31) == pytest.approx(seen, abs=32)


def test_a_contender_may_have_a_threshold_of_its_own() -> None:
    routing = routing_of("routed-2:0.03", 4096)
    assert routing == Routing(refresh=2, threshold=0.03)
    assert routing_of("bare-1:0", 4096) == Routing(threshold=0, means=False)


def test_documents_are_spread_over_the_texts_and_stay_in_one() -> None:
    assert documents([range(100)], 40, 3) == [list(range(at, at + 40)) for at in (0, 30, 60)]
    assert documents([range(100)], 40, 1) == [list(range(40))]
    texts = [range(0, 50), range(100, 120), range(200, 250)]
    found = documents(texts, 40, 4)
    assert [each[0] for each in found] == [0, 7, 203, 210]
    assert all(each == list(range(each[0], each[0] + 40)) for each in found)
    with pytest.raises(ConfigError, match="at least 101 tokens long; got '100 tokens'"):
        documents([range(100), range(7)], 101, 2)


def test_a_step_is_measured_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    asked = []

    def measure(value: float) -> float:
        asked.append(value)
        return value

    for _ in range(2):
        kept = Kept(path, {"documents": 2})
        assert kept.step([1, "a"], lambda: measure(0.1)) == 0.1
        assert kept.step([1, "b"], lambda: measure(0.2)) == 0.2
    assert asked == [0.1, 0.2]
    cut = path.read_bytes()
    path.write_bytes(cut[:-3])
    assert Kept(path, {"documents": 2}).step([1, "b"], lambda: measure(0.3)) == 0.3
    assert asked == [0.1, 0.2, 0.3] and path.read_bytes() == cut.replace(b"0.2", b"0.3")
    with pytest.raises(ConfigError, match=r"same measurement \(documents differ\)"):
        Kept(path, {"documents": 3})
    assert path.read_bytes() == cut.replace(b"0.2", b"0.3")
    Kept(None, {}).step("a", lambda: measure(0.4))
    path.write_text("a story\n")
    with pytest.raises(FormatError, match="a file that this benchmark wrote"):
        Kept(path, {"documents": 3})


def test_exponents_are_slopes_of_three_lengths_at_least() -> None:
    def seconds(contender: str, length: int, value: float) -> Measurement:
        about = {"contender": contender, "length": length}
        return Measurement(name="attention_s", value=value, unit="s", conditions=about)

    square = [seconds("dense", n, n**2 / 1e6) for n in (100, 200, 400)]
    (found,) = exponents([*square, seconds("routed-1", 100, 1.0)])
    assert found.value == pytest.approx(2.0) and found.conditions["contender"] == "dense"


QUALITY = ["--quality", "--lengths", "1800", "--documents", "2", "--probes", "1"]


def measured(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, float]]:
    """Return what `deepseek bench attention --quality` prints: names, contenders, values."""
    assert main(["bench", "attention", *words, *QUALITY, "--json"]) == 0
    found: dict[str, dict[str, float]] = {}
    for each in json.loads(capsys.readouterr().out)["measurements"]:
        found.setdefault(each["name"], {})[each["conditions"]["contender"]] = each["value"]
    return found


@NEEDS_KERNELS
def test_quality_of_dense_is_its_own(
    folder: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [folder, "--text", text, "--contenders"]
    figures = measured([*words, "routed-4", "recent"], capsys)
    ratios = figures["perplexity_ratio"]
    assert ratios["dense"] == 1.0 and figures["kl_divergence"]["dense"] == 0.0
    assert 0 < abs(ratios["routed-4"] - 1) < 0.1 and math.isfinite(ratios["recent"])
    assert figures["kl_divergence"]["routed-4"] > 0
    seen = figures["tokens_seen"]
    assert seen["recent"] == pytest.approx(seen["routed-4"], abs=33)
    names = {"perplexity", "copy_accuracy", "needle_accuracy", "tracking_accuracy"}
    assert names <= set(figures)
    assert main(["bench", "attention", *words, "recent", *QUALITY]) == 0
    told = capsys.readouterr().out
    assert "1,800 recent" in told and "KL, nats" in told and "1.0000" in told


@NEEDS_KERNELS
def test_a_stopped_measurement_goes_on(
    folder: str,
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = tmp_path / "kept.jsonl"
    words = [folder, "--text", text, "--contenders", "routed-1"]
    whole = measured(words, capsys)
    reads: list[int] = []

    def stopping(*args: object, **options: object) -> object:
        reads.append(1)
        if len(reads) == 5:
            raise KeyboardInterrupt
        return read(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(attention_quality, "read", stopping)
    words += ["--keep", str(kept)]
    assert main(["bench", "attention", *words, *QUALITY]) == 130
    capsys.readouterr()
    assert len(kept.read_text().splitlines()) == 1 + 4
    assert measured(words, capsys) == whole
    reads.clear()
    assert measured(words, capsys) == whole and not reads


def test_shares_of_dense_are_by_task() -> None:
    dense = {"copy": [10, 8], "needle": [0, 0], "variables": [4, 0]}
    found = attention_quality.retained(
        {"copy": [9, 9], "needle": [1, 0], "variables": [3, 0]}, dense, {"contender": "recent"}
    )
    values = [(each.name, each.conditions.get("task"), each.value) for each in found]
    assert values == [
        ("retained", "copy", 1.0),
        ("retained", "variables", 0.75),
        ("retained_mean", None, 0.875),
    ]
    assert found[0].spread is not None and found[1].spread is None


def test_ratios_are_of_the_same_round() -> None:
    rounds = [Times(1.0, 3.0, 0.1, 0.05), Times(2.0, 6.0, 0.2, 0.1), Times(1.0, 2.0, 0.1, 0.05)]
    peer = [Peer(4.0, 0.1), Peer(8.0, 0.4), Peer(3.0, 0.15)]
    found = {each.name: each for each in _figures(rounds, peer, {"contender": "routed-1"})}
    attention, whole = found["attention_speedup"], found["prefill_speedup"]
    assert attention.value == 4.0 and whole.value == 2.0 and whole.unit == "1"
    assert attention.spread is not None and attention.spread.low == 3.0
    assert found["decode_speedup"].value == pytest.approx(2.0) and found["decode_s"].value == 0.1
    assert found["prefill_s"].value == 3.0 and found["prefill_s"].unit == "s"


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
        (["attention", "FOLDER", "--contenders", "routed-1:x"], "routed-N:THRESHOLD"),
        (["attention", "FOLDER", "--contenders", "routed-1:2"], "threshold of Routing"),
        (["attention", "FOLDER", "--keep", "x.jsonl"], "must be given with --quality"),
        (["attention", "FOLDER", "--quality", "--keep", "/nowhere/x"], "in a folder that is there"),
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
