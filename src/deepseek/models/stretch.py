"""A longer context than a model was made for, by its positions alone. Loads no torch."""

from __future__ import annotations

from deepseek.errors import ConfigError, describe
from deepseek.models.config import DecoderConfig


def stretched(config: DecoderConfig, context: int) -> DecoderConfig:
    """Return the config of the same weights for a context of so many tokens.

    Rotary positions are stretched by YaRN (Peng et al. 2023, 2309.00071, section 3.3), which asks
    for no training up to a few times the old context and costs a little quality within it. ALiBi
    counts distances and needs no change.

    Args:
        config: of the model; returned as it is where its context is no shorter.
        context: in tokens.

    Raises:
        ConfigError: its positions follow another rule already, or it is no number of tokens.
    """
    if isinstance(context, bool) or not isinstance(context, int) or context < 1:
        must = "a whole number of tokens, at least 1"
        raise ConfigError(describe("context", "the model", must, context))
    if context <= config.max_positions:
        return config
    if config.positions == "alibi":
        return config.replace(max_positions=context)
    rope = config.rope
    if rope.scaling not in ("default", "yarn"):
        must = f"at most {config.max_positions}, to which its rope is stretched by {rope.scaling!r}"
        raise ConfigError(describe("context", "the model", must, context))
    original = rope.original_max_positions if rope.scaling == "yarn" else None
    original = original or config.max_positions
    longer = rope.replace(
        scaling="yarn", factor=context / original, original_max_positions=original
    )
    return config.replace(rope=longer, max_positions=context)
