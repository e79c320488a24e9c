"""Routed attention as data: how many blocks a query sees, which of them always. Loads no torch."""

from __future__ import annotations

import dataclasses
import math

from deepseek.config import Config
from deepseek.errors import ConfigError, describe

BLOCK = 64
"""Slots of a block, the page size of every cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing(Config):
    """What a query of routed attention sees: the first block, the recent ones, and of those between
    the ones that matter to it, chosen anew every `refresh` tokens.

    A block matters by its largest score, as a share of a softmax over the blocks' largest scores;
    what has less than `threshold` of it is not seen. The tokens that a query may see are `share` of
    the s slots up to the end of its block, at least `least` and at most `most`, which grows with
    log s behind `most_from`: the work of attention to what was chosen is then O(n log n).
    """

    refresh: int = 1
    """Neighbouring tokens that share a choice, that of the first of them; a divisor of 64."""
    first: int = 1
    """Blocks at the start of a text that are always seen."""
    recent: int = 4
    """Blocks before a query that are always seen, its own included."""
    threshold: float = 0.01
    """Share from which on a block between the first and the recent ones is seen; 0 for as many
    blocks as may be."""
    share: float = 0.5
    """Of the tokens up to the end of a query's block, those that it may see."""
    least: int = 1024
    """Tokens that may be seen at least; a text so short is attended densely."""
    most: int = 4096
    """Tokens that may be seen at most, at `most_from`."""
    most_from: int = 16384
    """Slot behind which `most` grows with the logarithm."""
    means: bool = True
    """Whether a block that a query does not see counts by its mean key and mean value, 64 times."""
    summaries: bool = False
    """Whether a query judges the blocks before its recent ones by sixteen clusters of their keys
    first, by means and radii, and scores the keys of the best alone, of as many as it may see."""

    def __post_init__(self) -> None:
        if not 1 <= self.refresh <= BLOCK or BLOCK % self.refresh:
            raise ConfigError(describe("refresh", "Routing", f"a divisor of {BLOCK}", self.refresh))
        if self.first < 0 or self.recent < 1:
            got = f"first {self.first}, recent {self.recent}"
            raise ConfigError(describe("first and recent", "Routing", "from 0 and from 1 on", got))
        if not (self.first + self.recent) * BLOCK <= self.least <= self.most:
            must = "room for what is always seen, and no more than most"
            raise ConfigError(describe("least", "Routing", must, self.least))
        if not 0 <= self.threshold < 1:
            must = "from 0 to below 1"
            raise ConfigError(describe("threshold", "Routing", must, self.threshold))
        if not 0 < self.share <= 1 or self.most_from < self.most:
            must = "from above 0 to 1, and behind most"
            got = f"{self.share}, {self.most_from}"
            raise ConfigError(describe("share and most_from", "Routing", must, got))

    def blocks_seen(self, own: int) -> int:
        """Return how many blocks a query in block `own` may see."""
        slot = (own + 1) * BLOCK
        growth = math.log(max(slot, self.most_from)) / math.log(self.most_from)
        tokens = max(self.least, min(self.share * slot, self.most * growth))
        return int(tokens) // BLOCK

    def budget(self, num_blocks: int) -> list[int]:
        """Return `blocks_seen` of each of a number of blocks."""
        return [self.blocks_seen(own) for own in range(num_blocks)]
