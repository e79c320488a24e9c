"""The rotation of channels that spreads outliers before integers are made of them. Loads no torch.

Source: QuaRot (2404.00456), section 3, online transform; deviation: blocks of 64, no random signs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from deepseek.ops.scheme import ROTATED

STEPS = tuple(1 << step for step in range(ROTATED.bit_length() - 1))
"""Distances of the sums and differences of the fast transform, in their order: whoever keeps it has
the same bits, as the engine does and `ops.quantized.rotate`."""


def rotate(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return every 64 channels [..., K] behind an orthogonal Walsh-Hadamard transform, which is its
    own inverse and its own transpose: in the order of Sylvester's construction."""
    for step in STEPS:
        pairs = values.reshape(*values.shape[:-1], -1, 2, step)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        values = np.stack((first + second, first - second), -2).reshape(values.shape)
    return values * np.float32(ROTATED**-0.5)
