"""AOTInductor packages, run by PyTorch's loader: the source's answers and states, in a process that
knows nothing of our modules, and damaged files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from deepseek import hub
from deepseek.errors import ConfigError, FormatError
from deepseek.export import export, open_exported
from deepseek.export.aoti import read
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

pytestmark = pytest.mark.filterwarnings("ignore")  # of PyTorch about its own parts

ALONE = """
import sys
import numpy
import torch
package = torch._inductor.aoti_load_package(sys.argv[1])
ids = torch.from_numpy(numpy.load(sys.argv[2]))
none = ids[:, :0].clone()
shape = [int(each) for each in sys.argv[3].split(",")]
kept = [torch.zeros(shape), torch.zeros(shape)]
logits = package(ids, torch.ones_like(ids), ids.new_zeros(len(ids), 0), *kept)[0]
numpy.save(sys.argv[4], logits.numpy())
assert not [name for name in sys.modules if name.startswith("deepseek")]
"""


@pytest.mark.slow
def test_a_package_says_what_the_source_says_without_us(tmp_path: Path) -> None:
    model = tiny_decoder(num_hidden_layers=1)
    made = export(saved(model, tmp_path / "a"), "torch", tmp_path / "b")
    assert "machine code for" in made.notes[-1]
    reader = open_exported(tmp_path / "b", threads=1)
    threads = torch.get_num_threads()
    check_forward(reader, model, 90)
    check_steps(reader, model, 90)
    assert torch.get_num_threads() == threads
    assert (reader.max_tokens, reader.layers(drawn(1, 2, 9), drawn(1, 2, 1) + 1)) == (128, None)
    ids = drawn(2, 9, 90)
    np.save(tmp_path / "ids.npy", ids)
    paths = [tmp_path / name for name in ("b/model.pt2", "ids.npy", "logits.npy")]
    command = [sys.executable, "-c", ALONE, paths[0], paths[1], "1,2,2,0,16", paths[2]]
    subprocess.run(command, check=True, cwd=tmp_path)
    alone, expected = np.load(paths[2]), answers(model, ids, np.ones_like(ids))
    assert np.abs(alone - expected).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("labels", [(), ("no", "yes")])
def test_an_encoder_says_what_the_source_says(tmp_path: Path, labels: tuple[str, ...]) -> None:
    model = tiny_encoder(labels=labels)
    export(saved(model, tmp_path / "a"), "torch", tmp_path / "b", max_tokens=64)
    reader = open_exported(tmp_path / "b")
    assert (reader.kind, reader.max_tokens) == ("classifier" if labels else "encoder", 64)
    check_forward(reader, model, 250)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04" + bytes(200), bytes(1000)])
def test_a_damaged_file_is_one_error(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "model.pt2").write_bytes(damage)
    with pytest.raises(FormatError, match="an AOTInductor package"):
        read(tmp_path)


def test_without_a_compiler_it_is_one_line(tmp_path: Path) -> None:
    folder = saved(tiny_encoder(num_layers=1), tmp_path / "a")
    code = "import sys; from deepseek.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-W", "ignore", "-c", code, "export", folder, "--format", "torch"]
    environment = {
        "PATH": str(tmp_path),
        "CXX": str(tmp_path / "none"),
        "HOME": str(tmp_path),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [*command, "--out", tmp_path / "b"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert "C++ compiler of export must be" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "b").exists()


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    folder = saved(ours(reference("qwen3-moe")), tmp_path / "a")
    with pytest.raises(ConfigError, match="experts"):
        export(folder, "torch", tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_smollm2_goes_on_with_the_same_words(tmp_path: Path, smollm2_folder: Path) -> None:
    export(smollm2_folder, "torch", tmp_path / "b")
    check_real_decoder(open_exported(tmp_path / "b"), smollm2_folder)


@pytest.mark.slow
def test_minilm_says_the_same(tmp_path: Path, minilm_folder: Path) -> None:
    export(minilm_folder, "torch", tmp_path / "b")
    check_forward(open_exported(tmp_path / "b"), hub.load(minilm_folder, dtype="float32"), 30000)
