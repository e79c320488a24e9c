"""What the root's names stand for: loading and saving joined with what a loaded model can do."""

from __future__ import annotations

import importlib
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deepseek import hub
from deepseek.engines.facts import EngineFacts, as_scheme, engine_facts, fetch
from deepseek.engines.loading import load_encoder_engine, load_engine
from deepseek.errors import ConfigError, describe
from deepseek.ops.routing import Routing
from deepseek.ops.scheme import Scheme

if TYPE_CHECKING:
    import torch
    from torch import nn

    from deepseek.hub.pulling import pull
    from deepseek.hub.saving import save
    from deepseek.models import Decoder, Encoder, Planner
    from deepseek.ops.attention import AttentionImpl

__all__ = [
    "EngineFacts",
    "attach_methods",
    "engine_facts",
    "load",
    "load_encoder_engine",
    "load_engine",
    "pull",
    "save",
]

METHODS: dict[str, tuple[str, str]] = {
    "generate": ("deepseek.generate", "generate"),
    "quantize": ("deepseek.compress.in_memory", "quantize"),
}
"""Methods of a loaded decoder: name, and the module and function that run it."""


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    attention: AttentionImpl | Literal["dense", "routed"] | Routing | Planner = "auto",
    device: str | torch.device = "cpu",
    verify: bool = False,
    scheme: str | Scheme | None = None,
    context: int | None = None,
) -> Decoder | Encoder:
    """Return a model, ready to run, with `tokenizer`, `bundle` and (a decoder) `generate`.

    Args:
        source: a name (`smollm2-135m`), a folder in Hugging Face layout, or a `.gguf` file. A name
            that is not in the store yet is pulled.
        dtype: "float32", "bfloat16", "float16" or a torch dtype; None for the dtype it is stored
            in.
        attention: "routed", or a `deepseek.ops.routing.Routing`, for layers that choose the blocks
            that they see; "dense" for tokens that see all before them; "auto" for what the bundle's
            card records, dense where it records nothing. `save` records it. A planner
            (`deepseek.models.Planner`), for what it lets each layer see; generation then runs
            through PyTorch. Or how attention is executed; a name is used or refused, never
            replaced.
        device: where the weights go.
        verify: hash every file first (always done: sizes, headers and the small files).
        scheme: how generation stores and computes the weights: "int8", "int4", "int4-kv8", … or a
            Scheme; None for as they are, which for a bundle of weights on grids means those grids.
            The model itself keeps its weights.
        context: in tokens; where it is longer than the model's own, its positions are stretched by
            YaRN, without training (`deepseek.models.stretch`).

    Raises:
        ConfigError: an unknown name, dtype or scheme, a model that the engine does not run or whose
            positions cannot be stretched.
        FormatError: a folder or file that is not a whole model.
    """
    attach_methods()
    asked = as_scheme(scheme)
    fetch(source)
    model = hub.load(
        source, dtype=dtype, device=device, verify=verify, attention=attention, context=context
    )
    if asked is not None:
        vars(model)["scheme"] = asked
        if reason := _use_engine(model):
            step = "Load it without a scheme"
            must = "one that the engine runs"
            raise ConfigError(describe("model", f"scheme {asked.name!r}", must, reason, step))
    return model


def _use_engine(model: Decoder | Encoder) -> str | None:
    """Let a model that asks for a scheme run on its engine; return why it has none."""
    from deepseek.models import Encoder

    if not isinstance(model, Encoder):
        return importlib.import_module("deepseek.generate.modules").why_no_engine(model)
    from deepseek.generate.encoder_modules import EngineRunner, why_no_encoder_engine

    model.runner = EngineRunner()
    return why_no_encoder_engine(model)


def attach_methods() -> None:
    """Give decoders the methods of a loaded model; each imports its room when it is called.

    They are set on the class, so that a model can be copied and pickled.
    """
    from deepseek.models import Decoder

    for name, (module, function) in METHODS.items():
        if not hasattr(Decoder, name):
            setattr(Decoder, name, _late(name, module, function))


def _late(name: str, module: str, function: str) -> types.FunctionType:
    def method(self: nn.Module, *args: Any, **settings: Any) -> Any:
        return getattr(importlib.import_module(module), function)(self, *args, **settings)

    method.__name__ = name
    method.__doc__ = f"See `{module}.{function}`; the model is its first argument."
    return method


def __getattr__(name: str) -> object:
    if name in ("pull", "save"):
        return getattr(hub, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
