"""Linear products: one meaning, executed as this processor does it best."""

from deepseek.ops.linear.api import REASONS, Linear, LinearImpl, choose, linear
from deepseek.ops.linear.frozen import FrozenLinear

__all__ = ["REASONS", "FrozenLinear", "Linear", "LinearImpl", "choose", "linear"]
