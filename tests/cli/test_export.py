"""`deepseek export`: what is made, what is said, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek.cli import main as cli
from deepseek.export import FORMATS, open_exported
from tests.cli.conftest import Run


def test_export_writes_files_and_one_object(run: Run, tiny_folder: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    words = ("export", tiny_folder, "--format", "onnx", "--out", str(tmp_path / "out"))
    done = run(*words, "--optimize", "--quantize", "int8", "--json")
    assert done.code == 0
    found = done.object
    assert [each["name"] for each in found["files"]] == ["model.onnx", "model.onnx.data"]
    named = {each["name"]: each["value"] for each in found["measurements"]}
    assert named["exported_bytes"] == sum(each["bytes"] for each in found["files"])
    assert open_exported(tmp_path / "out").kind == "decoder"
    again = run(*words)
    assert again.code == 0
    assert "model.onnx" in again.out


def test_formats_are_listed_with_what_runs_here(run: Run) -> None:
    done = run("export", "--formats", "--json")
    rows = {each["format"]: each for each in done.object["formats"]}
    assert set(FORMATS) <= set(rows)
    assert rows["gguf"]["read"] == "no: llama.cpp"
    assert "onnx" in run("export", "--formats").out


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ((), "MODEL"),
        (("x",), "--format"),
        (("x", "--format", "onnx"), "--out"),
        (("x", "--format", "onx", "--out", "y"), "onx"),
        (("no-such-model", "--format", "onnx", "--out", "y"), "no-such-model"),
    ],
)
def test_mistakes_are_one_line(run: Run, words: tuple[str, ...], match: str) -> None:
    done = run("export", *words)
    assert done.code == 2
    assert match in done.err
    assert done.err.count("\n") == 1


def test_an_option_of_another_format_is_refused(run: Run, tiny_folder: str, tmp_path: Path) -> None:
    words = ("export", tiny_folder, "--format", "gguf", "--out", str(tmp_path / "out"))
    done = run(*words, "--quantize", "int8")
    assert done.code == 2
    assert "floats" in done.err
    assert not (tmp_path / "out").exists()


def test_ds_export_is_the_same_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["ds_export", "--formats"])
    assert cli.export_main() == 0
    assert "onnx" in capsys.readouterr().out
