"""What the root's names stand for: loading and saving joined with what a loaded model can do."""

from __future__ import annotations

import dataclasses
import importlib
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deepseek import hub
from deepseek.errors import ConfigError, describe
from deepseek.hub.names import NAMES, canonical_name
from deepseek.ops.routing import Routing
from deepseek.ops.scheme import Scheme

if TYPE_CHECKING:
    import torch
    from torch import nn

    from deepseek.generate import EncoderEngine, Engine
    from deepseek.generate.engine import Weights
    from deepseek.hub.bundle import Bundle
    from deepseek.hub.mapping import MappedTensor
    from deepseek.hub.pulling import pull
    from deepseek.hub.saving import save
    from deepseek.models import Decoder, DecoderConfig, Encoder, EncoderConfig, Planner
    from deepseek.ops.attention import AttentionImpl
    from deepseek.ops.grid import GridSource
    from deepseek.ops.scheme import Form

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
    asked = _as_scheme(scheme)
    _fetch(source)
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


def load_encoder_engine(
    source: str | Path,
    *,
    scheme: str | Scheme | None = None,
    threads: int | None = None,
    verify: bool = False,
    progress: Callable[[float], None] | None = None,
) -> EncoderEngine:
    """Return the engine of an encoder's bundle; torch is never imported.

    Args: as of `load_engine`.

    Raises:
        ConfigError: an unknown name or scheme, or a model that has no such engine.
        FormatError: a folder that is not a whole model.
    """
    from deepseek.data import Tokenizer
    from deepseek.generate import build_encoder_engine
    from deepseek.hub.bundle import Bundle
    from deepseek.hub.sentence import with_pooling
    from deepseek.models.config import EncoderConfig

    asked = _as_scheme(scheme)
    _fetch(source)
    path = hub.resolve(source)
    must = "an encoder that the engine runs"
    if path.is_file():
        raise ConfigError(describe("model", "load_encoder_engine", must, f"{path}, one file"))
    bundle = Bundle.open(path, verify=verify)
    facts = _facts_of_bundle(bundle, asked)
    config = facts.config
    if not isinstance(config, EncoderConfig):
        raise ConfigError(describe("model", "load_encoder_engine", must, "a decoder"))
    if facts.scheme is None:
        must, step = "float32 or bfloat16 where no scheme is given", "Give one"
        raise ConfigError(describe("weights", "load_encoder_engine", must, "others", step))
    return build_encoder_engine(
        with_pooling(config, bundle.path),
        _weights_of(bundle, config),
        facts.scheme,
        tokenizer=Tokenizer.from_folder(bundle.path),
        threads=threads,
        progress=progress,
    )


def load_engine(
    source: str | Path,
    *,
    scheme: str | Scheme | None = None,
    attention: Literal["auto", "dense", "routed"] | Routing = "auto",
    threads: int | None = None,
    verify: bool = False,
    progress: Callable[[float], None] | None = None,
    keep: bool = True,
    context: int | None = None,
) -> Engine | None:
    """Return an engine of a bundle, for `deepseek.generate.generate`; torch is never imported.

    It starts several times faster than `load` and holds the packed weights only. They are kept in
    `$DEEPSEEK_HOME/packed` and read from there the next time.

    Args:
        source: as in `load`; a `.gguf` file has no engine without torch.
        scheme: as in `load`.
        attention: "auto", "dense", "routed" or a Routing: the engine has one execution, and no
            planners.
        threads: threads to compute with; None for the cores this process may use.
        verify: hash every file first.
        progress: called with the share of weights that are packed.
        keep: keep the packed weights on the disk, and use those that are there.
        context: as in `load`.

    Returns:
        None where the model does not run on the engine without torch: load it by `load`.

    Raises:
        ConfigError: an unknown name or scheme, attention that the engine does not have, or
            positions that cannot be stretched.
        FormatError: a folder that is not a whole model.
    """
    from deepseek.hub.bundle import Bundle, routing_asked
    from deepseek.ops.cpu import why_missing

    asked = _as_scheme(scheme)
    if not isinstance(attention, Routing) and attention not in ("auto", "dense", "routed"):
        must, step = "'auto', 'dense', 'routed' or a Routing", "Use load for others"
        raise ConfigError(describe("attention", "load_engine", must, attention, step))
    _fetch(source)
    path = hub.resolve(source)
    if path.is_file() or why_missing() is not None:
        return None
    bundle = Bundle.open(path, verify=verify)
    routing = routing_asked(attention, bundle)
    facts = _facts_of_bundle(bundle, asked, context)
    return _engine_of(bundle, facts, routing, threads=threads, progress=progress, keep=keep)


def _engine_of(
    bundle: Bundle,
    facts: EngineFacts,
    routing: Routing | None,
    *,
    threads: int | None,
    progress: Callable[[float], None] | None,
    keep: bool,
) -> Engine | None:
    from deepseek.data import Tokenizer
    from deepseek.generate.engine import build_engine
    from deepseek.hub.packed import packed_path, read_packed, write_packed
    from deepseek.models.config import DecoderConfig
    from deepseek.ops.cpu import kernels, packed_form
    from deepseek.ops.grid import why_inexact

    config, scheme = facts.config, facts.scheme
    if facts.reason is not None or scheme is None or not isinstance(config, DecoderConfig):
        return None
    held = f"{scheme.weights} {scheme.group} {scheme.head_storage}"
    form = f"{'as stored' if scheme.as_stored else held} {packed_form()}"
    place = packed_path(bundle.path, bundle.tensors, form=form) if keep else None
    packed = None if place is None else read_packed(place)
    is_checked = packed is not None or not scheme.as_stored
    if not is_checked and why_inexact(bundle.grids) is not None:
        return None
    engine = build_engine(
        config,
        _weights_of(bundle, config),
        scheme,
        tokenizer=Tokenizer.from_folder(bundle.path),
        bundle=bundle,
        threads=threads,
        progress=progress,
        packed=packed,
        routing=routing,
    )
    if place is not None and packed is None:
        write_packed(place, engine.packed_parts(), folder=bundle.path)
    kernels().release_freed()  # what reading the tokenizer took is as large as a small cache
    return engine


