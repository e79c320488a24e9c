"""A tiny real engine for the server's tests: random weights, a token a byte."""

from __future__ import annotations

import functools

import torch

from deepseek.generate import Engine
from deepseek.generate.modules import engine_of
from deepseek.models import Decoder
from tests.generate.conftest import TINY, byte_tokenizer


@functools.cache
def tiny_engine() -> Engine:
    """Return an engine whose greedy answers vary, and end at `<end>` now and then."""
    return fresh_engine()


def fresh_engine() -> Engine:
    """Return the same as an engine of one's own, to load adapters into."""
    torch.manual_seed(1)
    model = Decoder(TINY).eval()
    model.tokenizer = byte_tokenizer(bos_token="<begin>", eos_token="<end>")
    engine = engine_of(model)
    assert engine is not None
    return engine
