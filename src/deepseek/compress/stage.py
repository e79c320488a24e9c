"""The seam of this room: what every stage of a pipeline is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from deepseek.config import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage(Config):
    """One step of a pipeline, as data; the function that does it takes the stage and the `Work`.

    A subclass has a field `kind` with a literal default, by which a file names it, and stands in
    the table of `deepseek.compress.stages`.
    """

    puts_on_grid: ClassVar[bool] = False
    """Whether it leaves weights on a grid of integers."""
    keeps_grid: ClassVar[bool] = False
    """Whether weights that lie on a grid still do so behind it."""

    def why_not_after(self, before: Sequence[Stage]) -> str | None:
        """Return why it cannot follow these stages, or None where it can.

        Args:
            before: the stages that come first, in order.
        """
        rounded = next((stage for stage in before if stage.puts_on_grid), None)
        if rounded is not None and not self.keeps_grid:
            return (
                f"the weights lie on the grid of stage {kind_of(rounded)!r} by then, "
                "and this stage would take them off it"
            )
        return None


def kind_of(stage: Stage) -> str:
    """Return the name by which a file asks for a stage."""
    return str(getattr(stage, "kind", type(stage).__name__))
