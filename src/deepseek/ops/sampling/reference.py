"""The specification of sampling: one plain function a step.

Legend: R rows, V vocabulary. Definitions and order are those of transformers' logits processors;
frequency and presence penalties, which it lacks, are those of the OpenAI API.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek.errors import ConfigError, describe
from deepseek.ops.sampling.config import Sampling
from deepseek.ops.sampling.history import TokenHistory

_REMOVED = float("-inf")


def apply_penalties(logits_RV: Tensor, sampling: Sampling, history: TokenHistory) -> Tensor:
    """Return float32 logits [R, V] after repetition, frequency and presence penalties.

    Source: repetition as in CTRL (Keskar et al. 2019), over prompt and answer; frequency and
    presence as in the OpenAI API, over the answer only.
    """
    logits_RV = logits_RV.float()
    penalty = sampling.repetition_penalty
    penalized_RV = torch.where(logits_RV < 0, logits_RV * penalty, logits_RV / penalty)
    logits_RV = torch.where(history.seen, penalized_RV, logits_RV)
    logits_RV = logits_RV - sampling.frequency_penalty * history.counts
    return logits_RV - sampling.presence_penalty * (history.counts > 0)


def keep_top_k(logits_RV: Tensor, top_k: int) -> Tensor:
    """Return the logits with all below the k-th largest removed; equals of the k-th stay."""
    kth_R1 = logits_RV.topk(min(top_k, logits_RV.shape[-1])).values[:, -1:]
    return logits_RV.masked_fill(logits_RV < kth_R1, _REMOVED)


def keep_top_p(logits_RV: Tensor, top_p: float) -> Tensor:
    """Return the logits of the fewest most probable tokens that sum to at least `top_p`.

    Among equally probable tokens the lower id goes first. Source: Holtzman et al. 2019.
    """
    sorted_RV, order_RV = logits_RV.sort(dim=-1, descending=True, stable=True)
    probabilities_RV = sorted_RV.softmax(dim=-1)
    before_RV = probabilities_RV.cumsum(dim=-1) - probabilities_RV
    removed_RV = before_RV >= top_p
    removed_RV[:, 0] = False
    return logits_RV.masked_fill(
        torch.zeros_like(removed_RV).scatter(1, order_RV, removed_RV), _REMOVED
    )


def keep_min_p(logits_RV: Tensor, min_p: float) -> Tensor:
    """Return the logits of tokens at least `min_p` times as probable as the most probable one.

    Source: Nguyen et al. 2024.
    """
    probabilities_RV = logits_RV.softmax(dim=-1)
    least_R1 = min_p * probabilities_RV.amax(dim=-1, keepdim=True)
    return logits_RV.masked_fill(probabilities_RV < least_R1, _REMOVED)


def filter_logits(logits_RV: Tensor, sampling: Sampling) -> Tensor:
    """Return float32 logits [R, V] after temperature, top-k, top-p and min-p, -inf where removed.

    Args:
        logits_RV: after penalties.
        sampling: with a temperature above 0.
    """
    logits_RV = logits_RV.float() / sampling.temperature
    if sampling.top_k:
        logits_RV = keep_top_k(logits_RV, sampling.top_k)
    if sampling.top_p < 1:
        logits_RV = keep_top_p(logits_RV, sampling.top_p)
    if sampling.min_p:
        logits_RV = keep_min_p(logits_RV, sampling.min_p)
    return logits_RV


def draw(logits_RV: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Return one token per row, int64 [R], by inverting the cumulative distribution in id order.

    Args:
        logits_RV: after the filters.
        uniforms: one number in [0, 1) per row; the same number gives the same token whatever the
            row's companions are.
    """
    probabilities_RV = logits_RV.double().softmax(dim=-1)
    cumulative_RV = probabilities_RV.cumsum(dim=-1)
    target_R1 = torch.tensor(uniforms, dtype=torch.double)[:, None] * cumulative_RV[:, -1:].cpu()
    target_R1 = target_R1.to(cumulative_RV.device)
    tokens_R = torch.searchsorted(cumulative_RV, target_R1, right=True)[:, 0]
    # rounding may put the target on the very end, behind the last token that was kept
    last_R = logits_RV.shape[-1] - 1 - (logits_RV > _REMOVED).flip(1).int().argmax(dim=1)
    return torch.minimum(tokens_R, last_R)


def choose(
    logits_RV: Tensor,
    sampling: Sampling,
    generators: Sequence[random.Random],
    history: TokenHistory | None = None,
) -> Tensor:
    """Return the next token of each row, int64 [R].

    Args:
        logits_RV: finite somewhere in each row.
        sampling: how to choose.
        generators: one per row; each gives one number. Unused when greedy.
        history: needed with penalties.
    """
    if sampling.has_penalties:
        logits_RV = apply_penalties(logits_RV, sampling, needed_history(history))
    if sampling.is_greedy:
        return logits_RV.argmax(dim=-1)
    uniforms = [next_uniform(generator) for generator in generators]
    return draw(filter_logits(logits_RV, sampling), uniforms)


def needed_history(history: TokenHistory | None) -> TokenHistory:
    """Return the history that penalties are counted in.

    Raises:
        ConfigError: there is none.
    """
    if history is None:
        raise ConfigError(describe("history", "choose", "given with penalties", None))
    return history


def next_uniform(generator: random.Random) -> float:
    """Return the generator's next number in [0, 1), with 53 random bits."""
    return generator.random()
