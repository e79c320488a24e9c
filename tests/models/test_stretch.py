"""A longer context by positions alone: which config it is, and what loads with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek import hub
from deepseek.errors import ConfigError
from deepseek.face import load, load_engine
from deepseek.models import Decoder, RopeConfig
from deepseek.models.stretch import stretched
from deepseek.ops.cpu import why_missing
from tests.models.zoo import TINY, randomize


def test_a_context_that_is_there_changes_nothing() -> None:
    assert stretched(TINY, TINY.max_positions) is TINY


@pytest.mark.parametrize("context", [0, -5, 4096.0, "4096", True])
def test_what_is_no_number_of_tokens_is_no_context(context: Any) -> None:
    with pytest.raises(ConfigError, match="a whole number of tokens, at least 1"):
        stretched(TINY, context)


def test_rope_is_stretched_by_yarn_from_the_first_context() -> None:
    twice = stretched(TINY, 4096)
    assert twice.max_positions == 4096
    assert twice.rope == RopeConfig(scaling="yarn", factor=2.0, original_max_positions=2048)
    assert stretched(twice, 8192) == stretched(TINY, 8192)


def test_alibi_needs_no_change() -> None:
    config = TINY.replace(positions="alibi")
    assert stretched(config, 9000) == config.replace(max_positions=9000)


@pytest.mark.parametrize("scaling", ["linear", "dynamic", "llama3"])
def test_a_rope_that_is_stretched_otherwise_is_refused(scaling: str) -> None:
    config = TINY.replace(rope=RopeConfig(scaling=scaling, factor=2.0))
    with pytest.raises(ConfigError, match="context of the model must be at most 2048"):
        stretched(config, 4096)


def test_it_is_asked_for_where_a_model_is_loaded(tmp_path: Path) -> None:
    model = Decoder(TINY.replace(max_positions=256))
    randomize(model)
    hub.save(model, tmp_path / "model")
    tokens = torch.randint(0, 50, (1, 300))
    longer = load(tmp_path / "model", context=512)
    assert isinstance(longer, Decoder) and longer.config == stretched(model.config, 512)
    assert not torch.allclose(longer(tokens).logits, load(tmp_path / "model")(tokens).logits)
    # the stretched model is one like any other
    hub.save(longer, tmp_path / "longer")
    again = load(tmp_path / "longer")
    assert isinstance(again, Decoder) and torch.equal(again(tokens).logits, longer(tokens).logits)
    if why_missing() is None:
        engine = load_engine(tmp_path / "model", context=512)
        assert engine is not None and engine.config == longer.config
