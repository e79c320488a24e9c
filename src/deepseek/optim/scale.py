"""The factor by which a loss is multiplied so that its gradients stay within float16."""

from __future__ import annotations

from typing import Any, Literal

from deepseek.errors import ConfigError, describe


class LossScale:
    """A fixed factor, or one that grows while all is well and is halved when gradients overflow.

    Source: Micikevicius et al., "Mixed precision training" (1710.03740), section 3.2.
    """

    def __init__(
        self, scale: float | Literal["dynamic"], *, start: float = 2.0**12, patience: int = 2000
    ) -> None:
        """Make the factor.

        Args:
            scale: a number, or "dynamic".
            start: the first factor of a dynamic one. Gradients of a mean loss are seldom above 16;
                each halving costs a step.
            patience: steps without overflow after which it is doubled.

        Raises:
            ConfigError: it is neither.
        """
        is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if scale != "dynamic" and not (is_number and 0 < scale < float("inf")):
            must = '"dynamic" or a positive number'
            raise ConfigError(describe("loss_scale", "MixedPrecisionTrainer", must, scale))
        self.is_dynamic = scale == "dynamic"
        self.value = start if scale == "dynamic" else float(scale)
        self._patience, self._good_steps = patience, 0

    def update(self, overflowed: bool) -> None:
        """Learn how a step went."""
        if not self.is_dynamic:
            return
        self._good_steps = 0 if overflowed else self._good_steps + 1
        if overflowed:
            self.value = max(1.0, self.value / 2)
        elif self._good_steps == self._patience:
            self.value, self._good_steps = self.value * 2, 0

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on."""
        return {"value": self.value, "good_steps": self._good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.value, self._good_steps = float(state["value"]), int(state["good_steps"])
