"""Linear products: one meaning, executed as this processor does it best."""

from deepseek.ops.linear.api import REASONS, Linear, LinearImpl, choose, linear

__all__ = ["REASONS", "Linear", "LinearImpl", "choose", "linear"]
