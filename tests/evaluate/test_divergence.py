"""Divergence is exact where it must be, and equals its definition elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.errors import ConfigError, ShapeError
from deepseek.evaluate import default_corpus, divergence
from deepseek.evaluate.kl_divergence import token_divergences

TEXT = default_corpus().text[1000:1400]


def test_a_model_against_itself_gives_exactly_nothing(tiny: nn.Module, tokenizer: object) -> None:
    found = divergence(tiny, tiny, TEXT, tokenizer=tokenizer, window=64)
    kl, agreement, acceptance = found.measurements
    assert (kl.name, kl.value) == ("kl_divergence", 0.0)
    assert (agreement.name, agreement.value) == ("top1_agreement", 1.0)
    assert acceptance.name == "acceptance" and acceptance.value == pytest.approx(1.0)
    assert not found.divergences.any()
    assert agreement.spread is not None and agreement.spread.low < 1


def test_values_equal_the_definition(tiny: nn.Module, other: nn.Module) -> None:
    ids = torch.tensor([list(TEXT.encode()[:80])])
    found, agreed, accepted = token_divergences(other, tiny, ids[0], window=80, stride=40)
    theirs, ours = (model(ids).logits[0, :-1].double().detach() for model in (tiny, other))
    expected = F.kl_div(
        ours.log_softmax(1), theirs.log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(agreed, theirs.argmax(1) == ours.argmax(1))
    overlap = torch.minimum(theirs.softmax(1), ours.softmax(1)).sum(1)
    assert torch.allclose(accepted, overlap, atol=1e-6)


def test_windows_and_callables_change_nothing(tiny: nn.Module, other: nn.Module) -> None:
    ids = list(TEXT.encode()[:300])
    through_head = token_divergences(other, tiny, ids, 64, 32)[0]
    whole = token_divergences(lambda i: other(i).logits, lambda i: tiny(i), ids, 64, 32)[0]
    assert len(through_head) == 299
    assert torch.allclose(through_head, whole, atol=1e-5)


def constant(*logits: float) -> object:
    """Return a model that says the same everywhere."""

    def model(input_ids: Tensor) -> Tensor:
        return torch.tensor(logits).expand(*input_ids.shape, len(logits))

    return model


@pytest.mark.parametrize(
    ("reference", "model", "expected"),
    [
        ((0.0, 0.0), (0.0, 0.0), 0.0),
        ((0.0, -math.inf), (0.0, -math.inf), 0.0),
        ((0.0, -math.inf), (0.0, 0.0), math.log(2)),
        ((0.0, 0.0), (0.0, -math.inf), math.inf),
        ((0.0, -200.0), (0.0, -math.inf), 0.0),
        ((1000.0, 1000.0), (-1000.0, -1000.0), 0.0),
    ],
)
def test_extreme_logits(
    reference: tuple[float, ...], model: tuple[float, ...], expected: float
) -> None:
    found, _, _ = token_divergences(constant(*model), constant(*reference), [0, 1, 1], 4, 2)
    assert found.tolist() == pytest.approx([expected] * 2, abs=1e-7)


def test_the_command_names_both_models(
    tiny: nn.Module, other: nn.Module, tokenizer: object
) -> None:
    found = divergence(tiny, other, tokenizer=tokenizer, window=64, max_tokens=200)
    command = found.measurements[0].command
    assert command.startswith("deepseek eval MODEL --tasks divergence --reference REFERENCE")
    assert found.measurements[0].conditions["reference_model"] == "LlamaForCausalLM"


def test_mistakes_are_explained(tiny: nn.Module, tokenizer: object) -> None:
    with pytest.raises(ShapeError, match="vocabulary of 2"):
        token_divergences(tiny, constant(0.0, 1.0), [1, 2, 3], 4, 2)
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        divergence(tiny, tiny, "a", tokenizer=tokenizer)
