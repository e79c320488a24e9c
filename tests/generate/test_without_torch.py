"""An engine of a bundle runs in a process that never imports torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepseek import face
from deepseek.generate import Engine, generate
from deepseek.models import Decoder
from deepseek.ops.cpu import why_missing
from tests.grids import put_on_grids
from tests.hub.tiny import tiny_decoder
from tests.models.zoo import ours, reference

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))

PROBE = """
import json, sys
from deepseek.face import load_engine
from deepseek.generate import generate
engine = load_engine(sys.argv[1], scheme=sys.argv[2] or None)
found = generate(engine, [5, 7, 11], max_tokens=12, ignore_eos=True)
print(json.dumps({"tokens": found.token_ids, "torch": "torch" in sys.modules}))
"""


@pytest.mark.parametrize("scheme", ["float32", "int8-kv8"])
@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3"])
def test_tokens_are_those_of_the_model(tmp_path: Path, case: str, scheme: str) -> None:
    model = ours(reference(case))
    folder = tmp_path / "bundle"
    face.hub.save(model, folder)
    loaded = face.load(folder, scheme=scheme)
    assert isinstance(loaded, Decoder)
    expected = generate(loaded, [5, 7, 11], max_tokens=12, ignore_eos=True)
    assert not isinstance(expected, list)
    words = [sys.executable, "-c", PROBE, str(folder), scheme]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    answer = json.loads(done.stdout)
    assert answer == {"tokens": list(expected.token_ids), "torch": False}


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
def test_weights_keep_their_grids(tmp_path: Path, layout: str) -> None:
    model, folder = tiny_decoder(), tmp_path / "bundle"
    weights = put_on_grids(model, {"proj": (4, 32, False)})
    quantized = face.hub.Quantized(weights=weights, layout=layout)
    face.hub.save(model, folder, quantized=quantized)
    loaded = face.load(folder)
    assert isinstance(loaded, Decoder)
    expected = generate(loaded, [5, 7, 11], max_tokens=12, ignore_eos=True)
    assert not isinstance(expected, list)
    words = [sys.executable, "-c", PROBE, str(folder), ""]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    answer = json.loads(done.stdout)
    assert answer == {"tokens": list(expected.token_ids), "torch": False}


def test_latent_attention_has_no_engine_and_a_scheme_for_it_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    face.hub.save(ours(reference("deepseek-v3")), folder)
    assert face.load_engine(folder) is None
    with pytest.raises(face.ConfigError, match="latent"):
        face.load(folder, scheme="int8")


def test_the_weights_of_the_file_are_given_back(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    model = ours(reference("llama"))
    face.hub.save(model.to(torch.bfloat16), folder)
    engine = face.load_engine(folder)
    assert isinstance(engine, Engine)
    assert engine.scheme.name == "bfloat16"
    assert engine.weight_bytes > 0
