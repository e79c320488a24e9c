"""`deepseek compress`: one model and a target, a pipeline in a file, and what gates say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deepseek.cli.main import main
from deepseek.hub import Bundle, save
from tests.compress.conftest import start, text
from tests.compress.small import small_decoder

__all__ = ["start", "text"]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any], str]:
    code = main(["compress", *words, "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out.splitlines()[-1]), said.err


def test_int8_in_one_command(
    capsys: pytest.CaptureFixture[str], start: Path, text: Path, tmp_path: Path
) -> None:
    words = (str(start), "--to", "int8", "--no-gates", "--text", str(text), "--kv", "int8")
    code, found, _ = run(capsys, *words, "--out", str(tmp_path / "run"))
    assert code == 0
    bundle = Bundle.open(Path(found["bundle"]), verify=True)
    assert bundle.kv == "int8" and bundle.grids
    assert found["bytes"] == bundle.size_bytes < Bundle.open(start).size_bytes
    assert {item["name"] for item in found["measurements"]}
    again, _, _ = run(capsys, *words, "--out", str(tmp_path / "run"))
    assert again == 0
    assert len((tmp_path / "run" / "ledger.jsonl").read_text().splitlines()) == 1


def test_eight_bits_are_rotated_unless_a_reader_does_not_know_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = small_decoder()
    start, text = save(model, tmp_path / "start").path, tmp_path / "text.txt"
    text.write_text("a few words, again and again. " * 40)
    words = (str(start), "--to", "int8", "--no-gates", "--text", str(text))
    for number, more in enumerate(((), ("--no-rotate",), ("--group", "32"))):
        code, found, _ = run(capsys, *words, *more, "--out", str(tmp_path / str(number)))
        assert code == 0
        rotated = {grid.is_rotated for grid in Bundle.open(Path(found["bundle"])).grids.values()}
        assert (True in rotated) == (not more)
    assert main(["show", str(tmp_path / "0" / "stages" / "1-quantize")]) == 0
    assert "rotated int8 by rows" in " ".join(capsys.readouterr().out.split())


def test_a_gate_that_does_not_hold_is_exit_code_1(
    capsys: pytest.CaptureFixture[str], start: Path, text: Path, tmp_path: Path
) -> None:
    path = tmp_path / "strict.yaml"
    path.write_text(
        f"model: {start}\n"
        "floor_text: " + str(text) + "\n"
        f"stages: [{{kind: quantize, bits: 8, group: null, method: round,"
        f" calibration: {{text: {text}, samples: 2, length: 32}}}}]\n"
        "gates: [{kind: size, most_share: 0.01}]\n"
    )
    out = tmp_path / "run"
    code = main(["compress", str(path), "--out", str(out)])
    said = capsys.readouterr()
    assert code == 1
    assert "gates" in said.err and "size_share" in said.err
    bundle = Bundle.open(out / "stages" / "1-quantize")
    assert bundle.card.is_refused
    assert main(["show", str(bundle.path)]) == 0
    assert "size_share" in capsys.readouterr().out
    code, found, said_ = run(capsys, str(path), "--out", str(out))
    assert code == 1 and "size_share" in said_
    assert [verdict["holds"] for verdict in found["verdicts"]] == [False]
    assert main(["compress", str(path), "--out", str(out), "--no-gates"]) == 0


def test_ctrl_c_says_that_it_goes_on(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    start: Path,
    tmp_path: Path,
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deepseek.compress.quantize.stage.quantize", stop)
    words = ["compress", str(start), "--to", "int8", "--samples", "2", "--out"]
    assert main([*words, str(tmp_path / "run")]) == 130
    assert "goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([*words, str(tmp_path / "run"), "--no-gates"]) == 0
    lines = (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in lines] == [1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "int4"], "group of"),
        (["--to", "int3"], "invalid choice"),
        (["--to", "int4", "--group", "7"], "invalid choice"),
        (["--to", "int8", "--samples", "0"], "--samples"),
        (["--to", "int8", "--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], start: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    code, found, _ = run(capsys, str(start), *words, "--out", str(tmp_path / "run"))
    assert code == 2
    assert said in found["error"]["message"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model: x\nstages: []\n", "at least one"),
        ("model: x\nstages: [{kind: shrink}]\n", "kind"),
        ("model: x\nstages: [{kind: quantize, bits: 5}]\n", "one of 4, 8"),
        ("model: x\nstages: [{kind: quantize}, {kind: distil}]\n", "on the grid of stage"),
        ("model: x\nstages: [{kind: quantize}]\nhats: 2\n", "hats"),
        ("- just\n- a list\n", "fields of a Pipeline"),
        ("model: [\n", "YAML"),
    ],
)
def test_a_file_that_is_no_pipeline_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, said: str
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    code, found, _ = run(capsys, str(path), "--out", str(tmp_path / "run"))
    assert code == 2
    assert said in found["error"]["message"]
    assert not (tmp_path / "run").exists()


def test_options_of_a_target_are_not_those_of_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "one.yaml"
    path.write_text("model: x\nstages: [{kind: quantize}]\n")
    code, found, _ = run(capsys, str(path), "--to", "int8", "--out", str(tmp_path / "run"))
    assert code == 2 and "--to" in found["error"]["message"]
    missing = str(tmp_path / "missing.yaml")
    code, found, _ = run(capsys, missing, "--out", str(tmp_path / "run"))
    assert code == 2 and "missing.yaml" in found["error"]["message"]
