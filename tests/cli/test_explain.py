"""`deepseek explain`: kernels and costs where the engine runs, and why where it does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek import face, hub
from deepseek.generate.modules import engine_of
from deepseek.models import Decoder
from deepseek.ops.cpu import why_missing
from tests.cli.conftest import Run
from tests.grids import put_on_grids
from tests.hub.tiny import tiny_decoder, write_gguf
from tests.models.zoo import ours, reference

NEEDS_KERNELS = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))


@NEEDS_KERNELS
def test_it_names_a_kernel_for_every_operation(run: Run, tiny_folder: str) -> None:
    words = ["explain", tiny_folder, "--scheme", "int4", "--rows", "3", "--context", "7"]
    ended = run(*words, "--json")
    assert ended.code == 0 and ended.err == ""
    found = ended.object
    assert (found["engine"], found["scheme"], found["rows"], found["context"]) == (
        True,
        "int4",
        3,
        7,
    )
    names = [row["operation"] for row in found["operations"]]
    assert names == ["qkv", "attention", "o", "swiglu", "down", "head"]
    assert all(row["kernel"] and row["why"] and row["count"] for row in found["operations"])
    sums = {item["name"]: item["value"] for item in found["measurements"]}
    for name in ("weight_bytes", "cache_bytes", "products"):
        assert sums[f"{name}_per_step"] == sum(row[name] for row in found["operations"]) > 0
    assert "--rows 3 --context 7" in found["measurements"][0]["command"]


@NEEDS_KERNELS
def test_weights_on_grids_are_told_as_they_are(run: Run, tmp_path: Path) -> None:
    model, folder = tiny_decoder(), str(tmp_path)
    weights = put_on_grids(model, {"down": (8, None, True), "": (4, 32, False)})
    hub.save(model, folder, quantized=hub.Quantized(weights=weights, kv="int8"))
    found = run("explain", folder, "--json").object
    assert found["scheme"] == "stored-kv8"
    stored = {row["operation"]: row["storage"] for row in found["operations"]}
    assert stored == {
        "qkv": "int4",
        "attention": "int8",
        "o": "int4",
        "swiglu": "int4",
        "down": "int8",
        "head": "int4",
    }
    assert "--scheme" not in found["measurements"][0]["command"]
    shown = run("show", folder, "--json").object
    assert shown["weights_on_grids"] == "int4 in groups of 32 (13), int8 by rows (2)"
    assert shown["kv"] == "int8"
    assert "int8 by rows (2)" in " ".join(run("show", folder).out.split())


@NEEDS_KERNELS
def test_a_person_sees_a_table_and_the_reasons(run: Run, tiny_folder: str) -> None:
    shown = run("explain", tiny_folder).out
    assert "float32: a step of one row that sees 512 tokens" in " ".join(shown.split())
    assert "swiglu" in shown and "96 × 32" in shown and "exact" in shown
    assert "2 rows that each see" in " ".join(
        run("explain", tiny_folder, "--rows", "2").out.split()
    )


@NEEDS_KERNELS
def test_torch_is_not_imported(tiny_folder: str) -> None:
    program = (
        "import sys\nfrom deepseek.cli.main import main\n"
        f"code = main(['explain', {tiny_folder!r}, '--scheme', 'int8', '--json'])\n"
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    answer, last = done.stdout.splitlines()
    assert last == "0 False", done.stderr
    assert json.loads(answer)["scheme"] == "int8"


def encoder(folder: Path) -> None:
    torch.manual_seed(0)
    from deepseek.models.families import build_model, config_from_hf

    config = config_from_hf(
        {
            "model_type": "bert",
            "vocab_size": 50,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
        }
    )
    hub.save(build_model(config), folder)


def latent(folder: Path) -> None:
    hub.save(ours(reference("deepseek-v3")), folder)


def half(folder: Path) -> None:
    hub.save(ours(reference("llama")).half(), folder)


def half_gguf(folder: Path) -> None:
    write_gguf(folder, tiny_decoder(), kind=gguf.GGMLQuantizationType.F16)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (encoder, "it is an encoder"),
        (latent, "latent attention has no flat instruction"),
        (half, "the weights are F16; the engine takes float32 or bfloat16"),
        (half_gguf, "the weights are float16; the engine takes float32 or bfloat16"),
    ],
)
def test_why_a_model_does_not_run_on_the_engine(make, said: str, run: Run, tmp_path: Path) -> None:
    make(tmp_path / "model.gguf")
    ended = run("explain", str(tmp_path / "model.gguf"))
    assert ended.code == 0 and ended.out.count("\n") == 1
    assert "runs through PyTorch" in ended.out and said in ended.out
    found = run("explain", str(tmp_path / "model.gguf"), "--json").object
    assert not found["engine"] and said in found["why"]


def test_without_kernels_it_says_so(
    run: Run, tiny_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepseek.ops.cpu.why_missing", lambda: "no compiler was there")
    assert run("explain", tiny_folder, "--json").object["why"] == "no compiler was there"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "must be a known name"),
        ([".", "--rows", "0"], "must be a whole number of at least 1; got '0'"),
        ([".", "--scheme", "int3"], "invalid choice: 'int3'"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str, run: Run) -> None:
    ended = run("explain", *words)
    assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1


@NEEDS_KERNELS
@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0"])
@pytest.mark.parametrize("scheme", [None, "int8"])
def test_a_gguf_file_is_explained_as_it_runs(kind: str, scheme: str | None, tmp_path: Path) -> None:
    stored = gguf.GGMLQuantizationType[kind]
    path = write_gguf(tmp_path / "tiny.gguf", tiny_decoder(), kind=stored)
    facts = face.engine_facts(path, scheme=scheme)
    model = face.load(path, scheme=scheme)
    assert isinstance(model, Decoder)
    engine = engine_of(model)
    assert engine is not None and facts.scheme == engine.scheme and facts.reason is None
    assert facts.config == model.config


@NEEDS_KERNELS
def test_a_tensor_that_the_model_does_not_use_does_not_count(tmp_path: Path) -> None:
    """Old checkpoints hold the angles of rope in float32 beside weights in bfloat16."""
    folder = tmp_path / "model"
    hub.save(ours(reference("llama")).to(torch.bfloat16), folder)
    (folder / "bundle.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    engine = face.load_engine(folder, keep=False)
    assert engine is not None and engine.scheme.name == "bfloat16"
