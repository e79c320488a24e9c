"""Needle and copy: exact lengths, right places, and models whose answers are known."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from deepseek.errors import ConfigError
from deepseek.evaluate import copy_accuracy, default_corpus, needle

TEXT = default_corpus().text[:20_000]


class Recorder:
    """A model that keeps what it is asked and repeats what followed the longest earlier match."""

    def __init__(self, context: int = 8) -> None:
        self.context = context
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: Tensor) -> Tensor:
        ids = input_ids[0].tolist()
        self.seen.append(ids)
        logits = torch.zeros(1, len(ids), 257)
        following: dict[tuple[int, ...], int] = {}
        for place in range(self.context, len(ids)):
            key = tuple(ids[place - self.context : place])
            if key in following:
                logits[0, place - 1, following[key]] = 20.0
            following[key] = ids[place]
        return logits


@pytest.mark.parametrize("length", [600, 1001])
@pytest.mark.parametrize("num_keys", [1, 3])
def test_needles_stand_in_sequences_of_exact_length(
    tokenizer: object, length: int, num_keys: int
) -> None:
    model = Recorder()
    options = {"length": length, "num_keys": num_keys, "num_items": 3}
    found = needle(model, text=TEXT, tokenizer=tokenizer, **options)
    for ids, item in zip(model.seen, found.items, strict=True):
        assert len(ids) == length
        text = bytes(ids).decode("utf-8", errors="replace")
        hidden = dict(re.findall(r"numbers for ([a-z-]+) is: (\d{7})\.", text))
        asked = re.findall(r"The special magic number for ([a-z-]+) mentioned", text)[-1]
        assert len(hidden) == num_keys
        assert text.endswith(f"is {hidden[asked]}")
        assert len(item.ranks) == len(f" {hidden[asked]}")


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_the_needle_stands_at_its_depth(tokenizer: object, depth: float) -> None:
    model = Recorder()
    needle(model, length=2000, depth=depth, num_items=2, text=TEXT, tokenizer=tokenizer)
    for ids in model.seen:
        text = bytes(ids).decode("utf-8", errors="replace")
        begin, end = text.index("afterwards.\n") + 12, text.rindex("\nWhat is the special")
        place = text.index(" One of the special magic numbers")
        needle_length = len(" One of the special magic numbers for amber-anchor is: 1234567.")
        assert (place - begin) / (end - begin - needle_length) == pytest.approx(depth, abs=0.1)


def test_a_copying_model_copies_and_a_flat_one_does_not(tokenizer: object) -> None:
    options = {"length": 700, "num_passage_tokens": 64, "num_items": 3, "text": TEXT}
    copied = copy_accuracy(Recorder(), tokenizer=tokenizer, **options)
    by_name = {each.name: each for each in copied.measurements}
    assert by_name["copy_accuracy"].value > 0.8
    assert by_name["copy_perplexity"].value < 25
    flat = copy_accuracy(lambda ids: torch.zeros(*ids.shape, 257), tokenizer=tokenizer, **options)
    assert flat.measurements[0].value == pytest.approx(257)
    assert flat.measurements[1].value == 0.0


@pytest.mark.parametrize("distance", [64, 200, None])
def test_the_repeat_stands_at_its_distance(tokenizer: object, distance: int | None) -> None:
    model = Recorder()
    options = {"num_passage_tokens": 64, "num_items": 2, "text": TEXT}
    found = copy_accuracy(model, length=513, distance=distance, tokenizer=tokenizer, **options)
    distance = 513 - 64 if distance is None else distance
    for ids, item in zip(model.seen, found.items, strict=True):
        assert len(ids) == 513
        assert ids[-64:] == ids[-64 - distance : len(ids) - distance]
        assert len(item.ranks) == 64 - 8
    assert found.measurements[0].conditions["distance"] == distance


def test_items_repeat_by_seed(tiny: nn.Module, tokenizer: object) -> None:
    options = {"length": 500, "num_items": 2, "text": TEXT, "tokenizer": tokenizer}
    assert needle(tiny, seed=1, **options) == needle(tiny, seed=1, **options)
    assert needle(tiny, seed=1, **options).items != needle(tiny, seed=2, **options).items


def test_mistakes_are_explained(tiny: nn.Module, tokenizer: object) -> None:
    with pytest.raises(ConfigError, match="Give a longer text"):
        needle(tiny, length=5000, text=TEXT[:1000], tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="to hold needles"):
        needle(tiny, length=50, text=TEXT, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="0 \\(begin\\) to 1"):
        needle(tiny, length=500, depth=2, text=TEXT, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="distance of copy_accuracy must be 128 to 372"):
        copy_accuracy(tiny, length=500, distance=400, text=TEXT, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="hold the passage twice"):
        copy_accuracy(tiny, length=200, text=TEXT, tokenizer=tokenizer)


@pytest.mark.slow
def test_smollm2_finds_and_copies(smollm2: nn.Module, smollm2_tokenizer: object) -> None:
    found = needle(smollm2, length=512, num_items=8, tokenizer=smollm2_tokenizer)
    assert found.measurements[0].value >= 0.75
    copied = copy_accuracy(smollm2, length=512, num_items=4, tokenizer=smollm2_tokenizer)
    assert copied.measurements[1].value >= 0.8
