"""What the root's names stand for: loading and saving joined with what a loaded model can do."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek import hub
from deepseek.errors import ConfigError, describe
from deepseek.hub.names import NAMES, canonical_name
from deepseek.ops.scheme import Scheme

if TYPE_CHECKING:
    import torch
    from torch import nn

    from deepseek.generate import Engine
    from deepseek.generate.engine import Weights
    from deepseek.hub.bundle import Bundle
    from deepseek.hub.mapping import MappedTensor
    from deepseek.hub.pulling import pull
    from deepseek.hub.saving import save
    from deepseek.models import Decoder, Encoder
    from deepseek.ops.attention import AttentionImpl

__all__ = ["attach_methods", "load", "load_engine", "pull", "save"]

METHODS: dict[str, tuple[str, str]] = {"generate": ("deepseek.generate", "generate")}
"""Methods of a loaded decoder: name, and the module and function that run it."""


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    attention: AttentionImpl = "auto",
    device: str | torch.device = "cpu",
    verify: bool = False,
    scheme: str | Scheme | None = None,
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
        scheme: how generation stores and computes the weights: "int8", "int4", "int4-kv8", … or a
            Scheme; None for as they are. The model itself keeps its weights.

    Raises:
        ConfigError: an unknown name, dtype or scheme, or a model that the engine does not run.
        FormatError: a folder or file that is not a whole model.
    """
    attach_methods()
    asked = _as_scheme(scheme)
    _fetch(source)
    model = hub.load(source, dtype=dtype, device=device, verify=verify, attention=attention)
    if asked is not None:
        vars(model)["scheme"] = asked
        if reason := importlib.import_module("deepseek.generate.modules").why_no_engine(model):
            step = "Load it without a scheme"
            must = "one that the engine runs"
            raise ConfigError(describe("model", f"scheme {asked.name!r}", must, reason, step))
    return model


def load_engine(
    source: str | Path,
    *,
    scheme: str | Scheme | None = None,
    threads: int | None = None,
    verify: bool = False,
    progress: Callable[[float], None] | None = None,
    keep: bool = True,
) -> Engine | None:
    """Return an engine of a bundle, for `deepseek.generate.generate`; torch is never imported.

    It starts several times faster than `load` and holds the packed weights only. They are kept in
    `$DEEPSEEK_HOME/packed` and mapped the next time.

    Args:
        source: as in `load`; a `.gguf` file has no engine without torch.
        scheme: as in `load`.
        threads: threads to compute with; None for the cores this process may use.
        verify: hash every file first.
        progress: called with the share of weights that are packed.
        keep: keep the packed weights on the disk, and use those that are there.

    Returns:
        None where the model does not run on the engine without torch: load it by `load`.

    Raises:
        ConfigError: an unknown name or scheme.
        FormatError: a folder that is not a whole model.
    """
    from deepseek.hub.bundle import Bundle
    from deepseek.ops.cpu import why_missing

    asked = _as_scheme(scheme)
    _fetch(source)
    path = hub.resolve(source)
    if path.is_file() or why_missing() is not None:
        return None
    bundle = Bundle.open(path, verify=verify)
    return _engine_of(bundle, asked, threads=threads, progress=progress, keep=keep)


def _engine_of(
    bundle: Bundle,
    asked: Scheme | None,
    *,
    threads: int | None,
    progress: Callable[[float], None] | None,
    keep: bool,
) -> Engine | None:
    from deepseek.data import Tokenizer
    from deepseek.generate.engine import build_engine
    from deepseek.generate.flat import why_not_flat
    from deepseek.hub.mapping import map_tensors
    from deepseek.hub.packed import packed_path, read_packed, write_packed
    from deepseek.models.config import DecoderConfig
    from deepseek.models.families import config_from_hf, our_name
    from deepseek.ops.cpu import packed_form

    config = config_from_hf(bundle.config)
    if not isinstance(config, DecoderConfig) or why_not_flat(config) is not None:
        return None
    mapped = map_tensors(bundle.path, bundle.tensors)
    names = {our_name(config, name): name for name in mapped}
    scheme = asked or _stored_scheme({mapped[name].dtype for name in names.values()})
    if scheme is None:
        return None
    form = f"{scheme.weights} {scheme.group} {scheme.head_storage} {packed_form()}"
    place = packed_path(bundle.path, bundle.tensors, form=form) if keep else None
    packed = None if place is None else read_packed(place)
    engine = build_engine(
        config,
        _each_once({ours: mapped[name] for ours, name in names.items() if ours is not None}),
        scheme,
        tokenizer=Tokenizer.from_folder(bundle.path),
        bundle=bundle,
        threads=threads,
        progress=progress,
        packed=packed,
    )
    if place is not None and packed is None:
        write_packed(place, engine.packed_parts(), folder=bundle.path)
    return engine


def _stored_scheme(dtypes: set[str]) -> Scheme | None:
    """Return the scheme of weights as they are, None where the engine has none for them."""
    if len(dtypes) != 1 or "float16" in dtypes:
        return None
    return Scheme.named(dtypes.pop())


def _each_once(tensors: Mapping[str, MappedTensor]) -> Weights:
    """Return what gives the weights in turn; what was asked for before is packed by then, and its
    pages go back."""
    from deepseek.generate.engine import Rows

    last: list[MappedTensor] = []

    def rows(name: str) -> Rows | None:
        if name not in tensors:
            return None
        while last:
            last.pop().release()
        tensor = tensors[name]
        last.append(tensor)
        return Rows(tensor.address, tensor.dtype, tensor.shape, tensor.stride_bytes, tensor)

    return rows


def _as_scheme(scheme: str | Scheme | None) -> Scheme | None:
    return Scheme.named(scheme) if isinstance(scheme, str) else scheme


def _fetch(source: str | Path) -> None:
    if not _is_here(source) and canonical_name(str(source)) in NAMES:
        hub.pull(source)


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
