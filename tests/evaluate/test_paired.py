"""Two models beside each other: equal ones lose nothing, and intervals hold what they promise."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from deepseek.errors import CapacityError, ConfigError
from deepseek.evaluate import divergence
from deepseek.evaluate.choice import ScoredChoice
from deepseek.evaluate.engine_model import EngineModel
from deepseek.evaluate.paired import PairedItems, paired_text
from deepseek.generate.modules import engine_of
from deepseek.ops.cpu import why_missing
from tests.models.zoo import ours, reference

TEXT = "It was a dark and stormy night; the rain fell in torrents. " * 8


def windows(count: int = 4, length: int = 32) -> torch.Tensor:
    return torch.tensor(list(TEXT.encode())[: count * length]).view(count, length)


def figures(model: nn.Module, reference: nn.Module) -> dict[str, object]:
    found = paired_text(model, reference, windows()).measurements({})
    return {item.name: item for item in found}


def test_a_model_beside_itself_loses_nothing(tiny: nn.Module) -> None:
    found = figures(tiny, tiny)
    assert found["perplexity_ratio"].value == 1
    assert found["kl_divergence"].value == 0
    assert found["top1_agreement"].value == 1


def test_figures_are_those_of_divergence(tiny: nn.Module, other: nn.Module) -> None:
    length = 32
    text = TEXT[:length]
    row = torch.tensor([list(text.encode())])
    found = paired_text(tiny, other, row.repeat(2, 1))
    whole = divergence(tiny, other, text, tokenizer=_Bytes(), window=length)
    assert found.divergences[0] == pytest.approx(float(whole.divergences.mean()), rel=1e-4)
    assert found.agreements[0] == pytest.approx(float(whole.agreements.double().mean()))


def test_a_change_is_seen_against_its_own_noise(tiny: nn.Module) -> None:
    changed = copy.deepcopy(tiny)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.002 * torch.randn_like(parameter))
    found = figures(changed, tiny)
    ratio, perplexity = found["perplexity_ratio"], found["perplexity"]
    width = (ratio.spread.high - ratio.spread.low) / ratio.value
    assert width < (perplexity.spread.high - perplexity.spread.low) / perplexity.value
    assert found["kl_divergence"].value > 0


def test_one_window_has_no_interval(tiny: nn.Module) -> None:
    with pytest.raises(ConfigError, match="at least two"):
        paired_text(tiny, tiny, windows(1))


def pairs(lost: int, won: int, both: int, none: int) -> PairedItems:
    theirs = np.array([1.0] * lost + [0.0] * won + [1.0] * both + [0.0] * none)
    ours_ = np.array([0.0] * lost + [1.0] * won + [1.0] * both + [0.0] * none)
    return PairedItems(theirs, ours_, np.full(len(theirs), 0.25))


def test_loss_is_what_the_reference_has_more() -> None:
    value, spread = pairs(8, 3, 60, 29).loss()
    assert value == pytest.approx(0.05)
    assert -0.02 < spread.low < 0 < value < spread.high < 0.13


def test_no_change_in_few_items_excludes_little() -> None:
    few, many = pairs(0, 0, 5, 5), pairs(0, 0, 500, 500)
    assert few.loss()[0] == many.loss()[0] == 0
    assert few.loss()[1].high > 0.1 > 0.01 > many.loss()[1].high


def test_kept_ability_subtracts_what_guessing_gives() -> None:
    value, spread = pairs(10, 0, 40, 50).kept()
    assert value == pytest.approx((40 - 25) / (50 - 25))
    assert spread is not None and spread.low < value < spread.high


def test_the_interval_covers() -> None:
    chance = np.random.default_rng(0)
    covered, total = 0, 400
    for _ in range(total):
        drawn = chance.choice(4, size=200, p=(0.06, 0.03, 0.5, 0.41))
        counts = [int((drawn == kind).sum()) for kind in range(4)]
        _, spread = pairs(*counts).loss()
        covered += spread.low <= 0.03 <= spread.high
    assert 0.92 <= covered / total <= 0.98


def test_items_are_paired_by_the_likeliest_choice() -> None:
    def item(chosen: int, answer: int) -> ScoredChoice:
        return ScoredChoice((0.0, 0.0, 0.0), (False,) * 3, chosen, 0, 0, answer)

    found = PairedItems.of_choices([item(1, 1), item(0, 2)], [item(0, 1), item(2, 2)])
    assert found.is_right.tolist() == [1, 0]
    assert found.reference_is_right.tolist() == [0, 1]
    assert found.chances == pytest.approx([1 / 3, 1 / 3])


@pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))
def test_an_engine_is_measured_like_its_model() -> None:
    model = ours(reference("llama"))
    engine = engine_of(model)
    assert engine is not None
    found = EngineModel(engine)
    tokens = torch.randint(0, model.config.vocab_size, (2, 9))
    with torch.inference_mode():
        expected = model(tokens).logits
    assert torch.allclose(found(tokens), expected, atol=1e-3)
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    padded = found(tokens, mask)
    assert torch.allclose(padded[1, :5], expected[1, :5], atol=1e-3)
    assert not padded[1, 5:].any()
    longer = torch.zeros(1, model.config.max_positions + 1, dtype=torch.int64)
    with pytest.raises(CapacityError, match="at most"):
        found(longer)


class _Bytes:
    bos_token_id = eos_token_id = 256

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(itertools.filterfalse(lambda token: token > 255, ids)).decode()
