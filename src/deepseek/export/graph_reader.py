"""A reader of any runtime that runs one graph: of ids, mask and past for a decoder, of ids and mask
for an encoder. Loads no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from deepseek.errors import CapacityError, ConfigError, ShapeError, describe
from deepseek.export.formats import Floats, Ids, Kind

Run = Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]
"""Computes the graph's outputs from its inputs, both in their order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphReader:
    """Runs a graph whose inputs are ids [batch, tokens], mask [batch, past + tokens] and, of a
    decoder, what is kept of the past; whose outputs are logits or states, and what is to be kept
    with the new tokens in it. Is a `Reader`."""

    name: str
    kind: Kind
    max_tokens: int
    max_batch: int
    run: Run
    empty: Callable[[int], list[np.ndarray]] | None = None
    """Returns what a decoder has kept of so many rows before their first token, each [..., past,
    channels]; None where there is no cache."""
    run_layers: Run | None = None
    """As `run`, but gives the states behind each layer; None where it cannot."""

    @property
    def has_cache(self) -> bool:
        """Whether `step` can be called."""
        return self.empty is not None

    def forward(self, ids: Ids, mask: Ids) -> Floats:
        """Return what the model answers, as `Reader.forward`.

        Raises:
            ShapeError: ids or a mask of another shape, or longer than the graph takes.
        """
        return self.run(self._inputs(ids, mask))[0]

    def step(self, ids: Ids, state: object | None) -> tuple[Floats, object]:
        """Return logits and the new state, as `Reader.step`.

        Raises:
            ConfigError: a model that keeps nothing, or a state of something else.
            CapacityError: the text is longer than the graph takes.
        """
        if self.empty is None:
            raise ConfigError(describe("step", self.name, "asked of a decoder", self.kind))
        past = self.empty(len(ids)) if state is None else state
        if not isinstance(past, list):
            raise ConfigError(describe("state", self.name, "what a step returned", type(state)))
        total = past[0].shape[-2] + ids.shape[1]
        if total > self.max_tokens:
            must = f"at most {self.max_tokens} tokens"
            raise CapacityError(describe("text", self.name, must, total, "Begin a new one"))
        mask = np.ones((len(ids), total), np.int64)
        logits, *fresh = self.run([ids, mask, *past])
        return logits, fresh

    def layers(self, ids: Ids, mask: Ids) -> Sequence[Floats] | None:
        """Return the states behind each layer, as `Reader.layers`."""
        return None if self.run_layers is None else self.run_layers(self._inputs(ids, mask))

    def _inputs(self, ids: Ids, mask: Ids) -> list[np.ndarray]:
        if ids.ndim != 2 or 0 in ids.shape or mask.shape != ids.shape:
            must = "[batch, tokens] both, at least one of each"
            raise ShapeError(describe("ids and mask", self.name, must, [ids.shape, mask.shape]))
        if len(ids) > self.max_batch or ids.shape[1] > self.max_tokens:
            must = f"at most [{self.max_batch}, {self.max_tokens}]"
            raise ShapeError(describe("ids", self.name, must, list(ids.shape)))
        return [ids, mask, *(self.empty(len(ids)) if self.empty else ())]
