"""Our own family's config in the shape that transformers' Auto classes expect; needs no torch."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

MODEL_TYPE = "deepseek_stack"


class DeepseekStackConfig(PretrainedConfig):
    """A `DecoderConfig` inside a transformers config: its fields stand under `decoder_config`."""

    model_type = MODEL_TYPE

    def __init__(self, decoder_config: dict[str, Any] | None = None, **rest: Any) -> None:
        self.decoder_config = decoder_config
        super().__init__(**rest)


def register() -> None:
    """Make `AutoConfig` know our family."""
    AutoConfig.register(MODEL_TYPE, DeepseekStackConfig, exist_ok=True)
