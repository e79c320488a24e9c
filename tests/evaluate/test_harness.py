"""On the same items the LM Evaluation Harness gives the same answers; here it is run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek.evaluate import (
    ChoiceItem,
    addition_items,
    exact_match,
    multiple_choice,
    next_sentence_items,
)
from tests.evaluate.harness import CHOICE, MATCH, PATTERN, of_model, run_harness

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


def test_multiple_choice_is_the_same(
    smollm2: torch.nn.Module, smollm2_tokenizer: object, tmp_path: Path
) -> None:
    items = next_sentence_items(12, seed=1)
    items.append(ChoiceItem(context="Paris is the capital of ", choices=("France", "é"), answer=0))
    items.append(ChoiceItem(context="", choices=("The", "Zqx"), answer=0))
    results, samples = run_harness(of_model(smollm2, smollm2_tokenizer), items, CHOICE, tmp_path)
    ours = multiple_choice(smollm2, items, tokenizer=smollm2_tokenizer)
    for item, sample in zip(ours.items, samples, strict=True):
        theirs = [float(response[0]) for response in sample["filtered_resps"]]
        assert item.log_likelihoods == pytest.approx(theirs, abs=2e-3)
        assert item.chosen == theirs.index(max(theirs))
        assert item.is_greedy == tuple(
            str(response[1]) == "True" for response in sample["filtered_resps"]
        )
        assert float(item.chosen == item.answer) == sample["acc"]
        assert float(item.chosen_by_characters == item.answer) == sample["acc_norm"]
        assert float(item.chosen_by_bytes == item.answer) == sample["acc_bytes"]
    for measurement in ours.measurements:
        assert measurement.value == pytest.approx(results[f"{measurement.name},none"])


def test_exact_match_is_the_same(
    smollm2: torch.nn.Module, smollm2_tokenizer: object, tmp_path: Path
) -> None:
    items = addition_items(5, seed=1)
    results, samples = run_harness(of_model(smollm2, smollm2_tokenizer), items, MATCH, tmp_path)
    ours = exact_match(smollm2, items, tokenizer=smollm2_tokenizer, max_gen_toks=8, pattern=PATTERN)
    for item, sample in zip(ours.items, samples, strict=True):
        assert item.text == sample["resps"][0][0]
        assert item.extracted == sample["filtered_resps"][0]
        assert float(item.is_right) == sample["exact_match"]
    assert ours.measurements[0].value == pytest.approx(results["exact_match,number"])
