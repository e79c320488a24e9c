"""One-device models: the decoder, the encoder, their configs, families and presets. Importing this
loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deepseek.models.config import (
    DecoderConfig,
    EncoderConfig,
    ExpertsConfig,
    GateConfig,
    LatentConfig,
    Pattern,
    RopeConfig,
)
from deepseek.registry import lazy_names

if TYPE_CHECKING:
    from deepseek.models.decoder import CausalOutput, Decoder, next_token_loss
    from deepseek.models.divided import DividedDecoder
    from deepseek.models.encoder import Encoder, EncoderOutput
    from deepseek.models.gates import GateWatch, add_gates
    from deepseek.models.planner import Planner, WindowPlanner
    from deepseek.models.routed import RoutedPlanner
    from deepseek.models.splits import check_mesh, decoder_splits
    from deepseek.models.stage import DecoderStage
    from deepseek.models.static import StaticPlanner

__all__ = [
    "CausalOutput",
    "Decoder",
    "DecoderConfig",
    "DecoderStage",
    "DividedDecoder",
    "Encoder",
    "EncoderConfig",
    "EncoderOutput",
    "ExpertsConfig",
    "GateConfig",
    "GateWatch",
    "LatentConfig",
    "Pattern",
    "Planner",
    "RopeConfig",
    "RoutedPlanner",
    "StaticPlanner",
    "WindowPlanner",
    "add_gates",
    "check_mesh",
    "decoder_splits",
    "next_token_loss",
]

_PLACES = {
    "CausalOutput": "decoder",
    "Decoder": "decoder",
    "DecoderStage": "stage",
    "DividedDecoder": "divided",
    "Encoder": "encoder",
    "EncoderOutput": "encoder",
    "GateWatch": "gates",
    "Planner": "planner",
    "RoutedPlanner": "routed",
    "StaticPlanner": "static",
    "WindowPlanner": "planner",
    "add_gates": "gates",
    "check_mesh": "splits",
    "decoder_splits": "splits",
    "next_token_loss": "decoder",
}

__getattr__, __dir__ = lazy_names(__name__, _PLACES, __all__)
