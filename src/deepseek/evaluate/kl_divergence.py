"""How far a model has moved from its reference: divergence and agreement, token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from deepseek.errors import ConfigError, ShapeError, describe
from deepseek.evaluate.base import (
    CausalModel,
    Condition,
    Progress,
    TextTokenizer,
    address_of,
    logit_slices,
    measuring,
    model_conditions,
    repeat_command,
    tokenizer_of,
)
from deepseek.evaluate.corpus import Corpus, as_corpus
from deepseek.evaluate.intervals import (
    NUM_RESAMPLES,
    block_length,
    block_sums,
    bootstrap_ratio,
    clustered_wilson,
)
from deepseek.evaluate.windows import batch_ids, plan_windows, window_and_stride, window_batches
from deepseek.records import Measurement


@dataclasses.dataclass(frozen=True)
class DivergenceResult:
    """What `divergence` found."""

    measurements: list[Measurement]
    """`kl_divergence`, `top1_agreement` and `acceptance`."""
    divergences: Tensor
    """KL(reference || model) at each position [tokens - 1] fp64, in nats."""
    agreements: Tensor
    """Whether the likeliest token is the same, at each position [tokens - 1]."""
    acceptances: Tensor
    """The chance that a token drawn from the model is accepted by speculative sampling of the
    reference, at each position [tokens - 1] fp64."""


def divergence(
    model: CausalModel,
    reference: CausalModel,
    text: str | Corpus | None = None,
    *,
    tokenizer: TextTokenizer | None = None,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> DivergenceResult:
    """Measure how a model's predictions differ from a reference's on the same text.

    Both see the same windows, one batch after the other; nothing of the size of the text times the
    vocabulary is kept. The positions are those whose next token `perplexity` scores. A model
    against itself gives exactly 0.

    Args:
        model: the one that was changed (quantized, pruned, another attention).
        reference: the one it should still be like; the expectation is taken under it.
        text: a string or a corpus; None = the default corpus.
        tokenizer: None = the model's own; both models must share the vocabulary.
        window: as in `perplexity`; limited by the shorter of the two models.
        stride: as in `perplexity`.
        max_tokens: only the first tokens of the text; None = all.
        seed: of the bootstrap.
        progress: called after each batch.

    Returns:
        mean KL(reference || model) with a block bootstrap interval, top-1 agreement with a Wilson
        interval over the same blocks, the mean chance that a token which the model drafts is
        accepted (Leviathan et al., "Speculative decoding" (2211.17192), theorem 3.5), and all three
        at every position.

    Raises:
        ConfigError: fewer than two tokens, no tokenizer, or a window or stride out of range.
        ShapeError: the vocabularies differ.
    """
    tokenizer = tokenizer_of(model, tokenizer, "divergence")
    window, stride = window_and_stride(model, window, stride)
    window_and_stride(reference, window, stride)
    corpus = as_corpus(text)
    ids = list(tokenizer.encode(corpus.text))[:max_tokens]
    if len(ids) < 2:
        raise ConfigError(
            describe("text", "divergence", "at least 2 tokens long", corpus.text[:40])
        )
    divergences, agreements, acceptances = token_divergences(
        model, reference, ids, window, stride, progress=progress
    )
    conditions: dict[str, Condition] = {**model_conditions(model), **corpus.conditions()}
    conditions |= {
        f"reference_{name}": fact
        for name, fact in model_conditions(reference).items()
        if name in _SHOWN
    }
    conditions |= {"tokens": len(divergences), "window": window, "stride": stride, "seed": seed}
    flags = {
        "reference": address_of(reference) or "REFERENCE",
        "text": corpus.flag(),
        "window": window,
    }
    flags |= {"stride": stride, "max_tokens": max_tokens, "seed": seed}
    command = repeat_command(model, "divergence", flags, repeatable=corpus.is_repeatable)
    found = _measurements(divergences, agreements, acceptances, seed, conditions, command)
    return DivergenceResult(found, divergences, agreements, acceptances)


_SHOWN = ("model", "implementation", "dtype")


def token_divergences(
    model: CausalModel,
    reference: CausalModel,
    ids: Sequence[int] | Tensor,
    window: int,
    stride: int,
    *,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL(reference || model), top-1 agreement and acceptance at each position.

    Args:
        model: see `base.CausalModel`.
        reference: the same.
        ids: [tokens].
        window: as in `perplexity`.
        stride: as in `perplexity`.
        progress: called after each batch.

    Returns:
        divergences [tokens - 1] fp64 in nats, whether the likeliest token is the same
        [tokens - 1], and the chance that a drafted token is accepted [tokens - 1] fp64.

    Raises:
        ShapeError: the vocabularies differ.
    """
    tokens = torch.as_tensor(ids, dtype=torch.int64).cpu()
    divergences: list[Tensor] = []
    agreements: list[Tensor] = []
    acceptances: list[Tensor] = []
    num_done = 0
    with measuring(model), measuring(reference):
        for windows, (length, num_scored) in window_batches(
            plan_windows(len(tokens), window, stride)
        ):
            first = length - num_scored - 1
            theirs = logit_slices(reference, batch_ids(reference, tokens, windows)[0], first)
            ours = logit_slices(model, batch_ids(model, tokens, windows)[0], first)
            for expected, found in zip(theirs, ours, strict=True):
                if expected.shape != found.shape:
                    must = f"over the reference's vocabulary of {expected.shape[-1]}"
                    got = found.shape[-1]
                    raise ShapeError(describe("logits", type(model).__name__, must, got))
                divergence_of_rows, agreement_of_rows, accepted = _compare(expected, found)
                divergences.append(divergence_of_rows)
                agreements.append(agreement_of_rows)
                acceptances.append(accepted)
            num_done += num_scored * len(windows)
            if progress is not None:
                progress("divergence", num_done / max(len(tokens) - 1, 1))
    return torch.cat(divergences), torch.cat(agreements), torch.cat(acceptances)


