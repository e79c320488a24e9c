"""Prompts in any of the forms a user has them, as lists of token ids."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deepseek.data import Tokenizer
from deepseek.errors import CapacityError, ConfigError, describe
from deepseek.generate.engine import Engine
from deepseek.generate.memory import Memory

if TYPE_CHECKING:
    from torch import Tensor

    from deepseek.models import Decoder

    Prompts = str | Sequence[int] | Tensor | Sequence[str] | Sequence[Sequence[int]]
"""One prompt (text, ids, a 1-D tensor) or several (a list of these, a 2-D tensor)."""


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, object]]) -> list[int]:
    """Return the token ids of a conversation, ready for the model to answer.

    Args:
        tokenizer: with a chat template, which also writes the special tokens.
        messages: `[{"role": "user", "content": "..."}, ...]`.

    Raises:
        ConfigError: there is no template, or it refuses the messages.
    """
    return tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)


def read_prompts(
    model: Decoder | Engine, prompts: Prompts, memory: Memory | None = None
) -> tuple[list[list[int]], bool]:
    """Return the ids of each prompt, and whether a single prompt was given.

    Raises:
        ConfigError: not a prompt, an id outside the vocabulary, text without a tokenizer, an empty
            prompt without a token to begin with; a memory that is longer than the context.
        CapacityError: a prompt leaves no room in the context, and there is no memory.
    """
    if memory is not None:
        if not isinstance(memory, Memory):
            step = "Use Memory(max_len=…) or Memory.of(…)"
            raise ConfigError(describe("memory", "generate", "a Memory", memory, step))
        memory.check(model.config.max_positions)
    prompts = _as_list(prompts)
    if isinstance(prompts, bytes | bytearray):
        step = "Decode it to text first"
        raise ConfigError(describe("prompts", "generate", "text or token ids", prompts, step))
    is_single = isinstance(prompts, str) or (
        isinstance(prompts, Sequence) and len(prompts) > 0 and not _is_prompt(prompts[0])
    )
    listed = [prompts] if is_single else prompts
    if isinstance(listed, str) or not isinstance(listed, Sequence) or not listed:
        must = "text, token ids, or a list of these"
        raise ConfigError(
            describe("prompts", "generate", must, prompts, "Give at least one prompt")
        )
    ids = [_read(model, prompt) for prompt in listed]
    for row, prompt in enumerate(ids):
        _check_ids(model, row, prompt)
        if memory is None:
            _check_length(model, row, prompt)
    return ids, is_single


def _is_prompt(value: object) -> bool:
    return isinstance(value, str | Sequence) or hasattr(value, "tolist")


def _as_list(value: Any) -> Any:
    """Return a tensor or an array as lists of numbers, all else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _read(model: Decoder | Engine, prompt: object) -> list[int]:
    if isinstance(prompt, str):
        if model.tokenizer is None:
            step = "Give token ids, or load a model folder that has tokenizer.json"
            raise ConfigError(describe("prompts", "generate", "token ids", prompt, step))
        ids = model.tokenizer.encode(prompt)
    else:
        ids = _read_ids(_as_list(prompt))
    if ids:
        return ids
    own = model.tokenizer
    bos = model.config.bos_token_id if own is None else own.bos_token_id
    if bos is None:
        step = "Begin the text with a word: the model has no token that begins a text"
        raise ConfigError(describe("prompts", "generate", "at least one token", prompt, step))
    return [bos]


def _read_ids(prompt: object) -> list[int]:
    try:
        if isinstance(prompt, Sequence):
            return [operator.index(token) for token in prompt]
    except TypeError:
        pass
    raise ConfigError(describe("prompts", "generate", "text or a list of token ids", prompt))


def _check_ids(model: Decoder | Engine, row: int, ids: list[int]) -> None:
    vocabulary = model.config.vocab_size
    if min(ids) < 0 or max(ids) >= vocabulary:
        wrong = next(token for token in ids if not 0 <= token < vocabulary)
        must = f"token ids from 0 to {vocabulary - 1}"
        raise ConfigError(describe(f"prompt {row}", "generate", must, wrong))


def _check_length(model: Decoder | Engine, row: int, ids: list[int]) -> None:
    context = model.config.max_positions
    if len(ids) >= context:
        must = f"shorter than the model's context of {context} tokens"
        step = "Shorten it, stretch the context (--context) or forget old tokens (--memory)"
        raise CapacityError(describe(f"prompt {row}", "generate", must, f"{len(ids)} tokens", step))
