"""Confidence intervals: how far a share or a mean may lie from the one that was counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from deepseek.records import Spread

FloatArray = npt.NDArray[np.float64]

NUM_RESAMPLES = 2000
_ROWS_PER_DRAW = 200


def wilson(num_successes: float, num_trials: float, *, z: float | None = None) -> Spread:
    """Return the 95 % Wilson score interval of a share of independent trials.

    Stays inside 0 to 1 and keeps a width at 0 % and 100 %, where the bootstrap has none.

    Args:
        num_successes: 0 to `num_trials`.
        num_trials: above 0; need not be whole (an effective number of trials).
        z: quantile to use in place of the normal one.

    Source: Wilson, Journal of the American Statistical Association 22 (1927), 209.
    """
    z = _normal_quantile() if z is None else z
    share = num_successes / num_trials
    centre = share + z * z / (2 * num_trials)
    half = z * math.sqrt(share * (1 - share) / num_trials + z * z / (4 * num_trials**2))
    scale = 1 + z * z / num_trials
    return Spread("ci95", max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))


def clustered_wilson(successes: FloatArray, trials: FloatArray) -> Spread | None:
    """Return the 95 % interval of a share whose trials hang together in clusters.

    The Wilson interval at the effective number of trials, share (1 - share) / variance between
    clusters, with Student's quantile for the number of clusters. Where every trial agrees the
    variance says nothing, and the clusters are counted as the trials.

    Args:
        successes: [clusters].
        trials: [clusters], each above 0.

    Returns:
        None for a single cluster, which says nothing of how clusters differ.

    Source: Korn and Graubard, Survey Methodology 24 (1998), 193; they put the effective size in the
    exact interval, here it goes in Wilson's.
    """
    num_clusters, num_trials = len(trials), float(np.sum(trials))
    if num_clusters < 2:
        return None
    share = float(np.sum(successes)) / num_trials
    residuals = successes - share * trials
    variance = num_clusters / (num_clusters - 1) * float(np.sum(residuals**2)) / num_trials**2
    spread_of_one = share * (1 - share)
    effective = (
        min(num_trials, spread_of_one / variance)
        if variance > 0 and spread_of_one > 0
        else num_clusters
    )
    return wilson(share * effective, effective, z=student_quantile(num_clusters - 1))


def bootstrap_ratio(
    numerators: FloatArray,
    denominators: FloatArray,
    *,
    seed: int = 0,
    transform: Callable[[FloatArray], FloatArray] | None = None,
) -> Spread | None:
    """Return the 95 % bootstrap interval of sum(numerators) / sum(denominators) over units.

    A unit is a document, an item, or a block of consecutive tokens (block bootstrap: dependence
    inside a block is kept). The percentile interval is widened for small numbers of units
    (Hesterberg's expanded percentile), for which the plain one covers too rarely.

    Args:
        numerators: [units], for instance the summed loss of each.
        denominators: [units], for instance the number of tokens of each.
        seed: the same seed gives the same interval.
        transform: a rising function put on the ratio (`numpy.exp` for a perplexity).

    Returns:
        None for fewer than two units.

    Source: Kunsch, Annals of Statistics 17 (1989), 1217 (blocks; here they do not overlap, as in
    Carlstein 1986); Hesterberg, The American Statistician 69 (2015), 371, section 3.3 (expanded
    percentile).
    """
    num_units = len(numerators)
    if num_units < 2:
        return None
    generator = np.random.default_rng(seed)
    chances = np.full(num_units, 1.0 / num_units)
    ratios = []
    for _ in range(0, NUM_RESAMPLES, _ROWS_PER_DRAW):
        counts = generator.multinomial(num_units, chances, size=_ROWS_PER_DRAW)
        ratios.append((counts @ numerators) / (counts @ denominators))
    tail = NormalDist().cdf(
        -math.sqrt(num_units / (num_units - 1)) * student_quantile(num_units - 1)
    )
    ends = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    low, high = transform(ends) if transform is not None else ends
    return Spread("ci95", float(low), float(high))


def block_sums(values: FloatArray, block: int) -> tuple[FloatArray, FloatArray]:
    """Return sums and sizes of consecutive blocks; a short rest joins the last block.

    Args:
        values: [tokens] in the order of the text.
        block: tokens a block, at least 1.
    """
    starts = np.arange(0, max(len(values) - block, 0) + 1, block)
    sizes = np.diff(np.append(starts, len(values))).astype(np.float64)
    return np.add.reduceat(values, starts), sizes


def block_length(num_tokens: int) -> int:
    """Return how many tokens a bootstrap block has: about 64 blocks, but 16 to 512 tokens each.

    Losses of neighbouring tokens hang together over a sentence or two; a block must be longer than
    that, and there must be enough blocks to see how they differ.
    """
    return min(512, max(16, num_tokens // 64))


def student_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t.

    Exact for 1 and 2 degrees of freedom, Cornish and Fisher's expansion above (error below 0.4 % at
    3 and falling).

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    if degrees == 1:
        return math.tan(math.pi * 0.475)
    if degrees == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = _normal_quantile()
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


def _normal_quantile() -> float:
    return NormalDist().inv_cdf(0.975)
