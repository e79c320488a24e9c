"""Steps through a decoder's modules, for a model that has no engine: right, and slower.

Its pages are those of `ops.attention`, so all that stands on pages (prefixes that are found again,
requests that are turned back, audits) works as with an engine. Each row of a step is a pass of its
own, so no other request's numbers touch it. What runs beside it may cut its prompt elsewhere, and
PyTorch rounds a product of many rows otherwise than one of a single row: answers are those of
`generate` up to the last bits, not bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from deepseek.errors import ConfigError, describe
from deepseek.generate.adapters import EngineAdapter
from deepseek.models import Decoder
from deepseek.ops.attention import KVCache
from deepseek.ops.attention.cache import PAGE_SIZE, PagedKV
from deepseek.ops.cpu import chosen_instruction_set
from deepseek.ops.low_rank import LowRankUpdate


@dataclasses.dataclass(frozen=True, eq=False)
class ModulePages:
    """Pages of all layers, and the tokens that they hold."""

    layers: list[PagedKV]
    tokens: Tensor
    """int32 [pages, page size]; what planners read that cut a text."""
    num_bytes: int

    def row(self, table: np.ndarray, length: int) -> KVCache:
        """Return the cache of one row of a page table, over the same memory.

        Args:
            table: int32 [pages].
            length: tokens that its pages hold.
        """
        pages = torch.from_numpy(table)
        layers = [
            dataclasses.replace(layer, page_table=pages[None], first_page=None)
            for layer in self.layers
        ]
        return KVCache(layers, [length], self.tokens[pages.long()].reshape(1, -1))


class ModuleEngine:
    """A decoder of PyTorch modules, with the steps of an `Engine`. Is a `StepEngine`.

    It has no adapters; PyTorch computes on as many threads as it was told to, whole process.

    Args:
        model: ready to run.
    """

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self.config, self.tokenizer = model.config, model.tokenizer
        self.instruction_set = chosen_instruction_set()
        self.adapters: dict[str, EngineAdapter] = {}
        self.adapter_bytes = 0

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return torch.get_num_threads()

    @property
    def can_copy_pages(self) -> bool:
        """Pages of modules are not copied."""
        return False

    def new_pages(self, num_pages: int) -> ModulePages:
        """Return memory for `num_pages` pages of 64 tokens, in every layer.

        Raises:
            CapacityError: there is not enough memory.
        """
        cache = self._model.new_cache(1, num_pages * PAGE_SIZE)
        tokens = cache.tokens.view(num_pages, PAGE_SIZE)
        return ModulePages(cache.layers, tokens, cache.num_bytes)

    @torch.inference_mode()
    def step(
        self,
        pages: ModulePages,
        tokens: Sequence[int] | np.ndarray,
        positions: Sequence[int] | np.ndarray,
        rows: Sequence[int] | np.ndarray,
        page_table: np.ndarray,
        selected: Sequence[int] | np.ndarray,
        adapters: Sequence[int] | np.ndarray | None = None,
    ) -> np.ndarray:
        """Append tokens to their rows' pages and return logits float32 [selected, vocab]; arguments
        as of `Engine.step`, of which `adapters` must be None."""
        assert adapters is None
        ids, places, owners = (np.asarray(each, np.int64) for each in (tokens, positions, rows))
        wanted = np.asarray(selected, np.int64)
        logits = np.empty((len(wanted), self.config.vocab_size), np.float32)
        for row in np.unique(owners):
            mine = np.flatnonzero(owners == row)
            asked = np.flatnonzero(np.isin(wanted, mine))
            table = np.ascontiguousarray(page_table[row], np.int32)
            own = self._row(pages, ids[mine], int(places[mine[0]]), table, wanted[asked] - mine[0])
            logits[asked] = own
        return logits

    def _row(
        self,
        pages: ModulePages,
        tokens: np.ndarray,
        start: int,
        table: np.ndarray,
        selected: np.ndarray,
    ) -> np.ndarray:
        """Append the tokens of one row and return the logits of some of them."""
        cache = pages.row(table, start)
        last_only = not np.any(selected < len(tokens) - 1)
        output = self._model(torch.from_numpy(tokens)[None], cache=cache, last_only=last_only)
        slots = np.arange(start, start + len(tokens))
        held = table[slots // PAGE_SIZE].astype(np.int64), slots % PAGE_SIZE
        pages.tokens[held] = torch.from_numpy(tokens.astype(np.int32))
        first = len(tokens) - 1 if last_only else 0
        return output.logits[0, selected - first].float().numpy()

    def add_adapter(self, name: str, updates: Mapping[str, LowRankUpdate]) -> EngineAdapter:
        """Refuse an adapter.

        Raises:
            ConfigError: always.
        """
        must = "one that the engine runs, to take adapters"
        step = "Merge the adapter into the model first"
        raise ConfigError(describe("model", f"adapter {name!r}", must, "its modules", step))

    def drop_adapter(self, name: str) -> None:
        """Refuse as well: there is none.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(describe("adapter", "the model", "one that is loaded", name))
