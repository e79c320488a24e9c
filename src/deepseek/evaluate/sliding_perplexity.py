"""Perplexity of a text under a model, with a sliding window."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from deepseek.errors import ConfigError, describe
from deepseek.evaluate.base import (
    ROWS_PER_SLICE,
    CausalModel,
    Condition,
    Progress,
    TextTokenizer,
    logit_slices,
    measuring,
    model_conditions,
    repeat_command,
    target_scores,
    tokenizer_of,
)
from deepseek.evaluate.corpus import Corpus, as_corpus
from deepseek.evaluate.intervals import NUM_RESAMPLES, block_length, block_sums, bootstrap_ratio
from deepseek.evaluate.windows import batch_ids, plan_windows, window_and_stride, window_batches
from deepseek.records import Measurement, Spread


@dataclasses.dataclass(frozen=True)
class PerplexityResult:
    """What `perplexity` found."""

    measurements: list[Measurement]
    """`perplexity` and `bits_per_byte`."""
    losses: tuple[Tensor, ...]
    """Negative log-likelihoods [tokens - 1] fp64 in nats, one tensor a document."""


def perplexity(
    model: CausalModel,
    text: str | Corpus | Sequence[str] | None = None,
    *,
    tokenizer: TextTokenizer | None = None,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Measure how well a model predicts a text: exp of its mean loss, and bits per byte.

    Every token but the first is scored once, with up to `window - 1` tokens before it. The 95 %
    interval is a
    bootstrap: over the documents where several are given, else over blocks of consecutive tokens
    (block bootstrap, about 64 blocks). It says what another text of this kind would give, not how
    exact the arithmetic is.

    Args:
        model: see `base.CausalModel`.
        text: a string, a corpus, or documents that are scored apart (no context across their
            borders); None = the default corpus.
        tokenizer: None = the model's own.
        window: tokens that the model sees at once; None = 1024, or the model's length if that is
            shorter.
        stride: tokens between two windows; None = half a window.
        max_tokens: only the first tokens of the text (of all documents together); None = all.
        batch_size: windows at once; None = 2048 tokens' worth.
        seed: of the bootstrap.
        progress: called after each batch.

    Returns:
        the measurements, and the loss of every token.

    Raises:
        ConfigError: fewer than two tokens, no tokenizer, or a window or stride out of range.

    Source: "Perplexity of fixed-length models" in the documentation of transformers. Deviation: the
    mean is exact over tokens (the loop there weights a window by one token too few).
    """
    tokenizer = tokenizer_of(model, tokenizer, "perplexity")
    window, stride = window_and_stride(model, window, stride)
    corpora = [as_corpus(part) for part in text] if _is_documents(text) else [as_corpus(text)]  # type: ignore[union-attr, arg-type]
    encoded, num_bytes = _encode(tokenizer, corpora, max_tokens)
    num_scored = sum(len(ids) - 1 for ids in encoded)
    if num_scored < 1:
        raise ConfigError(
            describe("text", "perplexity", "at least 2 tokens long", corpora[0].text[:40])
        )
    losses: list[Tensor] = []
    for number, ids in enumerate(encoded):
        share = _scaled(progress, number, len(encoded))
        losses.append(
            token_losses(model, ids, window, stride, batch_size=batch_size, progress=share)
        )
    conditions: dict[str, Condition] = {**model_conditions(model), **_text_facts(corpora)}
    conditions |= {
        "tokens": num_scored,
        "window": window,
        "stride": stride,
        "documents": len(encoded),
    }
    flags = {
        "text": corpora[0].flag(),
        "window": window,
        "stride": stride,
        "max_tokens": max_tokens,
        "seed": seed,
    }
    repeatable = len(corpora) == 1 and corpora[0].is_repeatable
    command = repeat_command(model, "perplexity", flags, repeatable=repeatable)
    measurements = _measurements(losses, num_bytes, seed, conditions, command)
    return PerplexityResult(measurements, tuple(losses))