def _compare(reference: Tensor, model: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL(reference || model) [N] fp64, argmax agreement [N] and the overlap of the chances
    [N] fp64 of logits [N, V]."""
    theirs = reference.float().log_softmax(dim=1)
    ours = model.to(reference.device).float().log_softmax(dim=1)
    chances = theirs.exp()
    # What the reference gives no chance adds nothing, even where both logarithms are infinite.
    terms = torch.where(chances == 0, 0.0, chances * (theirs - ours))
    agreement = theirs.argmax(dim=1) == ours.argmax(dim=1)
    overlap = torch.minimum(chances, ours.exp()).sum(dim=1, dtype=torch.float64)
    return terms.sum(dim=1, dtype=torch.float64).cpu(), agreement.cpu(), overlap.cpu()


def _measurements(
    divergences: Tensor,
    agreements: Tensor,
    acceptances: Tensor,
    seed: int,
    conditions: dict[str, Condition],
    command: str,
) -> list[Measurement]:
    block = block_length(len(divergences))
    sums, sizes = block_sums(divergences.numpy(), block)
    agreed, _ = block_sums(agreements.numpy().astype(np.float64), block)
    accepted, _ = block_sums(acceptances.numpy(), block)
    blocks = f"{len(sums)} blocks of {block} tokens"
    resampled = {
        **conditions,
        "interval": f"block bootstrap, {blocks}, {NUM_RESAMPLES} resamples",
    }
    return [
        Measurement(
            name="kl_divergence",
            value=float(divergences.mean()),
            unit="nats/token",
            spread=bootstrap_ratio(sums, sizes, seed=seed),
            conditions=resampled,
            command=command,
        ),
        Measurement(
            name="top1_agreement",
            value=float(agreements.double().mean()),
            unit="1",
            spread=clustered_wilson(agreed, sizes),
            conditions={
                **conditions,
                "interval": f"Wilson at the effective number of tokens, {blocks}",
            },
            command=command,
        ),
        Measurement(
            name="acceptance",
            value=float(acceptances.mean()),
            unit="1",
            spread=bootstrap_ratio(accepted, sizes, seed=seed),
            conditions=resampled,
            command=command,
        ),
    ]
