"""The families: how each decoder and encoder is named and laid out in a Hugging Face folder, as
tables."""

from deepseek.models.families.build import (
    build_model,
    config_from_hf,
    config_to_hf,
    known_families,
    state_from_hf,
    state_to_hf,
)

__all__ = [
    "build_model",
    "config_from_hf",
    "config_to_hf",
    "known_families",
    "state_from_hf",
    "state_to_hf",
]
