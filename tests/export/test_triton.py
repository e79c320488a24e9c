"""Triton model repositories: the config is one by Triton's own schema and says what the graph says,
and the graph in its place answers as the source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek import hub
from deepseek.errors import ConfigError
from deepseek.export import export, open_exported
from deepseek.export.onnx.ports import Port, read_ports
from deepseek.export.onnx.reader import OnnxReader
from deepseek.export.triton import config_text, model_name
from tests.export.readers import check_forward, check_steps, saved
from tests.generate.encoders import tiny_encoder
from tests.hub.tiny import tiny_decoder

MODELS = {
    "decoder": tiny_decoder,
    "encoder": tiny_encoder,
    "classifier": lambda: tiny_encoder(labels=("no", "yes")),
}


def parsed(text: str) -> Any:
    schema = pytest.importorskip(
        "tritonclient.grpc.model_config_pb2", reason="tritonclient is not installed"
    )
    from google.protobuf import text_format

    return text_format.Parse(text, schema.ModelConfig()), schema


@pytest.mark.parametrize("kind", MODELS)
def test_the_config_says_what_the_graph_says(tmp_path: Path, kind: str) -> None:
    model = MODELS[kind]()
    hub.save(model, tmp_path / "a", name="Owner/A model: 1")
    made = export(tmp_path / "a", "triton", tmp_path / "b", max_batch=3)
    (config,) = (tmp_path / "b").glob("*/config.pbtxt")
    assert config in made.files
    found, schema = parsed(config.read_text())
    assert found.name == config.parent.name == "Owner-A-model-1"
    assert (found.backend, found.max_batch_size) == ("onnxruntime", 3)
    assert found.HasField("dynamic_batching") == (kind != "decoder")
    place = config.parent / "1" / found.default_model_filename
    types = {"INT64": schema.TYPE_INT64, "FLOAT": schema.TYPE_FP32}
    for ports, listed in zip(
        read_ports(place / "model.onnx"), (found.input, found.output), strict=True
    ):
        assert [port.name for port in ports] == [each.name for each in listed]
        for port, each in zip(ports, listed, strict=True):
            assert each.data_type == types[port.kind]
            assert port.shape[0] == "batch"
            sizes = [size if isinstance(size, int) else -1 for size in port.shape[1:]]
            assert list(each.dims) == sizes
    reader = OnnxReader(place)
    check_forward(reader, model, 90)
    if kind == "decoder":
        check_steps(reader, model, 90)


@given(
    st.text(min_size=1, max_size=20),
    st.lists(
        st.tuples(
            st.text(min_size=1, max_size=9),
            st.sampled_from(["INT64", "FLOAT"]),
            st.lists(st.one_of(st.integers(1, 99), st.sampled_from(["a", "b"])), max_size=4),
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_any_names_and_sizes_come_back(name: str, fields: list[Any]) -> None:
    ports = [Port(each, kind, ("batch", *sizes)) for each, kind, sizes in fields]
    found, _ = parsed(config_text(model_name(name), ports, ports[:1], max_batch=2, keeps=True))
    assert found.name == model_name(name)
    assert [each.name for each in found.input] == [port.name for port in ports]
    assert len(found.output) == 1


@given(st.text(max_size=30))
def test_a_name_is_one_of_a_folder(name: str) -> None:
    found = model_name(name)
    assert found
    assert Path(found).name == found
    assert json.dumps(found) == f'"{found}"'


def test_it_is_not_run_here(tmp_path: Path) -> None:
    export(saved(tiny_decoder(), tmp_path / "a"), "triton", tmp_path / "b")
    with pytest.raises(ConfigError, match="tritonserver --model-repository"):
        open_exported(tmp_path / "b")
    with pytest.raises(ConfigError, match="max_batch"):
        export(tmp_path / "a", "triton", tmp_path / "c", max_batch=0)
    assert not (tmp_path / "c").exists()
