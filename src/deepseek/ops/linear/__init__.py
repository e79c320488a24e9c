"""Linear products: one meaning, executed as this processor does it best."""

from deepseek.ops.linear.api import Linear, LinearImpl, choose, linear

__all__ = ["Linear", "LinearImpl", "choose", "linear"]
