"""The benchmark of memory: what its contenders say where they must agree, and what it refuses."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek import hub
from deepseek.data import Tokenizer
from deepseek.models import Decoder
from deepseek.records import Measurement
from tests.generate.conftest import TINY, byte_tokenizer
from tests.house import REPO
from tests.models.zoo import randomize
from tests.ops.native import NEEDS_KERNELS

pytestmark = NEEDS_KERNELS


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    text = folder / "text.txt"
    text.write_text("".join(random.Random(0).choices("abcdef ", k=1400)))
    model = Decoder(TINY.replace(max_positions=512)).eval()
    randomize(model)
    byte_tokenizer(eos_token="<end>").save(folder)
    model.tokenizer = Tokenizer.from_folder(folder)
    hub.save(model, folder / "model")
    command = [sys.executable, "benchmarks/memory.py", "--model", str(folder / "model")]
    command += ["--text", str(text), "--memory", "512", "--piece", "300", *words]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True)


def test_contenders_agree_until_something_is_forgotten(tmp_path: Path) -> None:
    done = run(tmp_path, "--tokens", "1300", "--whole", "700", "--json", "--scheme", "float32")
    assert done.returncode == 0, done.stderr
    listed = [Measurement.from_dict(each) for each in json.loads(done.stdout)["measurements"]]
    found = {
        (each.conditions["contender"], each.conditions["from"]): each.value
        for each in listed
        if each.name == "perplexity"
    }
    assert {place for name, place in found if name == "read-again"} == {0, 300, 600, 900}
    assert {place for name, place in found if name == "whole"} == {0, 300}
    for name in ("without-first", "read-again", "whole"):
        assert found[name, 0] == pytest.approx(found["memory", 0], rel=1e-4)
    assert found["memory", 900] != pytest.approx(found["without-first", 900], rel=1e-4)


def test_a_text_that_is_too_short_is_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, "--tokens", "2000")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "memory: text of the benchmark of memory must be longer than 2000"
    )
    assert len(done.stderr.splitlines()) == 1
