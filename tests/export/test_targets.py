"""The table of back ends that we cannot run: what it says of our files is so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from deepseek import hub
from deepseek.cli.main import main
from deepseek.export import FORMATS
from deepseek.export.onnx.standard import write_standard
from deepseek.export.targets import LOWEST_OPSET, TARGETS
from tests.export.readers import saved
from tests.generate.encoders import tiny_encoder
from tests.hub.tiny import tiny_decoder


def test_every_entry_says_what_it_takes_and_who_says_so() -> None:
    assert len({target.name for target in TARGETS}) == len(TARGETS)
    for target in TARGETS:
        assert target.takes in FORMATS
        assert target.source.startswith("https://")
        assert all((target.types, target.compiler, target.limits))


@pytest.mark.parametrize("kind", ["decoder", "classifier"])
def test_the_graph_can_be_lowered_as_far_as_it_says(tmp_path: Path, kind: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    import onnx
    from onnx import version_converter

    model = tiny_decoder() if kind == "decoder" else tiny_encoder(labels=("no", "yes"))
    (tmp_path / "b").mkdir()
    write_standard(hub.Bundle.open(saved(model, tmp_path / "a")), tmp_path / "b")
    path = str(tmp_path / "b" / "model.onnx")
    session = onnxruntime.InferenceSession(path)
    feeds = {each.name: np.ones((2, 5), np.int64) for each in session.get_inputs()}
    for each in session.get_inputs():
        if each.name.startswith("past"):
            feeds[each.name] = np.zeros((2, each.shape[1], 0, each.shape[3]), np.float32)
    lowered = version_converter.convert_version(onnx.load(path), LOWEST_OPSET)
    onnx.checker.check_model(lowered, full_check=True)
    found = onnxruntime.InferenceSession(lowered.SerializeToString()).run(None, feeds)
    for one, other in zip(found, session.run(None, feeds), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    with pytest.raises(RuntimeError, match="Split"):
        version_converter.convert_version(onnx.load(path), LOWEST_OPSET - 1)


def test_the_command_line_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--formats", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in found["targets"]] == [each.name for each in TARGETS]
