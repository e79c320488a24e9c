"""One-device models: the decoder, the encoder, their configs, families and presets."""

from deepseek.models.config import (
    DecoderConfig,
    EncoderConfig,
    ExpertsConfig,
    LatentConfig,
    RopeConfig,
)
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
