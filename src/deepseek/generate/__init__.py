"""The token loop of one process: prompts in, text out, whole or piece by piece."""

from __future__ import annotations

from deepseek.generate.completion import Completion, Piece
from deepseek.generate.loop import generate, stream
from deepseek.generate.prompt import chat_prompt
from deepseek.ops.sampling import Sampling

__all__ = ["Completion", "Piece", "Sampling", "chat_prompt", "generate", "stream"]
