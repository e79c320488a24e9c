"""The decoding benchmark runs, proves equality first, and writes measurements with the hardware."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek.records import Measurement
from tests.generate.conftest import byte_tokenizer
from tests.house import REPO


@pytest.mark.slow
def test_decode_benchmark_writes_measurements(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
    )
    model = tmp_path / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    byte_tokenizer(eos_token="<end>").save(model)
    options = ["--model", str(model), "--tokens", "8", "--rounds", "2", "--prompt-tokens", "16"]
    done = subprocess.run(
        [sys.executable, "benchmarks/run.py", "decode", "--out", str(tmp_path), "--", *options],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "decode.json").read_text())
    assert {"processor", "threads", "versions", "commit"} <= set(written["hardware"])
    found = [Measurement.from_dict(item) for item in written["measurements"]]
    assert {item.conditions["dtype"] for item in found} == {"float32", "bfloat16"}
    speedup = next(item for item in found if item.name == "decode_speedup")
    assert speedup.value > 0 and speedup.spread is not None


def test_unknown_benchmark_is_refused() -> None:
    command = [sys.executable, "benchmarks/run.py", "nothing"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2
    assert "decode" in done.stderr
