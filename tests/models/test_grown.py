"""A grown encoder computes what the smaller one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from deepseek.errors import ConfigError
from deepseek.models import Encoder, grow_encoder
from tests.generate.encoders import tiny_encoder
from tests.tolerances import assert_logits_equal

TOKENS = torch.tensor([[1, 5, 9, 200, 7, 7, 31, 2], [1, 8, 2, 0, 0, 0, 0, 0]])
MASK = (TOKENS > 0).long()


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_width_is_preserved(width: int, activation: str) -> None:
    model = tiny_encoder(activation=activation, labels=("a", "b", "c"))
    grown = grow_encoder(model, width=width)
    assert grown.config.hidden_size == width * 40 and grown.config.num_heads == 4
    with torch.no_grad():
        wanted, found = model(TOKENS, MASK), grown(TOKENS, MASK)
    held = MASK.bool()
    states = wanted.last_hidden_state.repeat(1, 1, width)
    assert_logits_equal(found.last_hidden_state[held], states[held])
    assert wanted.logits is not None and found.logits is not None
    assert_logits_equal(found.logits, wanted.logits)
    assert_logits_equal(
        grown.embed(["a cat"]) * width**0.5, model.embed(["a cat"]).repeat(1, width)
    )


def test_copies_learn_different_things() -> None:
    grown = grow_encoder(tiny_encoder(), width=2)
    weights = torch.randn(8, 80)  # a loss that reads the copies differently, as a new head does
    (grown(TOKENS[:1]).last_hidden_state[0] * weights).sum().backward()
    for name, parameter in grown.encoder.layer[0].named_parameters():
        if "weight" in name and parameter.ndim == 2 and "intermediate" in name:
            one, other = parameter.grad.chunk(2)  # type: ignore[union-attr]
            assert not torch.allclose(one, other, rtol=1e-3)


def test_depth_is_preserved_nearly(minilm_folder: Path) -> None:
    """On the real MiniLM, grown to the shape of BERT-base."""
    from deepseek.hub import load

    model = load(minilm_folder, dtype="float32")
    assert isinstance(model, Encoder)
    grown = grow_encoder(model, width=2, depth=2)
    assert (grown.config.hidden_size, grown.config.num_layers) == (768, 12)
    texts = ["A man rides a horse.", "The card has not arrived yet.", "Stocks fell on Monday."]
    likeness = F.cosine_similarity(grown.embed(texts), model.embed(texts).repeat(1, 2))
    assert likeness.min() > 0.85


def test_factors_are_checked() -> None:
    for wrong in ({"width": 0}, {"depth": 0}):
        with pytest.raises(ConfigError, match="of grow_encoder must be at least 1"):
            grow_encoder(tiny_encoder(), **wrong)
