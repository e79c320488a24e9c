"""`deepseek train`: a run, its proof, its report, and what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from deepseek.cli.verbs.train import _span, _stages_of_slow_products
from deepseek.ops import hardware
from deepseek.train import Run as TrainingRun
from deepseek.train import Source, Stage
from tests.cli.conftest import Run


@pytest.fixture
def written(tiny_folder: str, tmp_path: Path) -> Path:
    """Return a run of five steps on a text."""
    (tmp_path / "text.txt").write_text("one and one are two. " * 60)
    stage = {
        "name": "only",
        "data": [{"path": str(tmp_path / "text.txt")}],
        "steps": 5,
        "length": 32,
        "batch": 4,
        "micro_batch": 2,
        "evaluate": [str(tmp_path / "text.txt")],
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": tiny_folder, "stages": [stage]}))
    return path


def test_a_run_with_its_report_and_proof(run: Run, written: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    ended = run("train", str(written), "--out", out, "--json")
    assert ended.code == 0, ended.err
    names = {item["name"] for item in ended.object["measurements"]}
    assert {"training_loss", "tokens_per_s", "mfu", "perplexity"} <= names
    assert "only 5/5  loss" in ended.err
    page = Path(ended.object["report"]).read_text()
    assert page.count("<svg") == 3 and "learning rate" in page
    assert run("generate", ended.object["bundle"], "--prompt", "one", "--max-tokens", "2").code == 0
    proof = run("train", str(written), "--out", out, "--prove", "--json")
    assert proof.code == 0
    assert proof.object["stages"] == [{"stage": "only", "steps": 5, "samples": 20}]


def test_slow_products_are_told_once(
    run: Run, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "only: this processor has no bfloat16 products"
    monkeypatch.setattr(hardware, "_cpu_computes_bf16", lambda: False)
    ended = run("train", str(written), "--out", str(tmp_path / "slow"))
    assert ended.code == 0 and ended.err.count(words) == 1
    values = yaml.safe_load(written.read_text())
    values["stages"][0]["precision"] = "float32"
    (tmp_path / "exact.yaml").write_text(yaml.safe_dump(values))
    exact = run("train", str(tmp_path / "exact.yaml"), "--out", str(tmp_path / "exact"))
    assert exact.code == 0 and words not in exact.err


@pytest.mark.parametrize("has_bf16", [False, True])
def test_bfloat16_runs_in_float32_where_the_processor_has_none(
    has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_cpu_computes_bf16", lambda: has_bf16)
    assert hardware.products_in("float32") == torch.float32
    assert hardware.products_in("bfloat16") == (torch.bfloat16 if has_bf16 else torch.float32)
    stage = Stage(name="only", data=(Source(path="text.txt"),), steps=1)
    slow = _stages_of_slow_products(TrainingRun(model="smollm2-135m", stages=(stage,)))
    assert slow == (set() if has_bf16 else {"only"})


def test_a_proof_that_fails_is_exit_code_1(run: Run, written: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("train", str(written), "--out", str(out)).code == 0
    (path,) = (out / "ledger").iterdir()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] + lines[3:]))
    ended = run("train", str(written), "--out", str(out), "--prove")
    assert ended.code == 1
    assert "step 2: ends before sample" in ended.err and "no" in ended.out


def test_mistakes_are_one_line(run: Run, written: Path, tmp_path: Path) -> None:
    for words, must in (
        ([str(tmp_path / "nothing.yaml"), "--out", "x"], "a file"),
        ([str(written)], "--out"),
        ([str(written), "--out", str(tmp_path / "empty"), "--prove"], "Train first"),
        ([str(written), "--out", str(written)], "run.yaml"),
    ):
        ended = run("train", *words)
        assert ended.code == 2
        assert must in ended.err and len(ended.err.splitlines()) == 1, ended.err


def test_the_folder_of_another_run_is_refused(run: Run, written: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert run("train", str(written), "--out", out).code == 0
    values = yaml.safe_load(written.read_text())
    written.write_text(yaml.safe_dump({**values, "seed": 3}))
    ended = run("train", str(written), "--out", out)
    assert ended.code == 2 and "differ in seed" in ended.err
    assert json.loads((tmp_path / "out" / "run.json").read_text())["seed"] == 0


def test_spans_are_read_by_people() -> None:
    assert _span(59.6) == "1 min 00 s" and _span(3700) == "1 h 01 min"
