"""What the root's names stand for: loading and saving joined with what a loaded model can do."""

from __future__ import annotations

import importlib
import types
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepseek import hub
from deepseek.errors import ConfigError
from deepseek.hub import pull, save
from deepseek.hub.names import NAMES, canonical_name
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
    attach_methods()
    if not _is_here(source) and canonical_name(str(source)) in NAMES:
        hub.pull(source)
    return hub.load(source, dtype=dtype, device=device, verify=verify, attention=attention)


def _is_here(source: str | Path) -> bool:
    try:
        hub.resolve(source)
    except ConfigError:
        return False
    return True


def attach_methods() -> None:
    """Give decoders the methods of a loaded model; each imports its room when it is called.

    They are set on the class, so that a model can be copied and pickled.
    """
    for name, (module, function) in METHODS.items():
        if not hasattr(Decoder, name):
            setattr(Decoder, name, _late(name, module, function))


def _late(name: str, module: str, function: str) -> types.FunctionType:
    def method(self: nn.Module, *args: Any, **settings: Any) -> Any:
        return getattr(importlib.import_module(module), function)(self, *args, **settings)

    method.__name__ = name
    method.__doc__ = f"See `{module}.{function}`; the model is its first argument."
    return method
