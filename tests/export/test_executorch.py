"""ExecuTorch programs, run by ExecuTorch's runtime: the source's answers and states at every size
up to the bounds, int8, and damaged files."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from deepseek import hub
from deepseek.errors import CapacityError, ConfigError, FormatError, MissingExtra, ShapeError
from deepseek.export import export, open_exported
from deepseek.export.executorch import read
from deepseek.models import Decoder
from tests.export.readers import (
    answers,
    check_forward,
    check_real_decoder,
    check_steps,
    drawn,
    saved,
)
from tests.generate.encoders import tiny_encoder
from tests.hub.tiny import tiny_decoder
from tests.models.zoo import ours, reference

pytestmark = pytest.mark.filterwarnings("ignore")  # of ExecuTorch's own parts
pytest.importorskip("executorch", reason="executorch is not installed")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small decoder's program: three texts of 40 tokens."""
    folder = tmp_path_factory.mktemp("executorch")
    saved(tiny_decoder(num_hidden_layers=1), folder / "a")
    made = export(folder / "a", "executorch", folder / "b", max_tokens=40, max_batch=3)
    assert made.notes == ("at most 3 texts of 40 tokens at once",)
    return folder / "b"


@pytest.mark.slow
def test_a_program_says_what_the_source_says(decoder: Path) -> None:
    model, reader = tiny_decoder(num_hidden_layers=1), open_exported(decoder)
    assert reader.name.startswith("ExecuTorch 1.")
    assert (reader.kind, reader.max_tokens, reader.max_batch) == ("decoder", 40, 3)
    check_forward(reader, model, 90)
    check_steps(reader, model, 90)
    assert reader.layers(drawn(1, 3, 90), np.ones((1, 3), np.int64)) is None


@pytest.mark.slow
def test_what_is_above_the_bounds_is_refused(decoder: Path) -> None:
    reader = open_exported(decoder)
    for shape in ((4, 3), (1, 41)):
        ids = drawn(*shape, 90)
        with pytest.raises(ShapeError, match=r"at most \[3, 40\]"):
            reader.forward(ids, np.ones_like(ids))
    _, state = reader.step(drawn(1, 40, 90), None)
    with pytest.raises(CapacityError, match="at most 40 tokens"):
        reader.step(drawn(1, 1, 90), state)


@pytest.mark.slow
def test_threads_are_those_of_the_process(decoder: Path) -> None:
    reader = open_exported(decoder)
    from executorch.extension.pybindings import portable_lib

    had = portable_lib._threadpool_get_thread_count()
    assert open_exported(decoder, threads=had).max_tokens == reader.max_tokens
    with pytest.raises(ConfigError, match="as of one open"):
        open_exported(decoder, threads=had + 1)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_a_damaged_file_is_one_error(decoder: Path, tmp_path: Path, damage: str) -> None:
    content = (decoder / "model.pte").read_bytes()
    made = {"cut": content[: len(content) // 2], "empty": b"", "noise": bytes(1000)}[damage]
    (tmp_path / "model.pte").write_bytes(made)
    with pytest.raises(FormatError, match="a program that is whole"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("options", "what"),
    [({"max_tokens": 129}, "max_tokens"), ({"max_batch": 0}, "max_batch")],
)
def test_bounds_that_cannot_be_are_refused(
    tmp_path: Path, options: dict[str, int], what: str
) -> None:
    folder = saved(tiny_decoder(), tmp_path / "a")
    with pytest.raises(ConfigError, match=what):
        export(folder, "executorch", tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    folder = saved(ours(reference("qwen3-moe")), tmp_path / "a")
    with pytest.raises(ConfigError, match="experts"):
        export(folder, "executorch", tmp_path / "b", max_tokens=40)


def test_without_executorch_the_cure_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    folder = saved(tiny_decoder(), tmp_path / "a")
    with pytest.raises(MissingExtra, match=r"deepseek-stack\[executorch\]"):
        export(folder, "executorch", tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize("labels", [(), ("no", "yes")])
def test_an_encoder_says_what_the_source_says(tmp_path: Path, labels: tuple[str, ...]) -> None:
    model = tiny_encoder(labels=labels)
    export(saved(model, tmp_path / "a"), "executorch", tmp_path / "b", max_tokens=40, max_batch=4)
    reader = open_exported(tmp_path / "b")
    assert reader.kind == ("classifier" if labels else "encoder")
    check_forward(reader, model, 250)


@pytest.mark.slow
def test_int8_is_near_and_says_so(tmp_path: Path) -> None:
    model = tiny_decoder()
    folder = saved(model, tmp_path / "a")
    options = {"max_tokens": 40, "max_batch": 1}
    export(folder, "executorch", tmp_path / "b", quantize="int8", **options)
    whole = export(folder, "executorch", tmp_path / "c", **options).files[0].stat().st_size
    reader = open_exported(tmp_path / "b")
    ids = drawn(1, 20, 90)
    expected = answers(model, ids, np.ones_like(ids))
    difference = reader.forward(ids, np.ones_like(ids)) - expected
    assert 0 < np.sqrt(np.mean(difference**2)) < 0.1 * expected.std()
    assert (tmp_path / "b" / "model.pte").stat().st_size < 0.5 * whole


@pytest.mark.slow
def test_layers_of_smollm2_go_on_with_the_same_words(tmp_path: Path, smollm2_folder: Path) -> None:
    """Four of its thirty, which ten minutes go by in writing: `benchmarks.formats` takes all."""
    whole = hub.load(smollm2_folder, dtype="float32")
    assert isinstance(whole, Decoder)
    few = Decoder(whole.config.replace(num_layers=4))
    few.load_state_dict(whole.state_dict(), strict=False)
    few.tokenizer = whole.tokenizer
    folder = saved(few.eval(), tmp_path / "a")
    export(folder, "executorch", tmp_path / "b", max_tokens=128)
    check_real_decoder(open_exported(tmp_path / "b"), folder)


@pytest.mark.slow
def test_minilm_says_the_same(tmp_path: Path, minilm_folder: Path) -> None:
    export(minilm_folder, "executorch", tmp_path / "b", max_tokens=128, max_batch=4)
    check_forward(open_exported(tmp_path / "b"), hub.load(minilm_folder, dtype="float32"), 30000)
