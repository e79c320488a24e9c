"""The token loop of one process: prompts in, text out, whole or piece by piece.

Importing this loads no torch: an engine runs without it.
"""

from __future__ import annotations

from deepseek.generate.completion import Completion, Piece
from deepseek.generate.encoder_engine import EncoderEngine, build_encoder_engine
from deepseek.generate.engine import Engine, build_engine
from deepseek.generate.loop import generate, stream
from deepseek.generate.memory import Memory
from deepseek.generate.pooler import Pooler
from deepseek.generate.prompt import chat_prompt
from deepseek.models.exits import Exits
from deepseek.ops.sampling.config import Sampling

__all__ = [
    "Completion",
    "EncoderEngine",
    "Engine",
    "Exits",
    "Memory",
    "Piece",
    "Pooler",
    "Sampling",
    "build_encoder_engine",
    "build_engine",
    "chat_prompt",
    "generate",
    "stream",
]
