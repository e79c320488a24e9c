"""Leave out of a model what it would miss least: layers, heads, channels, width, experts, single
weights, tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek.registry import lazy_names

if TYPE_CHECKING:
    from deepseek.compress.prune.groups import Group, find_groups
    from deepseek.compress.prune.latency import LatencyModel, Workload, fit_latency
    from deepseek.compress.prune.shape import Shape
    from deepseek.compress.prune.sparsify import Sparsify
    from deepseek.compress.prune.structured import Prune
    from deepseek.compress.prune.vocabulary import PruneVocabulary

__all__ = [
    "Group",
    "LatencyModel",
    "Prune",
    "PruneVocabulary",
    "Shape",
    "Sparsify",
    "Workload",
    "find_groups",
    "fit_latency",
]

_HOMES = {
    "Group": "groups",
    "LatencyModel": "latency",
    "Prune": "structured",
    "PruneVocabulary": "vocabulary",
    "Shape": "shape",
    "Sparsify": "sparsify",
    "Workload": "latency",
    "find_groups": "groups",
    "fit_latency": "latency",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
