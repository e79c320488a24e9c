"""Engines of models at rest: loaded without torch, and held for all who ask for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek.registry import lazy_names

if TYPE_CHECKING:
    from deepseek.engines.cache import ModelCache
    from deepseek.engines.facts import EngineFacts, engine_facts
    from deepseek.engines.loading import load_encoder_engine, load_engine

__all__ = ["EngineFacts", "ModelCache", "engine_facts", "load_encoder_engine", "load_engine"]

_HOMES = {
    "EngineFacts": "facts",
    "ModelCache": "cache",
    "engine_facts": "facts",
    "load_encoder_engine": "loading",
    "load_engine": "loading",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
