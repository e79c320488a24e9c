"""Text in and out: tokenizers, chat templates and incremental decoding."""

from __future__ import annotations

from deepseek.data.incremental import IncrementalDecoder
from deepseek.data.tokenizer import Tokenizer

__all__ = ["IncrementalDecoder", "Tokenizer"]
