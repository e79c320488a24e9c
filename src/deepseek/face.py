"""What the root's names stand for: loading and saving joined with what a loaded model can do."""

from __future__ import annotations

import importlib
import types
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepseek import hub
from deepseek.hub import pull, save
from deepseek.models import Decoder, Encoder
from deepseek.ops.attention import AttentionImpl

__all__ = ["attach_methods", "load", "pull", "save"]

METHODS: dict[str, tuple[str, str]] = {"generate": ("deepseek.generate", "generate")}
"""Methods of a loaded decoder: name, and the module and function that run it."""


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    attention: AttentionImpl = "auto",
    device: str | torch.device = "cpu",
    verify: bool = False,
) -> Decoder | Encoder:
    """Return a model, ready to run, with `tokenizer`, `bundle` and (a decoder) `generate`.

    Args:
        source: a name (`smollm2-135m`), a folder in Hugging Face layout, or a `.gguf` file. A name
            that is not in the store yet is pulled.
        dtype: "float32", "bfloat16", "float16" or a torch dtype; None for the dtype it is stored
            in.
        attention: how attention is executed; a name is used or refused, never replaced.
        device: where the weights go.
        verify: hash every file first (always done: sizes, headers and the small files).

    Raises:
        ConfigError: an unknown name or dtype.
        FormatError: a folder or file that is not a whole model.
    """
    model = hub.load(source, dtype=dtype, device=device, verify=verify, attention=attention)
    if isinstance(model, Decoder):
        attach_methods(model)
    return model


def attach_methods(model: nn.Module) -> None:
    """Give a decoder the methods of a loaded model; each imports its room when called."""
    for name, (module, function) in METHODS.items():
        setattr(model, name, types.MethodType(_late(name, module, function), model))


def _late(name: str, module: str, function: str) -> types.FunctionType:
    def method(self: nn.Module, *args: Any, **settings: Any) -> Any:
        return getattr(importlib.import_module(module), function)(self, *args, **settings)

    method.__name__ = name
    method.__doc__ = f"See `{module}.{function}`; the model is its first argument."
    return method
