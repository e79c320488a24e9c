"""Quality, retrieval, speed and memory of a model: every figure with its spread and its command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek.registry import lazy_names

if TYPE_CHECKING:
    from deepseek.evaluate.choice import multiple_choice
    from deepseek.evaluate.classification import (
        AccuracyResult,
        PairedAccuracy,
        accuracy,
        compare_accuracy,
    )
    from deepseek.evaluate.corpus import Corpus, default_corpus, read_corpus
    from deepseek.evaluate.early_exit import ExitScores, score_exits
    from deepseek.evaluate.exit_calibration import ExitCalibration, calibrate_exits
    from deepseek.evaluate.items import (
        ChoiceItem,
        MatchItem,
        addition_items,
        next_sentence_items,
        read_choice_items,
        read_match_items,
    )
    from deepseek.evaluate.kl_divergence import divergence
    from deepseek.evaluate.latency import speed, speed_side_by_side
    from deepseek.evaluate.match import exact_match
    from deepseek.evaluate.retrieval import copy_accuracy, needle
    from deepseek.evaluate.sliding_perplexity import perplexity
    from deepseek.evaluate.spans import attention_spans
    from deepseek.evaluate.tasks import SuiteSettings, suite, task_names
    from deepseek.evaluate.tracking import variable_tracking

__all__ = [
    "AccuracyResult",
    "ChoiceItem",
    "Corpus",
    "ExitCalibration",
    "ExitScores",
    "MatchItem",
    "PairedAccuracy",
    "SuiteSettings",
    "accuracy",
    "addition_items",
    "attention_spans",
    "calibrate_exits",
    "compare_accuracy",
    "copy_accuracy",
    "default_corpus",
    "divergence",
    "exact_match",
    "multiple_choice",
    "needle",
    "next_sentence_items",
    "perplexity",
    "read_choice_items",
    "read_corpus",
    "read_match_items",
    "score_exits",
    "speed",
    "speed_side_by_side",
    "suite",
    "task_names",
    "variable_tracking",
]

_HOMES = {
    "AccuracyResult": "classification",
    "ChoiceItem": "items",
    "Corpus": "corpus",
    "ExitCalibration": "exit_calibration",
    "ExitScores": "early_exit",
    "MatchItem": "items",
    "PairedAccuracy": "classification",
    "SuiteSettings": "tasks",
    "accuracy": "classification",
    "addition_items": "items",
    "attention_spans": "spans",
    "calibrate_exits": "exit_calibration",
    "compare_accuracy": "classification",
    "copy_accuracy": "retrieval",
    "default_corpus": "corpus",
    "divergence": "kl_divergence",
    "exact_match": "match",
    "multiple_choice": "choice",
    "needle": "retrieval",
    "next_sentence_items": "items",
    "perplexity": "sliding_perplexity",
    "read_choice_items": "items",
    "read_corpus": "corpus",
    "read_match_items": "items",
    "score_exits": "early_exit",
    "speed": "latency",
    "speed_side_by_side": "latency",
    "suite": "tasks",
    "task_names": "tasks",
    "variable_tracking": "tracking",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
