"""Engines of models at rest: from a bundle straight to packed weights. Loads no torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deepseek import hub
from deepseek.engines.facts import (
    EngineFacts,
    as_scheme,
    facts_of_bundle,
    fetch,
    weights_of,
)
from deepseek.errors import ConfigError, FormatError, describe
from deepseek.ops.routing import Routing
from deepseek.ops.scheme import Scheme

if TYPE_CHECKING:
    from deepseek.generate import EncoderEngine, Engine
    from deepseek.generate.engine import PackedBytes
    from deepseek.hub.bundle import Bundle

_LOG = logging.getLogger(__name__)


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

    asked = as_scheme(scheme)
    fetch(source)
    path = hub.resolve(source)
    must = "an encoder that the engine runs"
    if path.is_file():
        raise ConfigError(describe("model", "load_encoder_engine", must, f"{path}, one file"))
    bundle = Bundle.open(path, verify=verify)
    facts = facts_of_bundle(bundle, asked)
    config = facts.config
    if not isinstance(config, EncoderConfig):
        raise ConfigError(describe("model", "load_encoder_engine", must, "a decoder"))
    if facts.scheme is None:
        must, step = "float32 or bfloat16 where no scheme is given", "Give one"
        raise ConfigError(describe("weights", "load_encoder_engine", must, "others", step))
    return build_encoder_engine(
        with_pooling(config, bundle.path),
        weights_of(bundle, config),
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

    asked = as_scheme(scheme)
    if not isinstance(attention, Routing) and attention not in ("auto", "dense", "routed"):
        must, step = "'auto', 'dense', 'routed' or a Routing", "Use load for others"
        raise ConfigError(describe("attention", "load_engine", must, attention, step))
    fetch(source)
    path = hub.resolve(source)
    if path.is_file() or why_missing() is not None:
        return None
    bundle = Bundle.open(path, verify=verify)
    routing = routing_asked(attention, bundle)
    facts = facts_of_bundle(bundle, asked, context)
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

    tokenizer = Tokenizer.from_folder(bundle.path)
    # what reading it took is as large as a small cache, and would stand beside the weights
    kernels().release_freed()

    def build(packed: Mapping[str, PackedBytes] | None) -> Engine:
        return build_engine(
            config,
            weights_of(bundle, config),
            scheme,
            tokenizer=tokenizer,
            bundle=bundle,
            threads=threads,
            progress=progress,
            packed=packed,
            routing=routing,
        )

    packed = None if place is None else read_packed(place)
    engine = None if packed is None else _of_kept(build, packed)
    if engine is None:
        if scheme.as_stored and why_inexact(bundle.grids) is not None:
            return None
        engine = build(None)
        if place is not None:
            write_packed(place, engine.packed_parts(), folder=bundle.path)
    return engine


def _of_kept(
    build: Callable[[Mapping[str, PackedBytes]], Engine], packed: Mapping[str, PackedBytes]
) -> Engine | None:
    """Return an engine of packed weights, or None, with a word, where their file is damaged."""
    try:
        return build(packed)
    except FormatError as error:
        _LOG.warning("packed weights are made anew: %s", error)
        return None
