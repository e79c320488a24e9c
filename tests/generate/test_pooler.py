"""Vectors of texts from a decoder's last states."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepseek.errors import ConfigError
from deepseek.generate import Pooler
from deepseek.generate.modules import engine_of
from deepseek.models import Decoder
from tests.models.zoo import ours, reference
from tests.ops.native import NEEDS_KERNELS
from tests.tolerances import assert_logits_equal

pytestmark = NEEDS_KERNELS


def head_input(model: Decoder, tokens: list[int]) -> torch.Tensor:
    """Return the states behind the last norm, as the head gets them."""
    kept: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_hook(lambda _m, _i, output: kept.append(output))
    with torch.inference_mode():
        model(torch.tensor([tokens]))
    handle.remove()
    return kept[0][0]


@pytest.mark.parametrize("case", ["llama", "qwen3-moe"])
def test_states_are_those_of_the_last_norm(case: str) -> None:
    model = ours(reference(case))
    tokens = torch.randint(0, 97, (70,)).tolist()
    engine = engine_of(model)
    assert engine is not None
    wanted, table = head_input(model, tokens), np.arange(2)[None]
    pages = engine.new_pages(2)
    found = engine.states(pages, tokens, range(70), [0] * 70, table, [69, 3])
    assert_logits_equal(torch.from_numpy(found), wanted[[69, 3]])
    logits = engine.step(pages, tokens, range(70), [0] * 70, table, [3])
    with torch.inference_mode():
        assert_logits_equal(torch.from_numpy(logits), model.lm_head(wanted[[3]]))


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_text_is_one_vector_however_it_is_read(pooling: str) -> None:
    model = ours(reference("llama"))
    tokens = torch.randint(0, 97, (150,)).tolist()
    engine = engine_of(model)
    assert engine is not None
    pooler = Pooler(engine, pooling=pooling, max_tokens=140)
    states = head_input(model, tokens[:140])
    wanted = states.mean(0) if pooling == "mean" else states[-1]
    wanted = torch.nn.functional.normalize(wanted, dim=0)
    for part in (512, 64, 33):
        assert_logits_equal(torch.from_numpy(pooler.vector(tokens, part)), wanted)


def test_texts(tiny_model: Decoder) -> None:
    engine = engine_of(tiny_model)
    assert engine is not None
    pooler = Pooler(engine)
    found = pooler.embed(["a cat", "a cat", "the dog"])
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    with pytest.raises(ConfigError, match="at least one token"):
        pooler.embed([""])
    with pytest.raises(ConfigError, match="pooling of Pooler must be 'mean' or 'last'"):
        Pooler(engine, pooling="first")  # type: ignore[arg-type]
