"""TensorRT build plans: their shapes fit the graph and each other, as ONNX Runtime finds by running
the graph at them, and their script is one that bash takes."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.errors import ConfigError
from deepseek.export import export, open_exported
from deepseek.export.onnx.ports import read_ports
from deepseek.export.tensorrt import ENGINE, PLAN, SCRIPT, build_steps, profiles_of
from tests.export.readers import saved
from tests.generate.encoders import tiny_encoder
from tests.hub.tiny import tiny_decoder

MODELS = {
    "decoder": tiny_decoder,
    "encoder": tiny_encoder,
    "classifier": lambda: tiny_encoder(labels=("no", "yes")),
}
WHICH = ("min", "opt", "max")


def made(tmp_path: Path, kind: str, **options: Any) -> tuple[Path, dict[str, Any]]:
    export(saved(MODELS[kind](), tmp_path / "a"), "tensorrt", tmp_path / "b", **options)
    return tmp_path / "b", json.loads((tmp_path / "b" / PLAN).read_text())


@pytest.mark.parametrize("kind", MODELS)
def test_the_graph_runs_at_every_shape_of_the_plan(tmp_path: Path, kind: str) -> None:
    folder, plan = made(tmp_path, kind, max_batch=2, max_tokens=24)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    types = {"tensor(int64)": np.int64, "tensor(float)": np.float32}
    wanted = {each.name: types[each.type] for each in session.get_inputs()}
    assert len(plan["profiles"]) == (2 if kind == "decoder" else 1)
    for profile in plan["profiles"]:
        for which in WHICH:
            assert set(profile[which]) == set(wanted)
            feeds = {name: np.ones(shape, wanted[name]) for name, shape in profile[which].items()}
            answer = session.run(None, feeds)[0]
            assert np.isfinite(answer).all()
            assert answer.shape[0] == len(feeds["input_ids"])


def test_the_operators_are_the_standards_own(tmp_path: Path) -> None:
    import onnx

    folder, plan = made(tmp_path, "decoder")
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    assert {each.domain for each in model.opset_import} == {""}
    assert {node.domain for node in model.graph.node} == {""}
    assert model.opset_import[0].version == plan["opset"]


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_the_script_is_the_plan(tmp_path: Path, precision: str) -> None:
    folder, plan = made(tmp_path, "decoder", precision=precision)
    subprocess.run(["bash", "-n", folder / SCRIPT], check=True)
    lines = (folder / SCRIPT).read_text().splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith(("python3", "trtexec"))]
    assert commands == plan["steps"] == build_steps(plan)
    *casts, build = commands
    assert len(casts) == (precision != "float32")
    flags = [flag.partition("=")[::2] for flag in build[1:]]
    source = dict(flags)["--onnx"]
    assert source == (casts[0][casts[0].index("--output_path") + 1] if casts else "model.onnx")
    names = {port.name: port for port in read_ports(folder / "model.onnx")[0]}
    for flag, value in flags:
        if not flag.endswith("Shapes"):
            continue
        for name, _, shape in (part.partition(":") for part in value.split(",")):
            sizes = [int(size) for size in shape.split("x")]
            fixed = zip(sizes, names[name].shape, strict=True)
            assert all(size == wanted for size, wanted in fixed if isinstance(wanted, int))


def test_the_script_runs_its_commands_in_its_folder(tmp_path: Path) -> None:
    folder, plan = made(tmp_path, "encoder")
    fake = tmp_path / "bin" / "trtexec"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\npwd > said\nprintf "%s\\n" "$@" >> said\n')
    fake.chmod(0o755)
    path = f"{fake.parent}:/usr/bin:/bin"
    subprocess.run([folder / SCRIPT], check=True, env={"PATH": path}, cwd=tmp_path)
    where, *arguments = (folder / "said").read_text().splitlines()
    assert Path(where).samefile(folder)
    assert arguments == plan["steps"][0][1:]
    assert f"--saveEngine={ENGINE}" in arguments


@given(st.sampled_from([*MODELS]), st.integers(2, 10**6), st.integers(1, 512))
def test_sizes_are_in_order_and_fit_together(kind: Any, tokens: int, batch: int) -> None:
    for profile in profiles_of(kind, tokens, batch):
        for sizes in profile.values():
            assert sizes.min <= sizes.opt <= sizes.max
        assert profile["batch"].max == batch
        if kind == "decoder":
            lengths = (profile[name] for name in ("total", "past", "tokens"))
            for total, past, fresh in zip(*lengths, strict=True):
                assert total == past + fresh <= tokens


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    folder = saved(tiny_decoder(), tmp_path / "a")
    for options, what in (
        ({"precision": "int8"}, "precision"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_tokens": 129}, "max_tokens"),
    ):
        with pytest.raises(ConfigError, match=what):
            export(folder, "tensorrt", tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()
    export(folder, "tensorrt", tmp_path / "b")
    with pytest.raises(ConfigError, match="NVIDIA GPU"):
        open_exported(tmp_path / "b")
