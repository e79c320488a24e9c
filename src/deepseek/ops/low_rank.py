"""What a low-rank adapter adds to one product: what files, engines and servers exchange."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MAX_RANK = 256


class LowRankUpdate(NamedTuple):
    """The product of a weight [n, k] with x gains `scale * up (down x)`.

    Source: Hu et al., "LoRA" (2106.09685), section 4.1; `up` and `down` are their B and A.
    """

    down: np.ndarray
    """[rank, k]"""
    up: np.ndarray
    """[n, rank]"""
    scale: float

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]
