"""The LM Evaluation Harness on items of ours."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.evaluate import ChoiceItem, MatchItem

PATTERN = r"(\-?[0-9]+)"

CHOICE: dict[str, object] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
}
"""The task of `ChoiceItem`s."""

MATCH: dict[str, object] = {
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
"""The task of `MatchItem`s whose answers are numbers."""


def of_model(model: torch.nn.Module, tokenizer: object) -> Any:
    """Return a model of transformers as the harness takes it."""
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)


def run_harness(
    peer: Any,
    items: Sequence[ChoiceItem] | Sequence[MatchItem],
    task: Mapping[str, object],
    folder: Path,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the harness's results and samples, in the order of the items.

    Args:
        peer: what the harness asks.
        items: of one task.
        task: how they are asked.
        folder: for files.
    """
    lm_eval = pytest.importorskip("lm_eval")
    path = folder / "items.jsonl"
    path.write_text("\n".join(json.dumps(dataclasses.asdict(item)) for item in items))
    config = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        **task,
    }
    found = lm_eval.simple_evaluate(model=peer, tasks=[config], log_samples=True, bootstrap_iters=0)
    samples = sorted(found["samples"]["local"], key=lambda sample: sample["doc_id"])
    return found["results"]["local"], samples
