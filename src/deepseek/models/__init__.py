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
from deepseek.models.exits import Exits
from deepseek.registry import lazy_names

if TYPE_CHECKING:
    from deepseek.models.cross_modal import CrossModalPlanner, cross_modal_table
    from deepseek.models.decoder import CausalOutput, Decoder, next_token_loss
    from deepseek.models.divided import DividedDecoder
    from deepseek.models.early_exit import ExitOutput, forward_with_exits
    from deepseek.models.encoder import Encoder, EncoderOutput
    from deepseek.models.gates import GateWatch, add_gates
    from deepseek.models.grown import grow_encoder
    from deepseek.models.planner import Planner, WindowPlanner
    from deepseek.models.routed import RoutedPlanner
    from deepseek.models.segments import Boundaries, SegmentPlanner, Segments
    from deepseek.models.spans import SpanPlanner, Spans
    from deepseek.models.splits import check_mesh, decoder_splits
    from deepseek.models.stage import DecoderStage
    from deepseek.models.static import StaticPlanner

__all__ = [
    "Boundaries",
    "CausalOutput",
    "CrossModalPlanner",
    "Decoder",
    "DecoderConfig",
    "DecoderStage",
    "DividedDecoder",
    "Encoder",
    "EncoderConfig",
    "EncoderOutput",
    "ExitOutput",
    "Exits",
    "ExpertsConfig",
    "GateConfig",
    "GateWatch",
    "LatentConfig",
    "Pattern",
    "Planner",
    "RopeConfig",
    "RoutedPlanner",
    "SegmentPlanner",
    "Segments",
    "SpanPlanner",
    "Spans",
    "StaticPlanner",
    "WindowPlanner",
    "add_gates",
    "check_mesh",
    "cross_modal_table",
    "decoder_splits",
    "forward_with_exits",
    "grow_encoder",
    "next_token_loss",
]

_PLACES = {
    "Boundaries": "segments",
    "CausalOutput": "decoder",
    "CrossModalPlanner": "cross_modal",
    "Decoder": "decoder",
    "DecoderStage": "stage",
    "DividedDecoder": "divided",
    "Encoder": "encoder",
    "EncoderOutput": "encoder",
    "ExitOutput": "early_exit",
    "GateWatch": "gates",
    "Planner": "planner",
    "RoutedPlanner": "routed",
    "SegmentPlanner": "segments",
    "Segments": "segments",
    "SpanPlanner": "spans",
    "Spans": "spans",
    "StaticPlanner": "static",
    "WindowPlanner": "planner",
    "add_gates": "gates",
    "check_mesh": "splits",
    "cross_modal_table": "cross_modal",
    "decoder_splits": "splits",
    "forward_with_exits": "early_exit",
    "grow_encoder": "grown",
    "next_token_loss": "decoder",
}

__getattr__, __dir__ = lazy_names(__name__, _PLACES, __all__)
