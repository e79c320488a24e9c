"""Greedy continuations from whatever can generate, or at least be called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from deepseek.evaluate.base import CausalModel, TextTokenizer, device_of, measuring, position_logits

if TYPE_CHECKING:
    from deepseek.models import Decoder


def greedy_continuation(
    model: CausalModel,
    tokenizer: TextTokenizer,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    until: Sequence[str] = (),
) -> str:
    """Return what greedy decoding writes after a prompt, cut before the first `until` string.

    Our decoder runs through `deepseek.generate`, a model of transformers through its own
    `generate`, anything else by calling it once a token on the whole text.

    Args:
        model: see `base.CausalModel`.
        tokenizer: turns tokens into text.
        prompt_ids: [tokens], at least one.
        max_tokens: most tokens to write.
        until: strings that end the answer; the end-of-text token always does.
    """
    if is_decoder(model) and model.tokenizer is not None:
        from deepseek.generate import stream

        pieces = stream(
            model, list(prompt_ids), max_tokens=max_tokens, stop=tuple(filter(None, until))
        )
        return cut("".join(piece.text for piece in pieces), until)
    prompt = torch.tensor([list(prompt_ids)], device=device_of(model))
    with measuring(model):
        if is_transformers(model):
            new = _transformers_tokens(model, tokenizer, prompt, max_tokens, until)
        else:
            new = _plain_tokens(model, tokenizer, prompt, max_tokens, until)
    return cut(tokenizer.decode(new, skip_special_tokens=True), until)


def cut(text: str, until: Sequence[str]) -> str:
    """Return a text up to the first of some strings; empty strings are let be."""
    for stop in until:
        if stop:
            text = text.split(stop)[0]
    return text


def is_decoder(model: object) -> TypeGuard[Decoder]:
    """Return whether a model is our own decoder."""
    from deepseek.models import Decoder

    return isinstance(model, Decoder)


def is_transformers(model: CausalModel) -> bool:
    """Return whether a model has the `generate` of transformers, of its own or through PEFT."""
    return isinstance(model, torch.nn.Module) and callable(getattr(model, "generate", None))


def _transformers_tokens(
    model: CausalModel,
    tokenizer: TextTokenizer,
    prompt: Tensor,
    max_tokens: int,
    until: Sequence[str],
) -> list[int]:
    generate: Callable[..., Tensor] = model.generate  # type: ignore[attr-defined]
    length = prompt.shape[1]

    def is_done(input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        written = tokenizer.decode(input_ids[0, length:].tolist(), skip_special_tokens=False)
        done = any(stop and stop in written for stop in until)
        return torch.tensor([done], device=input_ids.device)

    tokens = generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.eos_token_id,
        stopping_criteria=[is_done],
    )
    return tokens[0, length:].tolist()


def _plain_tokens(
    model: CausalModel,
    tokenizer: TextTokenizer,
    prompt: Tensor,
    max_tokens: int,
    until: Sequence[str],
) -> list[int]:
    written: list[int] = []
    for _ in range(max_tokens):
        new = torch.tensor([written], dtype=torch.int64, device=prompt.device)
        ids = torch.cat([prompt, new], dim=1) if written else prompt
        token = int(position_logits(model, ids, ids.shape[1] - 1)[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        written.append(token)
        text = tokenizer.decode(written, skip_special_tokens=False)
        if any(stop and stop in text for stop in until):
            break
    return written
