"""How the next token is chosen, as data."""

from __future__ import annotations

import dataclasses
import math

from deepseek.config import Config
from deepseek.errors import ConfigError, describe

_PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
# Below it float32 logits overflow, and the most probable token has all the mass anyway.
_LEAST_TEMPERATURE = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Config):
    """How the next token is chosen; the default is greedy.

    The steps come in this order: repetition, frequency and presence penalty, temperature, top-k,
    top-p, min-p, draw. With temperature 0 the penalties still count and the filters do nothing.
    """

    temperature: float = 0.0
    """Divides the logits; 0 takes the most probable token."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most probable tokens whose probabilities sum to at least this."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as probable as the most probable one."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or answer; 1 is none."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit once for each time it is in the answer."""
    presence_penalty: float = 0.0
    """Taken from a token's logit once if it is in the answer."""
    seed: int | None = None
    """Row i draws from seed + i; None draws anew each time."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            ConfigError: naming the field.
        """
        for name in ("temperature", "top_p", "min_p", *_PENALTIES):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            self._require(name, is_number and math.isfinite(value), "a finite number")
        for name, optional in (("top_k", False), ("seed", True)):
            value = getattr(self, name)
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            self._require(name, is_whole or (optional and value is None), "a whole number")
        is_warm = self.temperature == 0 or self.temperature >= _LEAST_TEMPERATURE
        self._require("temperature", is_warm, f"0 (greedy) or at least {_LEAST_TEMPERATURE}")
        self._require("top_k", self.top_k >= 0, "0 (all tokens) or more")
        self._require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (all tokens)")
        self._require("min_p", 0 <= self.min_p <= 1, "from 0 (all tokens) to 1")
        self._require("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 is none)")
        is_64_bit = self.seed is None or -(2**62) <= self.seed < 2**62
        self._require("seed", is_64_bit, "between -2**62 and 2**62, or None")

    def _require(self, name: str, holds: bool, must: str) -> None:
        if not holds:
            raise ConfigError(describe(name, "Sampling", must, getattr(self, name)))

    @property
    def is_greedy(self) -> bool:
        """True if the most probable token is taken."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """True if earlier tokens change the logits."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return penalties != (1, 0, 0)
