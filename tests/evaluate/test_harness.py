"""On the same items the LM Evaluation Harness gives the same answers; here it is run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.evaluate import (
    ChoiceItem,
    MatchItem,
    addition_items,
    exact_match,
    multiple_choice,
    next_sentence_items,
)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

PATTERN = r"(\-?[0-9]+)"


def run_harness(
    model: torch.nn.Module,
    tokenizer: object,
    items: Sequence[ChoiceItem] | Sequence[MatchItem],
    task: Mapping[str, object],
    folder: Path,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the harness's results and samples, in the order of the items."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    path = folder / "items.jsonl"
    path.write_text("\n".join(json.dumps(dataclasses.asdict(item)) for item in items))
    config = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        **task,
    }
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=[config],
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"]["local"], key=lambda sample: sample["doc_id"])
    return found["results"]["local"], samples


def test_multiple_choice_is_the_same(
    smollm2: torch.nn.Module, smollm2_tokenizer: object, tmp_path: Path
) -> None:
    items = next_sentence_items(12, seed=1)
    items.append(ChoiceItem(context="Paris is the capital of ", choices=("France", "é"), answer=0))
    items.append(ChoiceItem(context="", choices=("The", "Zqx"), answer=0))
    task = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
    }
    results, samples = run_harness(smollm2, smollm2_tokenizer, items, task, tmp_path)
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
    task = {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "filter_list": [
            {
                "name": "number",
                "filter": [
                    {"function": "regex", "regex_pattern": PATTERN},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match"}],
    }
    results, samples = run_harness(smollm2, smollm2_tokenizer, items, task, tmp_path)
    ours = exact_match(smollm2, items, tokenizer=smollm2_tokenizer, max_gen_toks=8, pattern=PATTERN)
    for item, sample in zip(ours.items, samples, strict=True):
        assert item.text == sample["resps"][0][0]
        assert item.extracted == sample["filtered_resps"][0]
        assert float(item.is_right) == sample["exact_match"]
    assert ours.measurements[0].value == pytest.approx(results["exact_match,number"])
