"""One-device models: the decoder, the encoder, their configs, families and presets. Importing this
loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from deepseek.models.config import (
    DecoderConfig,
    EncoderConfig,
    ExpertsConfig,
    LatentConfig,
    RopeConfig,
)

if TYPE_CHECKING:
    from deepseek.models.decoder import CausalOutput, Decoder, next_token_loss
    from deepseek.models.encoder import Encoder, EncoderOutput
    from deepseek.models.planner import Planner, WindowPlanner

__all__ = [
    "CausalOutput",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "EncoderOutput",
    "ExpertsConfig",
    "LatentConfig",
    "Planner",
    "RopeConfig",
    "WindowPlanner",
    "next_token_loss",
]

_PLACES = {
    "CausalOutput": "decoder",
    "Decoder": "decoder",
    "Encoder": "encoder",
    "EncoderOutput": "encoder",
    "Planner": "planner",
    "WindowPlanner": "planner",
    "next_token_loss": "decoder",
}


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
