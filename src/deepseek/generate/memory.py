"""Bounded memory of a text of any length. Loads no torch."""

from __future__ import annotations

import dataclasses

from deepseek.config import Config
from deepseek.errors import ConfigError, describe
from deepseek.generate.engine import PAGE_SIZE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory(Config):
    """What the cache keeps of a text that has no end: its first tokens and the most recent ones.

    When `max_len` tokens are in the cache, all but the first `first` and the last `mem_len` leave
    it; the keys that stay are turned back to the positions that became free, so that no token ever
    stands behind position `max_len`. What is kept depends on the text alone: a prompt, its chunks
    and single tokens give the same result.

    Source: the first tokens ("attention sinks") and positions within the cache of StreamingLLM
    (Xiao et al. 2023, 2309.17453, section 3.2); segments that see the `mem_len` tokens before them
    as Transformer-XL (Dai et al. 2019, 1901.02860, section 3.2), whose relative positions the
    turning back is.
    """

    max_len: int = 4096
    """Most tokens in the cache, a multiple of 64; at most the context the model was made for."""
    mem_len: int = 2048
    """Most recent tokens that are kept when it is full, a multiple of 64."""
    first: int = 64
    """Tokens at the start of a text that are always kept, a multiple of 64; without any, a model
    that leans on its first token falls apart."""

    def __post_init__(self) -> None:
        for name in ("max_len", "mem_len", "first"):
            value = getattr(self, name)
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if not is_whole or value < 0 or value % PAGE_SIZE:
                must = f"a whole multiple of {PAGE_SIZE}, not negative"
                raise ConfigError(describe(name, "Memory", must, value))
        if self.max_len < MIN_LEN or self.first + self.mem_len >= self.max_len:
            must = f"at least {MIN_LEN}, and more than first and mem_len together"
            raise ConfigError(describe("max_len", "Memory", must, self.max_len))

    @classmethod
    def of(cls, max_len: int) -> Memory:
        """Return a memory of so many tokens that keeps half of them when it is full."""
        return cls(max_len=max_len, mem_len=max_len // 2 // PAGE_SIZE * PAGE_SIZE)

    @property
    def dropped(self) -> int:
        """Tokens that leave when the cache is full."""
        return self.max_len - self.first - self.mem_len

    def check(self, max_positions: int) -> None:
        """Raise if a model of so many positions cannot have it.

        Raises:
            ConfigError: it is longer than the model's context.
        """
        if self.max_len > max_positions:
            must = f"at most the model's context of {max_positions} tokens"
            step = "Take less, or stretch the context (--context)"
            raise ConfigError(describe("max_len", "Memory", must, self.max_len, step))


MIN_LEN = 512
"""Fewest tokens of a memory: those of one pass."""
