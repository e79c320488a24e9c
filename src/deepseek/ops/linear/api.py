"""The linear product, and the choice of how it is executed."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.ops.hardware import computes_bf16, without_onednn

LinearImpl = Literal["native", "unpacked", "widened"]
REASONS: dict[LinearImpl, str] = {
    "native": "PyTorch's own choice",
    "unpacked": "oneDNN would repack the whole weight for one row; PyTorch's kernel reads it once",
    "widened": "no bfloat16 products in hardware: the weight is widened to float32 for the call",
}
_FEW_ROWS = 4


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `inputs @ weight.T + bias`, as `torch.nn.functional.linear` defines it.

    Args:
        inputs: [..., in].
        weight: [out, in].
        bias: [out] or None.
    """
    if inputs.dtype is not torch.bfloat16:
        return F.linear(inputs, weight, bias)
    impl = choose(inputs.device, inputs.dtype, inputs.shape[:-1].numel())
    if impl == "native":
        return F.linear(inputs, weight, bias)
    if impl == "unpacked":
        with without_onednn():
            return F.linear(inputs, weight, bias)
    wide = F.linear(inputs.float(), weight.float(), None if bias is None else bias.float())
    return wide.to(inputs.dtype)


def choose(device: torch.device, dtype: torch.dtype, num_rows: int) -> LinearImpl:
    """Return how a product of `num_rows` rows is executed.

    One row of bfloat16 on a CPU that has bfloat16 instructions runs unpacked, many rows on a CPU
    that has none run widened, everything else is native; `REASONS` says why.
    """
    if dtype != torch.bfloat16 or device.type != "cpu":
        return "native"
    if computes_bf16(device):
        return "unpacked" if num_rows == 1 else "native"
    return "widened" if num_rows > _FEW_ROWS else "native"


class Linear(nn.Linear):
    """`torch.nn.Linear` executed through `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return `linear(input, self.weight, self.bias)`: [..., in] to [..., out]."""
        return linear(input, self.weight, self.bias)
