"""A small model that has learned something, so that damage to it can be measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from deepseek import hub
from deepseek.models import Decoder
from tests.generate.conftest import TINY, byte_tokenizer

LINES = "\n".join(f"{a} and {b} are {a + b}." for a in range(40) for b in range(24))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of some 15,000 characters that can be learned."""
    path = tmp_path_factory.mktemp("text") / "sums.txt"
    path.write_text(LINES)
    return path


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bundle of a decoder that was trained for some steps on that text."""
    torch.manual_seed(1)
    model = Decoder(dataclasses.replace(TINY, max_positions=256))
    model.tokenizer = byte_tokenizer(bos_token="<begin>", eos_token="<end>")
    tokens = torch.tensor(model.tokenizer.encode(LINES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        starts = torch.randint(len(tokens) - 64, (8,), generator=generator).tolist()
        batch = torch.stack([tokens[first : first + 64] for first in starts])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return hub.save(model.eval(), tmp_path_factory.mktemp("start") / "bundle", name="sums").path
