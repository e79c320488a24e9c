"""A tiny model with a byte tokenizer, a text, and runs over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deepseek import hub
from deepseek.models import Decoder
from deepseek.optim import AdamW, Cosine, Muon
from deepseek.train import Run, Source, Stage
from tests.generate.conftest import TINY, byte_tokenizer

MakeRun = Callable[..., Run]


@pytest.fixture(scope="session")
def start_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bundle that runs start from."""
    torch.manual_seed(1)
    model = Decoder(TINY)
    model.tokenizer = byte_tokenizer(bos_token="<begin>", eos_token="<end>")
    return hub.save(model, tmp_path_factory.mktemp("start") / "bundle", name="tiny").path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of some 4,000 characters that can be learned."""
    path = tmp_path_factory.mktemp("text") / "sums.txt"
    path.write_text(" ".join(f"{a} and {b} are {a + b}." for a in range(12) for b in range(20)))
    return path


@pytest.fixture(scope="session")
def make_run(start_folder: Path, text: Path) -> MakeRun:
    """Return what makes a run of two stages that differ in everything."""

    def make(**changes: object) -> Run:
        source = Source(path=str(text))
        common = {"data": (source,), "batch": 8, "micro_batch": 2, "precision": "float32"}
        first = Stage(name="first", steps=6, length=32, optimizer=AdamW(rate=1e-2), **common)
        second = Stage(
            name="second",
            steps=5,
            length=24,
            trains=("model.layers.*",),
            optimizer=Muon(rate=3e-3),
            schedule=Cosine(cycle_steps=2),
            **common,
        )
        values = {"model": str(start_folder), "stages": (first, second), "checkpoint_every": 2}
        return Run(**{**values, **changes})

    return make
