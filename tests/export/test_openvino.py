"""OpenVINO's IR, run by OpenVINO: the source's answers, states and layers, and damaged files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from deepseek import hub
from deepseek.errors import ConfigError, FormatError, MissingExtra
from deepseek.export import export, open_exported
from deepseek.export.openvino import read
from deepseek.models import Decoder, Encoder
from tests.export.readers import (
    check_forward,
    check_layers,
    check_real_decoder,
    check_steps,
    saved,
)
from tests.export.test_gguf import stored
from tests.generate.encoders import tiny_encoder
from tests.hub.tiny import tiny_decoder
from tests.models.zoo import ours, reference

pytest.importorskip("openvino", reason="openvino is not installed")
CASES = ["llama", "qwen3", "mistral-window", "encoder", "classifier"]


def model_of(case: str) -> Decoder | Encoder:
    if case in ("encoder", "classifier"):
        return tiny_encoder(labels=("no", "yes") if case == "classifier" else ())
    return ours(reference(case))


@pytest.mark.parametrize("case", CASES)
def test_openvino_says_what_the_source_says(tmp_path: Path, case: str) -> None:
    model = model_of(case)
    made = export(saved(model, tmp_path / "a"), "openvino", tmp_path / "b")
    assert {path.name for path in made.files} == {"model.xml", "model.bin"}
    assert not (tmp_path / "b" / "onnx").exists()
    reader = open_exported(tmp_path / "b", threads=1)
    assert reader.name.startswith("OpenVINO 20")
    assert reader.max_tokens == model.config.max_positions
    check_forward(reader, model, 90)
    check_layers(reader, model, 90)
    assert reader.has_cache == isinstance(model, Decoder)
    if isinstance(model, Decoder):
        check_steps(reader, model, 90)


def test_weights_on_grids_are_written_as_their_numbers(tmp_path: Path) -> None:
    model = stored(tmp_path / "a", {"embed": (8, 32, True), "": (4, 32, False)})
    made = export(tmp_path / "a", "openvino", tmp_path / "b")
    assert "grids" in made.notes[0]
    check_forward(open_exported(tmp_path / "b"), model, 300)


@pytest.mark.parametrize("name", ["model.xml", "model.bin"])
def test_a_damaged_file_is_one_error(tmp_path: Path, name: str) -> None:
    export(saved(tiny_decoder(), tmp_path / "a"), "openvino", tmp_path / "b")
    path = tmp_path / "b" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(FormatError, match="bytes, as it was written"):
        open_exported(tmp_path / "b")
    with pytest.raises(FormatError, match="an IR that is whole"):  # without the manifest's word
        read(tmp_path / "b")


def test_what_has_no_form_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    folder = saved(ours(reference("qwen3-moe")), tmp_path / "a")
    with pytest.raises(ConfigError, match="mixture of experts"):
        export(folder, "openvino", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_without_openvino_the_cure_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    folder = saved(tiny_decoder(), tmp_path / "a")
    with pytest.raises(MissingExtra, match=r"deepseek-stack\[openvino\]"):
        export(folder, "openvino", tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_smollm2_goes_on_with_the_same_words(tmp_path: Path, smollm2_folder: Path) -> None:
    export(smollm2_folder, "openvino", tmp_path / "b")
    check_real_decoder(open_exported(tmp_path / "b", threads=2), smollm2_folder)


@pytest.mark.slow
def test_minilm_says_the_same(tmp_path: Path, minilm_folder: Path) -> None:
    export(minilm_folder, "openvino", tmp_path / "b")
    check_forward(open_exported(tmp_path / "b"), hub.load(minilm_folder, dtype="float32"), 30000)
