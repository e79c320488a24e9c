"""Early exit as data: where a token may leave, and how sure the model must be. Loads no torch."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

from deepseek.config import Config
from deepseek.errors import ConfigError, describe

Criterion = Literal["margin", "cosine"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exits(Config):
    """Lets a token leave a decoder behind one of some layers, where a criterion is above a
    threshold: its next token is then chosen by the head on the states it left with, and the layers
    above store keys and values of these states.

    Source: Schuster et al. 2022, "Confident Adaptive Language Modeling" (2207.07061), section 3:
    states carried upward, margin ("softmax response") and cosine ("hidden-state saturation").
    Deviation: one threshold for all places, none that falls along the text.
    """

    layers: tuple[int, ...]
    """Behind how many layers it is asked, ascending; each below the model's layers."""
    criterion: Criterion = "margin"
    """`margin`: of the two likeliest next tokens' probabilities, by the model's own norm and head
    on the layer's output; costs a product with the head wherever it is asked. `cosine`: similarity
    of the layer's input and output; costs next to nothing, and says less."""
    threshold: float
    """0 to 1. A token leaves where the criterion is above it: at 1 none does."""

    def __post_init__(self) -> None:
        layers = self.layers
        are_numbers = all(type(layer) is int for layer in layers)
        ascends = are_numbers and all(one < two for one, two in itertools.pairwise(layers))
        if not layers or not ascends or layers[0] < 1:
            must = "numbers of layers from 1 on, ascending"
            raise ConfigError(describe("layers", "Exits", must, layers))
        if self.criterion not in ("margin", "cosine"):
            must = "'margin' or 'cosine'"
            raise ConfigError(describe("criterion", "Exits", must, self.criterion))
        value = self.threshold
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(describe("threshold", "Exits", "from 0 to 1", value))

    @classmethod
    def of(cls, num_layers: int, threshold: float) -> Exits:
        """Return exits by margin behind a half and three quarters of a model's layers.

        Raises:
            ConfigError: the model has a single layer, or the threshold is none.
        """
        layers = sorted({num_layers // 2, num_layers * 3 // 4} - {0, num_layers})
        return cls(layers=tuple(layers), threshold=threshold)

    def check(self, num_layers: int) -> None:
        """Raise if a model of so many layers cannot have them.

        Raises:
            ConfigError: the last one is not before the model's end.
        """
        if self.layers[-1] >= num_layers:
            must = f"below the model's {num_layers} layers"
            raise ConfigError(describe("layers", "Exits", must, self.layers))
