"""Variable tracking: exact lengths, chains that can be followed, and models of known answers."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deepseek.errors import ConfigError
from deepseek.evaluate import default_corpus, variable_tracking
from tests.evaluate.conftest import ByteTokenizer

TEXT = default_corpus().text[:20_000]


def followed(text: str) -> list[str]:
    """Return the names that hold the number asked for, each assigned the one before it."""
    task = text[text.rindex("Memorize and track") :]
    body, question = task.split("\nQuestion: Find all")
    value = re.findall(r"assigned the value (\d{5}) in", question)[0]
    held: list[str] = []
    for name, what in re.findall(r"\nVAR ([A-Z]{5}) = (\d{5}|VAR [A-Z]{5})\n", body):
        if what in (value, f"VAR {held[-1]}" if held else value):
            held.append(name)
    return held


class Solver:
    """A model that follows the assignments, and of each name writes what `spoil` makes of it."""

    def __init__(self, spoil: Callable[[int, str], str] = lambda _, name: name) -> None:
        self.spoil = spoil
        self.seen: list[str] = []

    def __call__(self, input_ids: Tensor) -> Tensor:
        text = bytes(input_ids[0].tolist()).decode("utf-8", errors="replace")
        self.seen.append(text)
        answer = "".join(f" {self.spoil(*each)}" for each in enumerate(followed(text)))
        logits = torch.zeros(1, len(input_ids[0]), 257)
        for away, byte in enumerate(answer.encode()):
            logits[0, -1 - len(answer) + away, byte] = 20.0
        return logits


def figures(model: object, **options: object) -> dict[str, float]:
    """Return what was measured of a model, by name."""
    found = variable_tracking(model, text=TEXT, tokenizer=ByteTokenizer(), **options)  # type: ignore[arg-type]
    return {each.name: each.value for each in found.measurements}


@settings(deadline=None, max_examples=20)
@given(
    length=st.integers(1700, 2600),
    num_chains=st.integers(1, 3),
    num_hops=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_the_chain_can_be_followed_through_the_text(
    length: int, num_chains: int, num_hops: int, seed: int
) -> None:
    model = Solver()
    options = {"num_chains": num_chains, "num_hops": num_hops, "num_items": 2, "seed": seed}
    found = figures(model, length=length, **options)
    for text in model.seen:
        task = text[text.rindex("Memorize and track") :]
        assert len(re.findall(r"\nVAR ", task)) == num_chains * (num_hops + 1)
        names = followed(text)
        assert len(names) == num_hops + 1
        assert text.endswith("they are: " + " ".join(names))
        assert f", {num_hops + 1} variables are assigned" in text
    assert found["tracking_accuracy"] == found["tracking_names"] == 1.0


def test_sequences_have_exactly_the_length() -> None:
    lengths: list[int] = []

    def flat(input_ids: Tensor) -> Tensor:
        lengths.append(len(input_ids[0]))
        return torch.zeros(*input_ids.shape, 257)

    found = figures(flat, length=1801, num_items=3)
    assert lengths == [1801] * 3
    assert found["tracking_names"] == 0.0


def test_a_name_half_right_is_tokens_right_and_no_name() -> None:
    model = Solver(lambda place, name: name if place != 1 else name[:3] + "??")
    found = figures(model, length=1800, num_items=3)
    assert found["tracking_names"] == pytest.approx(4 / 5)
    assert found["tracking_accuracy"] == pytest.approx(28 / 30)


def test_items_repeat_by_seed(tiny: nn.Module, tokenizer: object) -> None:
    options = {"length": 1500, "num_items": 2, "text": TEXT, "tokenizer": tokenizer}
    first = variable_tracking(tiny, seed=1, **options)
    assert first == variable_tracking(tiny, seed=1, **options)
    assert first.items != variable_tracking(tiny, seed=2, **options).items


def test_mistakes_are_explained(tiny: nn.Module, tokenizer: object) -> None:
    options = {"text": TEXT, "tokenizer": tokenizer}
    with pytest.raises(ConfigError, match="to hold example, assignments and answer"):
        variable_tracking(tiny, length=500, **options)
    with pytest.raises(ConfigError, match="Give a longer text"):
        variable_tracking(tiny, length=50_000, **options)
    with pytest.raises(ConfigError, match=r"num_chains and num_hops .* at least 1"):
        variable_tracking(tiny, length=2000, num_hops=0, **options)
    with pytest.raises(ConfigError, match="at most 1000 names"):
        variable_tracking(tiny, length=2000, num_chains=500, **options)
    with pytest.raises(ConfigError, match="num_items of variable_tracking"):
        variable_tracking(tiny, length=2000, num_items=0, **options)


@pytest.mark.slow
def test_smollm2_copies_the_letters_of_names(smollm2: nn.Module, smollm2_tokenizer: object) -> None:
    found = variable_tracking(smollm2, length=768, num_items=4, tokenizer=smollm2_tokenizer)
    assert found.measurements[0].value >= 0.5
