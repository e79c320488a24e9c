"""`deepseek verify`: what it prints, its exit code, and a run that is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from deepseek import hub
from deepseek.cli.main import main
from tests.export.verifying.planted_format import install, write
from tests.export.verifying.small import small_decoder


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a bundle, with the planted format known to child processes."""
    monkeypatch.setenv("PYTHONPATH", install(tmp_path / "site"))
    hub.save(small_decoder(), tmp_path / "bundle")
    return tmp_path / "bundle"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any], str]:
    code = main(["verify", *map(str, words), "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out), said.err


def test_an_export_that_holds(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (bundle, write(tmp_path / "a", bundle), "--cases", 40, "--report", tmp_path / "r")
    code, found, _ = run(capsys, *words)
    assert code == 0
    assert found["holds"] is True and found["departed"] == []
    assert {each["name"] for each in found["measurements"]} >= {"cases", "kl_divergence"}
    assert (tmp_path / "r" / "report.html").is_file()


def test_an_export_that_departs(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = write(tmp_path / "a", bundle, "off by a little")
    words = (bundle, export, "--cases", 40, "--seed", 3)
    code, found, said = run(capsys, *words, "--report", tmp_path / "r")
    assert code == 1
    first = found["departed"][0]
    assert first["command"].endswith(f"--cases 40 --seed 3 --case {first['id']}")
    assert f"Ask one again with --case {first['id']}" in said.splitlines()[-1]
    file = next((tmp_path / "r" / "cases").glob("*-smallest.json"))
    assert main(["verify", str(bundle), str(export), "--case", str(file)]) == 1
    text = capsys.readouterr().out
    assert "the smallest case found: 1 x 1, 1 tokens" in text
    assert "1 case departs from the source" in text


def test_mistakes(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = write(tmp_path / "a", bundle)
    (tmp_path / "bad.json").write_text('{"rows": 3}')
    mistakes: list[tuple[tuple[object, ...], str]] = [
        ((bundle, tmp_path / "none"), "Make it first: deepseek export"),
        (("no-such-model", export), "no-such-model"),
        ((bundle, export, "--case", tmp_path / "none.json"), "a file that is there"),
        ((bundle, export, "--case", tmp_path / "bad.json"), "a case as verify writes it"),
        ((bundle, bundle), "an export"),
    ]
    for words, told in mistakes:
        code, found, said = run(capsys, *words)
        assert code == 2, words
        assert told in found["error"]["message"]
        assert len(said.splitlines()) == 1


@pytest.mark.slow
def test_a_stopped_run_leaves_a_report(bundle: Path, tmp_path: Path) -> None:
    words = [str(bundle), str(write(tmp_path / "a", bundle)), "--cases", "100000"]
    command = [sys.executable, "-m", "deepseek", "verify", *words, "--report", str(tmp_path / "r")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "case " in line:
            break
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"What was found until then is in {tmp_path / 'r'}" in said
    assert "Traceback" not in said
    written = json.loads((tmp_path / "r" / "report.json").read_text())
    assert written["is_partial"] is True and written["cases_asked"] > 0
