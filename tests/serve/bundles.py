"""A tiny model on the disk, for tests that start a server of their own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

import deepseek
from deepseek.models import Decoder
from tests.generate.conftest import TINY, byte_tokenizer

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }} {% endfor %}"
)


def tiny_bundle(folder: Path, context: int = 512) -> Path:
    """Save a decoder of random weights, a token a byte, and return its folder."""
    torch.manual_seed(1)
    model = Decoder(dataclasses.replace(TINY, max_positions=context)).eval()
    model.tokenizer = byte_tokenizer(bos_token="<begin>", eos_token="<end>", chat_template=TEMPLATE)
    deepseek.save(model, folder / "tiny")
    return folder / "tiny"
