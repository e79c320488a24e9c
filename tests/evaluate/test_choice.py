"""Multiple choice: tokens split as the harness splits them, rows shared, every item returned."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from deepseek.errors import ConfigError
from deepseek.evaluate import ChoiceItem, multiple_choice, next_sentence_items
from deepseek.evaluate.choice import Request, encode_pair, log_likelihoods

ITEMS = [
    ChoiceItem(context="A cat is an", choices=("animal", "idea of a house", "is"), answer=0),
    ChoiceItem(context="", choices=("a", "b"), answer=1),
    ChoiceItem(context="One two ", choices=("three", "thirty"), answer=0),
]


def alone(model: nn.Module, request: Request) -> float:
    """Return the log-likelihood of a continuation by one plain forward pass."""
    ids = torch.tensor([request.context + request.continuation])
    scores = model(ids).logits[0].detach().double().log_softmax(-1)
    begin = len(request.context)
    return sum(float(scores[begin + n - 1, token]) for n, token in enumerate(request.continuation))


def test_blanks_go_to_the_continuation(tokenizer: object) -> None:
    assert encode_pair(tokenizer, "a  ", "b") == Request((97,), (32, 32, 98))
    assert encode_pair(tokenizer, "", "b") == Request((256,), (98,))


def test_batches_and_shared_rows_change_nothing(tiny: nn.Module, tokenizer: object) -> None:
    requests = [
        encode_pair(tokenizer, each.context, f" {choice}")
        for each in [*ITEMS, ITEMS[0]]
        for choice in each.choices
    ]
    expected = [alone(tiny, request) for request in requests]
    for batch_size in (1, 3, 100):
        found = log_likelihoods(tiny, requests, max_length=512, batch_size=batch_size)
        assert [score for score, _ in found] == pytest.approx(expected, abs=1e-4)


def test_choices_of_one_token_share_a_row(tiny: nn.Module) -> None:
    rows: list[int] = []
    tiny.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    requests = [Request((1, 2, 3), (token,)) for token in range(10)] + [Request((1, 2), (3, 4))]
    log_likelihoods(tiny, requests, max_length=512)
    assert rows == [1]


def test_contexts_are_cut_from_the_left(tiny: nn.Module) -> None:
    long = Request(tuple(range(50)), (7, 8))
    kept = Request(tuple(range(41, 50)), (7, 8))
    assert long.row(10) == kept.row(512)
    found = log_likelihoods(tiny, [long, kept], max_length=10)
    assert found[0] == found[1]


def counting(order: Sequence[int]) -> object:
    """Return a model that gives each token the likelihood of its place in an order."""

    def model(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits = torch.zeros(257)
        for place, token in enumerate(order):
            logits[token] = 5.0 - place
        return logits.expand(*input_ids.shape, 257)

    return model


def test_three_accuracies_choose_by_sum_characters_and_bytes(tokenizer: object) -> None:
    items = [ChoiceItem(context="x", choices=("a", "aaaa", "é"), answer=1)]
    found = multiple_choice(counting(b"a\xc3\xa9"), items, tokenizer=tokenizer, delimiter="")
    item = found.items[0]
    assert item.chosen == 0
    assert item.chosen_by_characters in (0, 1)
    assert item.log_likelihoods[1] == pytest.approx(4 * item.log_likelihoods[0])
    assert item.is_greedy == (True, True, False)
    assert [each.name for each in found.measurements] == ["acc", "acc_norm", "acc_bytes"]
    assert found.measurements[0].value == 0.0


def test_the_measurement_is_complete(tiny: nn.Module, tokenizer: object) -> None:
    flags = {"choice_items": "a.jsonl"}
    found = multiple_choice(tiny, ITEMS, tokenizer=tokenizer, flags=flags).measurements[0]
    assert found.command == "deepseek eval MODEL --tasks choice --choice-items a.jsonl"
    assert found.spread is not None and found.spread.low <= found.value <= found.spread.high
    assert len(str(found.conditions["items_sha256"])) == 64
    assert multiple_choice(tiny, ITEMS, tokenizer=tokenizer).measurements[0].command == ""


def test_made_items_are_repeatable_and_have_one_right_answer() -> None:
    items = next_sentence_items(40, seed=2)
    assert items == next_sentence_items(40, seed=2) != next_sentence_items(40, seed=3)
    assert all(len(set(each.choices)) == 4 for each in items)
    assert {each.answer for each in items} == {0, 1, 2, 3}


def test_mistakes_are_explained(tiny: nn.Module, tokenizer: object) -> None:
    with pytest.raises(ConfigError, match="at least one"):
        multiple_choice(tiny, [], tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="at most 4 tokens"):
        multiple_choice(tiny, ITEMS, tokenizer=tokenizer, max_length=4)
