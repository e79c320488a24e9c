"""The choice of the next token in few operations; equal to `reference`."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek.errors import BackendError, describe
from deepseek.ops.sampling.config import Sampling
from deepseek.ops.sampling.history import TokenHistory
from deepseek.ops.sampling.reference import apply_penalties, needed_history, next_uniform

# Top-p mostly keeps a few tokens: look at this many, then this many, then sort them all.
_NUCLEI = (1024, 8192)
_BLOCK, _LEAST_BLOCK = 256, 32
# Room for the error of a float32 sum over a vocabulary.
_ROUNDING = 1e-4


def choose_greedy(logits_RV: Tensor) -> list[int]:
    """Return the most probable token of each row.

    Args:
        logits_RV: [R, V], any float dtype.

    Raises:
        BackendError: a row has NaN or infinity for its largest logit.
    """
    tokens_R = _argmax(logits_RV)
    _check_finite(logits_RV.gather(1, tokens_R[:, None])[:, 0].tolist())
    return tokens_R.tolist()


def choose(
    logits_RV: Tensor,
    sampling: Sampling,
    generators: Sequence[random.Random],
    history: TokenHistory | None = None,
) -> list[int]:
    """Return the next token of each row.

    A row's token depends on its own logits, history and generator only.

    Args:
        logits_RV: [R, V], any float dtype.
        sampling: how to choose.
        generators: one per row; each gives one number. Unused when greedy.
        history: needed with penalties.

    Raises:
        BackendError: a row has NaN or infinity for its largest logit.
    """
    if sampling.has_penalties:
        logits_RV = apply_penalties(logits_RV, sampling, needed_history(history))
    if sampling.is_greedy:
        return choose_greedy(logits_RV)
    scores_RV = logits_RV.float() / sampling.temperature
    _check_finite(scores_RV.amax(dim=-1).tolist())
    rows = zip(scores_RV.unbind(), generators, strict=True)
    return [
        _draw(*_keep(scores_V, sampling), next_uniform(generator)) for scores_V, generator in rows
    ]


def _argmax(logits_RV: Tensor) -> Tensor:
    """Return the first largest column of each row, NaN counting as largest: int64 [R].

    The largest value is found several times faster than its place, so first the blocks' largest
    are compared, then the columns of one block.
    """
    width = math.gcd(logits_RV.shape[-1], _BLOCK)
    if width < _LEAST_BLOCK:
        return logits_RV.argmax(dim=-1)
    blocks_RNW = logits_RV.unflatten(-1, (-1, width))
    best_R = blocks_RNW.amax(dim=-1).argmax(dim=-1)
    rows_R = torch.arange(logits_RV.shape[0], device=logits_RV.device)
    return best_R * width + blocks_RNW[rows_R, best_R].argmax(dim=-1)


def _keep(scores_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Return the scores that pass the filters, and their ids in ascending order (None for all)."""
    ids = None
    if 0 < sampling.top_k < scores_V.shape[0]:
        kth = scores_V.topk(sampling.top_k).values[-1]
        scores_V, ids = _take(scores_V, ids, scores_V >= kth)
    if sampling.top_p < 1:
        scores_V, ids = _keep_top_p(scores_V, ids, sampling.top_p)
    if sampling.min_p:
        probabilities_V = scores_V.softmax(dim=0)
        least = sampling.min_p * probabilities_V.amax()
        scores_V, ids = _take(scores_V, ids, probabilities_V >= least)
    return scores_V, ids


def _keep_top_p(scores: Tensor, ids: Tensor | None, top_p: float) -> tuple[Tensor, Tensor]:
    log_sum = scores.logsumexp(dim=0)
    for size in _NUCLEI:
        if scores.shape[0] <= size:
            break
        largest = scores.topk(size, sorted=False).values
        if (largest - log_sum).exp().sum() > top_p + _ROUNDING:
            scores, ids = _take(scores, ids, scores >= largest.amin())
            break
    ordered, order = scores.sort(descending=True, stable=True)
    probabilities = (ordered - log_sum).exp()
    kept = probabilities.cumsum(dim=0) - probabilities < top_p
    kept[0] = True
    return _take(scores, ids, torch.zeros_like(kept).scatter(0, order, kept))


def _take(scores: Tensor, ids: Tensor | None, kept: Tensor) -> tuple[Tensor, Tensor]:
    places = kept.nonzero()[:, 0]
    return scores[places], places if ids is None else ids[places]


def _draw(scores: Tensor, ids: Tensor | None, uniform: float) -> int:
    cumulative = scores.double().softmax(dim=0).cumsum(dim=0)
    place = torch.searchsorted(cumulative, cumulative[-1] * uniform, right=True)
    place = place.clamp(max=scores.shape[0] - 1)
    return int(place if ids is None else ids[place])


def _check_finite(largest: Sequence[float]) -> None:
    for row, value in enumerate(largest):
        if not math.isfinite(value):
            must = "finite"
            step = "The weights are damaged or the dtype overflows; try dtype='float32'"
            raise BackendError(
                describe(f"largest logit of row {row}", "sampling", must, value, step)
            )
