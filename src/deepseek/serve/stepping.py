"""What computes a model's steps over pages: the seam between the server and engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from deepseek.data import Tokenizer
from deepseek.generate.adapters import EngineAdapter
from deepseek.models.config import DecoderConfig
from deepseek.ops.low_rank import LowRankUpdate


class StepEngine(Protocol):
    """A model ready to run, as `deepseek.generate.Engine` is; its methods are explained there."""

    @property
    def config(self) -> DecoderConfig:
        """Of the decoder."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of the model."""
        ...

    @property
    def instruction_set(self) -> str:
        """Whose kernels choose tokens."""
        ...

    @property
    def threads(self) -> int:
        """Threads that compute."""
        ...

    @property
    def adapters(self) -> Mapping[str, EngineAdapter]:
        """Those that are loaded, by name."""
        ...

    @property
    def adapter_bytes(self) -> int:
        """Bytes of all adapters in memory."""
        ...

    @property
    def can_copy_pages(self) -> bool:
        """Whether pages have `copy(target, source)`, from any token of which a text may go on."""
        ...

    def new_pages(self, num_pages: int) -> Any:
        """Return memory for pages of 64 tokens; it says its `num_bytes`."""
        ...

    def step(
        self,
        pages: Any,
        tokens: Sequence[int] | np.ndarray,
        positions: Sequence[int] | np.ndarray,
        rows: Sequence[int] | np.ndarray,
        page_table: np.ndarray,
        selected: Sequence[int] | np.ndarray,
        adapters: Sequence[int] | np.ndarray | None = None,
    ) -> np.ndarray:
        """Append tokens to their rows' pages and return logits float32 [selected, vocab]."""
        ...

    def add_adapter(self, name: str, updates: Mapping[str, LowRankUpdate]) -> EngineAdapter:
        """Load an adapter under a name."""
        ...

    def drop_adapter(self, name: str) -> None:
        """Forget the adapter of a name."""
        ...
