"""Attention over block tables and a paged cache: the seam that planners, kernels and the server
share."""

from deepseek.ops.attention.api import (
    ATTENTION_IMPLS,
    AttentionImpl,
    Execution,
    attention,
    choose,
)
from deepseek.ops.attention.cache import DenseKV, KVCache, KVShape, PagedKV
from deepseek.ops.attention.layout import Layout
from deepseek.ops.attention.merging import merge
from deepseek.ops.attention.table import BlockTable

__all__ = [
    "ATTENTION_IMPLS",
    "AttentionImpl",
    "BlockTable",
    "DenseKV",
    "Execution",
    "KVCache",
    "KVShape",
    "Layout",
    "PagedKV",
    "attention",
    "choose",
    "merge",
]
