"""What an engine of a model would be, known before a weight is read. Loads no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek import hub
from deepseek.errors import ConfigError
from deepseek.hub.names import NAMES, canonical_name
from deepseek.ops.scheme import Scheme

if TYPE_CHECKING:
    from deepseek.generate.engine import Weights
    from deepseek.hub.bundle import Bundle
    from deepseek.hub.mapping import MappedTensor
    from deepseek.models import DecoderConfig, EncoderConfig
    from deepseek.ops.grid import GridSource
    from deepseek.ops.scheme import Form


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

    asked = as_scheme(scheme)
    fetch(source)
    path = hub.resolve(source)
    if path.is_file():
        return _facts_of_gguf(path, asked)
    bundle = Bundle.open(path)
    facts = facts_of_bundle(bundle, asked)
    if facts.reason is not None or facts.scheme is None or not facts.scheme.as_stored:
        return facts
    return dataclasses.replace(facts, reason=why_inexact(bundle.grids))


_STORED = {"F32": "float32", "BF16": "bfloat16"}


def facts_of_bundle(
    bundle: Bundle, asked: Scheme | None, context: int | None = None
) -> EngineFacts:
    """Return what an engine of a bundle would be.

    Args:
        bundle: of a decoder or an encoder.
        asked: scheme; None for the weights as they are.
        context: in tokens, to which positions are stretched; None for the model's own.

    Raises:
        ConfigError: positions that cannot be stretched.
    """
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
    found = forms_as_stored(program, weights_of(bundle, config))
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


def weights_of(bundle: Bundle, config: DecoderConfig | EncoderConfig) -> Weights:
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


def as_scheme(scheme: str | Scheme | None) -> Scheme | None:
    """Return the scheme of a name, or what is one already.

    Raises:
        ConfigError: no scheme has the name.
    """
    return Scheme.named(scheme) if isinstance(scheme, str) else scheme


def fetch(source: str | Path) -> None:
    """Pull a known name that is not in the store yet."""
    if not _is_here(source) and canonical_name(str(source)) in NAMES:
        hub.pull(source)


def _is_here(source: str | Path) -> bool:
    try:
        hub.resolve(source)
    except ConfigError:
        return False
    return True