@dataclasses.dataclass(frozen=True)
class EngineFacts:
    """What an engine of a model would be, known before a weight is read."""

    config: DecoderConfig | EncoderConfig
    scheme: Scheme | None
    """None where the weights are stored in a way that the engine does not have."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of the weights, by our names."""
    reason: str | None
    """Why there is no engine; None where there is one."""
    forms: Mapping[str, Form] = dataclasses.field(default_factory=dict)
    """How the engine holds each weight, where the scheme says as stored."""


def engine_facts(source: str | Path, *, scheme: str | Scheme | None = None) -> EngineFacts:
    """Return what an engine of a model would be, or why it has none; torch is imported only for a
    `.gguf` file, whose engine needs it too.

    Args:
        source: as in `load`.
        scheme: as in `load`.

    Raises:
        ConfigError: an unknown name or scheme.
        FormatError: a folder or file that is not a whole model.
    """
    from deepseek.hub.bundle import Bundle
    from deepseek.ops.grid import why_inexact

    asked = _as_scheme(scheme)
    _fetch(source)
    path = hub.resolve(source)
    if path.is_file():
        return _facts_of_gguf(path, asked)
    bundle = Bundle.open(path)
    facts = _facts_of_bundle(bundle, asked)
    if facts.reason is not None or facts.scheme is None or not facts.scheme.as_stored:
        return facts
    return dataclasses.replace(facts, reason=why_inexact(bundle.grids))


_STORED = {"F32": "float32", "BF16": "bfloat16"}


def _facts_of_bundle(
    bundle: Bundle, asked: Scheme | None, context: int | None = None
) -> EngineFacts:
    from deepseek.generate.engine import forms_as_stored
    from deepseek.generate.flat import decoder_program, why_mixed
    from deepseek.hub.grids import grids_of
    from deepseek.models.config import DecoderConfig
    from deepseek.models.families import config_from_hf, our_name
    from deepseek.models.stretch import stretched

    config = config_from_hf(bundle.config)
    if context is not None and isinstance(config, DecoderConfig):
        config = stretched(config, context)
    plain = {our_name(config, name): entry for name, entry in bundle.plain_tensors.items()}
    entries = {name: entry for name, entry in plain.items() if name is not None}
    grids = grids_of(bundle)
    dtypes = sorted({entry.dtype for entry in entries.values()})
    shapes = {name: each.shape for name, each in (*entries.items(), *grids.items())}
    if grids:
        usual = Scheme(as_stored=True)
    else:
        is_stored = len(dtypes) == 1 and dtypes[0] in _STORED
        usual = Scheme.named(_STORED[dtypes[0]]) if is_stored else None
    if usual is not None and bundle.kv is not None:
        usual = usual.replace(kv=bundle.kv)
    scheme = asked or usual
    reason = _why_no_engine(config, scheme, ", ".join(dtypes))
    if reason is not None or scheme is None or not scheme.as_stored:
        return EngineFacts(config, scheme, shapes, reason)
    assert isinstance(config, DecoderConfig)
    program = decoder_program(config)
    found = forms_as_stored(program, _weights_of(bundle, config))
    forms = {name: form for name, form in found.items() if form is not None}
    return EngineFacts(config, scheme, shapes, why_mixed(program, found), forms)


def _facts_of_gguf(path: Path, asked: Scheme | None) -> EngineFacts:
    import torch

    from deepseek.hub.gguf import read_gguf
    from deepseek.hub.gguf_model import hf_config
    from deepseek.hub.loading import stored_dtype
    from deepseek.models.families import build_model, config_from_hf

    file = read_gguf(path)
    config = config_from_hf(hf_config(file))
    dtype = str(stored_dtype(file)).removeprefix("torch.")
    # its modules are what the engine is built from, and they are taken in these dtypes alone
    scheme = (asked or Scheme.named(dtype)) if dtype in _STORED.values() else None
    with torch.device("meta"):
        parameters = build_model(config).named_parameters()
    shapes = {name: tuple(value.shape) for name, value in parameters}
    return EngineFacts(config, scheme, shapes, _why_no_engine(config, scheme, dtype))


def _why_no_engine(
    config: DecoderConfig | EncoderConfig, scheme: Scheme | None, stored: str
) -> str | None:
    from deepseek.generate.flat import why_not_flat
    from deepseek.models.config import DecoderConfig
    from deepseek.ops.cpu import why_missing

    if not isinstance(config, DecoderConfig):
        return "it is an encoder, whose engine (load_encoder_engine) generates nothing"
    unstored = f"the weights are {stored}; the engine takes float32 or bfloat16 as they are"
    return why_not_flat(config) or (unstored if scheme is None else why_missing())


def _weights_of(bundle: Bundle, config: DecoderConfig | EncoderConfig) -> Weights:
    """Return what gives the weights in turn; what was asked for before is packed by then, and its
    pages go back."""
    from deepseek.generate.engine import Rows
    from deepseek.hub.grids import grids_of
    from deepseek.hub.mapping import map_tensors
    from deepseek.models.families import our_name

    mapped = map_tensors(bundle.path, bundle.plain_tensors)
    tensors = {our_name(config, name): tensor for name, tensor in mapped.items()}
    grids = grids_of(bundle)
    last: list[MappedTensor] = []

    def rows(name: str) -> Rows | GridSource | None:
        if name in grids:
            return grids[name]
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