def token_losses(
    model: CausalModel,
    ids: Sequence[int] | Tensor,
    window: int,
    stride: int,
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Return the negative log-likelihood of every token after the first.

    Args:
        model: see `base.CausalModel`.
        ids: [tokens].
        window: as in `perplexity`.
        stride: as in `perplexity`.
        batch_size: as in `perplexity`.
        progress: called after each batch.

    Returns:
        [tokens - 1] fp64, in nats.
    """
    tokens = torch.as_tensor(ids, dtype=torch.int64).cpu()
    parts: list[Tensor] = []
    num_done, num_wanted = 0, max(len(tokens) - 1, 1)
    with measuring(model):
        for windows, (length, num_scored) in window_batches(
            plan_windows(len(tokens), window, stride), batch_size
        ):
            rows, targets = batch_ids(model, tokens, windows)
            wanted = targets.flatten().split(ROWS_PER_SLICE)
            slices = logit_slices(model, rows, length - num_scored - 1)
            for logits, following in zip(slices, wanted, strict=True):
                parts.append(-target_scores(logits, following)[0])
            num_done += targets.numel()
            if progress is not None:
                progress("perplexity", num_done / num_wanted)
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def _is_documents(text: str | Corpus | Sequence[str] | None) -> bool:
    return text is not None and not isinstance(text, str | Corpus)


def _encode(
    tokenizer: TextTokenizer, corpora: Sequence[Corpus], max_tokens: int | None
) -> tuple[list[list[int]], int]:
    """Return the tokens of each document worth scoring, and the bytes the scored tokens make."""
    encoded: list[list[int]] = []
    num_bytes, num_left = 0, max_tokens
    for corpus in corpora:
        ids = list(tokenizer.encode(corpus.text))
        whole = num_left is None or len(ids) <= num_left
        ids = ids if num_left is None else ids[:num_left]
        if len(ids) > 1:
            encoded.append(ids)
            text = corpus.text if whole else tokenizer.decode(ids, skip_special_tokens=True)
            unscored = tokenizer.decode(ids[:1], skip_special_tokens=True)
            num_bytes += len(text.encode("utf-8")) - len(unscored.encode("utf-8"))
        if num_left is not None:
            num_left -= len(ids)
    return encoded, num_bytes


def _measurements(
    losses: Sequence[Tensor],
    num_bytes: int,
    seed: int,
    conditions: dict[str, Condition],
    command: str,
) -> list[Measurement]:
    if len(losses) > 1:
        sums = np.array([float(loss.sum()) for loss in losses])
        sizes = np.array([float(len(loss)) for loss in losses])
        method = f"bootstrap over {len(losses)} documents, {NUM_RESAMPLES} resamples"
    else:
        block = block_length(len(losses[0]))
        sums, sizes = block_sums(losses[0].numpy(), block)
        method = f"block bootstrap, {len(sums)} blocks of {block} tokens, {NUM_RESAMPLES} resamples"
    mean = float(sums.sum() / sizes.sum())
    spread = bootstrap_ratio(sums, sizes, seed=seed, transform=np.exp)
    facts = {**conditions, "interval": method, "seed": seed}
    found = [
        Measurement(
            name="perplexity",
            value=math.exp(mean),
            unit="1",
            spread=spread,
            conditions=facts,
            command=command,
        )
    ]
    if num_bytes > 0:
        found.append(
            _bits_per_byte(mean * float(sizes.sum()), num_bytes, spread, mean, facts, command)
        )
    return found


def _bits_per_byte(
    total: float,
    num_bytes: int,
    spread: Spread | None,
    mean: float,
    facts: dict[str, Condition],
    command: str,
) -> Measurement:
    """Return the loss in bits per byte: the same interval, with bytes per token held fixed."""
    value = total / math.log(2) / num_bytes
    scale = value / mean if mean else 0.0
    ends = (
        Spread("ci95", math.log(spread.low) * scale, math.log(spread.high) * scale)
        if spread
        else None
    )
    conditions = {**facts, "bytes": num_bytes}
    return Measurement(
        name="bits_per_byte",
        value=value,
        unit="bits/byte",
        spread=ends,
        conditions=conditions,
        command=command,
    )


def _text_facts(corpora: Sequence[Corpus]) -> dict[str, str | int]:
    if len(corpora) == 1:
        return corpora[0].conditions()
    joined = Corpus(name="documents", text="\n\n".join(corpus.text for corpus in corpora))
    return joined.conditions()


def _scaled(progress: Progress | None, number: int, count: int) -> Progress | None:
    """Return a callback that reports the progress of one document as a share of all."""
    if progress is None:
        return None

    def report(what: str, share: float | None) -> None:
        progress(what, None if share is None else (number + share) / count)

    return report
