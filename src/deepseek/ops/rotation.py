"""The rotation of channels that spreads outliers before integers are made of them. Loads no torch.

Source: QuaRot (2404.00456), section 3, online transform; deviation: blocks of 64, no random signs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from deepseek.ops.scheme import ROTATED


def hadamard() -> npt.NDArray[np.float32]:
    """Return the orthogonal Walsh-Hadamard matrix of 64 channels, its own inverse and its own
    transpose: float32 [64, 64], in the order of Sylvester's construction."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < ROTATED:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(ROTATED**0.5)


def rotate(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return every 64 channels [..., K] behind the rotation; a second time gives them back."""
    blocks = values.reshape(*values.shape[:-1], -1, ROTATED)
    return np.matmul(blocks, hadamard()).reshape(values.shape)
