"""Files of adapters: what PEFT writes is read, all else is one error that says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from deepseek.errors import CapacityError, FormatError
from deepseek.hub.adapter import CONFIG, MAX_CONFIG_BYTES, WEIGHTS, read_adapter
from deepseek.models import Decoder
from tests.generate.conftest import TINY

MB = 1 << 20
Q = "model.layers.0.self_attn.q_proj"
DOWN, UP = (f"base_model.model.{Q}.lora_{part}.weight" for part in "AB")


def write(folder: Path, tensors: dict[str, np.ndarray] | None = None, **fields: Any) -> Path:
    """Write an adapter of rank 2 beside one matrix, with some things changed."""
    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(0)
    if tensors is None:
        tensors = {
            DOWN: draw.normal(size=(2, 32)).astype(np.float32),
            UP: draw.normal(size=(32, 2)).astype(np.float32),
        }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
    (folder / CONFIG).write_text(json.dumps(config | fields))
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)
    return folder


def by_peft(folder: Path, **settings: Any) -> Decoder:
    """Write an adapter of random matrices by PEFT and return the model that it stands beside."""
    torch.manual_seed(0)
    model = Decoder(TINY)
    adapted = peft.get_peft_model(model, LoraConfig(**settings))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.normal_()
    adapted.save_pretrained(str(folder))
    return model


SETTINGS = {
    "plain": {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "down_proj"]},
    "root": {"r": 4, "lora_alpha": 10, "target_modules": ["v_proj"], "use_rslora": True},
    "all linear": {"r": 3, "target_modules": "all-linear", "exclude_modules": ["lm_head"]},
    "regex": {"r": 2, "target_modules": r".*layers\.1.*(q|k)_proj"},
    "one layer": {"r": 2, "target_modules": ["o_proj"], "layers_to_transform": [1]},
    "patterns": {
        "r": 4,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"k_proj": 7, "^model.layers.1.mlp.up_proj": 2, "0.mlp.up_proj": 3},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 11},
    },
    "gaussian": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_updates_are_those_of_peft(case: str, tmp_path: Path) -> None:
    model = by_peft(tmp_path, task_type="CAUSAL_LM", **SETTINGS[case])
    layers = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    found = read_adapter(tmp_path, max_bytes=MB)
    assert found.updates.keys() == {f"{name}.weight" for name in layers}
    for name, layer in layers.items():
        down, up, scale = found.updates[f"{name}.weight"]
        expected = layer.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(scale * up @ down, expected, rtol=1e-5, atol=1e-5)
    assert found.num_bytes == sum(down.nbytes + up.nbytes for down, up, _ in found.updates.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_floats_are_widened(dtype: torch.dtype, tmp_path: Path) -> None:
    write(tmp_path)
    values = {DOWN: torch.randn(2, 32).to(dtype), UP: torch.randn(32, 2).to(dtype)}
    safetensors.torch.save_file(values, str(tmp_path / WEIGHTS))
    (update,) = read_adapter(tmp_path, max_bytes=MB).updates.values()
    assert np.array_equal(update.down, values[DOWN].float().numpy())
    assert np.array_equal(update.up, values[UP].float().numpy())
    assert update.down.dtype == np.float32


def test_the_fingerprint_is_of_what_is_computed(tmp_path: Path) -> None:
    first = read_adapter(write(tmp_path / "a"), max_bytes=MB).fingerprint
    same = write(tmp_path / "b", lora_dropout=0.3, base_model_name_or_path="x", revision="y")
    assert read_adapter(same, max_bytes=MB).fingerprint == first
    assert read_adapter(same, max_bytes=MB).base == "x"
    draw = np.random.default_rng(0)
    values = [draw.normal(size=(2, 32)).astype(np.float32), draw.normal(size=(32, 2)).astype("f4")]
    moved = {
        name.replace("layers.0", "layers.1"): each
        for name, each in zip((DOWN, UP), values, strict=True)
    }
    changed = values[0].copy()
    changed[1, 31] = np.nextafter(changed[1, 31], np.float32(9))
    others = [
        write(tmp_path / "c", lora_alpha=7),
        write(tmp_path / "d", use_rslora=True),
        write(tmp_path / "e", moved),
        write(tmp_path / "f", {DOWN: changed, UP: values[1]}),
    ]
    found = {read_adapter(each, max_bytes=MB).fingerprint for each in others}
    assert len(found | {first}) == 5


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "peft_type"),
    "no method": ({"peft_type": None}, "peft_type"),
    "dora": ({"use_dora": True}, "use_dora"),
    "biases": ({"bias": "all"}, "bias"),
    "bias of B": ({"lora_bias": True}, "lora_bias"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "activated": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "repeated layers": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "parameters": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    "a method of tomorrow": ({"use_new_thing": {"a": 1}}, "use_new_thing"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    "start of a wrong type": ({"init_lora_weights": {}}, "init_lora_weights"),
    "no rank": ({"r": None}, "r of"),
    "rank 0": ({"r": 0}, "r of"),
    "rank as truth": ({"r": True}, "r of"),
    "alpha missing": ({"lora_alpha": None}, "lora_alpha"),
    "alpha no number": ({"lora_alpha": float("nan")}, "lora_alpha"),
    "alpha huge": ({"lora_alpha": 10**400}, "lora_alpha"),
    "alpha text": ({"lora_alpha": "8"}, "lora_alpha"),
    "root as text": ({"use_rslora": "no"}, "use_rslora"),
    "a pattern that runs": ({"rank_pattern": {"(a+)+$": 2}}, "rank_pattern"),
    "patterns as list": ({"alpha_pattern": [1]}, "alpha_pattern"),
    "rank of a pattern": ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern"),
    "other rank": ({"r": 3}, "shapes"),
    "other rank by pattern": ({"rank_pattern": {"q_proj": 4}}, "shapes"),
    "no target": ({"target_modules": ["v_proj"]}, "target_modules"),
    "part of a target": ({"target_modules": ["proj"]}, "target_modules"),
    "targets of a wrong type": ({"target_modules": [1]}, "target_modules"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_compute_something_else_is_refused_in_one_line(
    case: str, tmp_path: Path
) -> None:
    fields, words = REFUSED[case]
    with pytest.raises(FormatError, match=words) as caught:
        read_adapter(write(tmp_path, **fields), max_bytes=MB)
    assert "\n" not in str(caught.value)


def matrix(*shape: int, kind: str = "f4") -> np.ndarray:
    return np.ones(shape, kind)


TENSORS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "none": ({}, "at least one"),
    "half a pair": ({DOWN: matrix(2, 32)}, "lora_A and lora_B"),
    "embedding": ({"base_model.model.model.embed_tokens.lora_embedding_A": matrix(2, 9)}, "tensor"),
    "magnitudes": ({DOWN.replace("lora_A", "lora_magnitude_vector"): matrix(32, 1)}, "tensor"),
    "whole module": ({"base_model.model.lm_head.weight": matrix(9, 9)}, "tensor"),
    "no prefix": ({f"{Q}.lora_A.weight": matrix(2, 32)}, "tensor"),
    "a vector": ({DOWN: matrix(32), UP: matrix(32, 2)}, "a matrix"),
    "integers": ({DOWN: matrix(2, 32, kind="i4"), UP: matrix(32, 2)}, "a matrix"),
    "ranks that differ": ({DOWN: matrix(2, 32), UP: matrix(32, 3)}, "shapes"),
    "infinite": ({DOWN: matrix(2, 32), UP: matrix(32, 2) * np.float32(np.inf)}, "finite"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_belong_are_refused(case: str, tmp_path: Path) -> None:
    tensors, words = TENSORS[case]
    with pytest.raises(FormatError, match=words):
        read_adapter(write(tmp_path, tensors), max_bytes=MB)


def test_a_rank_above_the_largest_is_refused(tmp_path: Path) -> None:
    tensors = {DOWN: matrix(257, 32), UP: matrix(32, 257)}
    with pytest.raises(FormatError, match="at most 256"):
        read_adapter(write(tmp_path, tensors, r=257), max_bytes=MB)


def test_files_that_are_missing_or_pickles(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        read_adapter(tmp_path / "nowhere", max_bytes=MB)
    write(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FormatError, match="no such file"):
        read_adapter(tmp_path, max_bytes=MB)
    (tmp_path / "adapter_model.bin").write_bytes(b"never opened")
    with pytest.raises(FormatError, match="pickle"):
        read_adapter(tmp_path, max_bytes=MB)
    os.mkfifo(tmp_path / WEIGHTS)  # would be waited for, for ever
    with pytest.raises(FormatError):
        read_adapter(tmp_path, max_bytes=MB)


def test_bounds_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(CapacityError, match="at most 511 bytes"):
        read_adapter(tmp_path, max_bytes=511)
    assert read_adapter(tmp_path, max_bytes=512).num_bytes == 512
    (tmp_path / CONFIG).write_text(" " * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(FormatError, match="size"):
        read_adapter(tmp_path, max_bytes=MB)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\xff", '"x"'])
def test_a_config_that_is_no_table(text: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError):
        read_adapter(tmp_path, max_bytes=MB)


Change = Callable[[bytes], bytes]


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damaged_files_are_a_format_error_or_another_adapter(
    tmp_path: Path, data: st.DataObject
) -> None:
    """Whatever bytes change or are missing, nothing else is raised."""
    write(tmp_path)
    path = tmp_path / data.draw(st.sampled_from([WEIGHTS, CONFIG]))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for place in data.draw(st.lists(st.integers(0, max(0, len(content) - 1)), max_size=4)):
        content[place : place + 1] = bytes([data.draw(st.integers(0, 255))])
    path.write_bytes(content)
    try:
        found = read_adapter(tmp_path, max_bytes=MB)
    except (FormatError, CapacityError):
        return
    assert found.num_bytes <= MB


def test_it_loads_no_torch(tmp_path: Path) -> None:
    write(tmp_path)
    code = (
        "import sys\nfrom pathlib import Path\nfrom deepseek.hub.adapter import read_adapter\n"
        f"read_adapter(Path({str(tmp_path)!r}), max_bytes=9999)\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
