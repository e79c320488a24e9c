"""The engine of an encoder: its program with its packed weights, run by our kernels. Loads no
torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deepseek.errors import ConfigError, ShapeError, describe
from deepseek.generate.engine import (
    MAX_STEP_TOKENS,
    PAGE_SIZE,
    PackedBytes,
    Weights,
    checked_threads,
    compile_program,
)
from deepseek.generate.flat_encoder import encoder_program, why_encoder_not_flat
from deepseek.graph import Program
from deepseek.models.config import EncoderConfig, cut
from deepseek.ops.cpu import chosen_instruction_set, kernels
from deepseek.ops.scheme import Scheme

if TYPE_CHECKING:
    from deepseek.data import Tokenizer

Texts = Sequence[Sequence[int]]
"""Token ids of each text, those of its beginning and end included."""


@dataclasses.dataclass(frozen=True, eq=False)
class EncoderEngine:
    """An encoder ready to run without torch. Make it by `build_encoder_engine`.

    One call at a time: it has one memory of activations.
    """

    config: EncoderConfig
    scheme: Scheme
    program: Program
    instruction_set: str
    native: Any
    """The compiled program with its weights."""
    pages: Any
    """Keys and values of a step's rows in the layer that is computed."""
    tokenizer: Tokenizer | None = None

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return self.native.threads

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weights; the tables of positions and types are not in it."""
        return self.native.weight_bytes

    def states(self, texts: Texts, types: Texts | None = None) -> list[np.ndarray]:
        """Return the last states of each text's tokens: float32 [length, hidden].

        Texts of any lengths share steps; one's result does not depend on the others, bit by bit.

        Args:
            texts: at most `max_positions` tokens each, at least 1.
            types: the segment of each token; None for segment 0.

        Raises:
            ShapeError: an empty text, one that is too long, or types of another length.
            ConfigError: an id or a type that the model does not have.
        """
        found: list[np.ndarray] = [np.empty(0, np.float32)] * len(texts)
        for rows, step in self._steps(texts, types):
            output = self._run(step, range(len(step.tokens)), states=True)
            for row, start, stop in zip(rows, step.starts, step.stops, strict=True):
                found[row] = output[start:stop]
        return found

    def first_states(self, texts: Texts, types: Texts | None = None) -> np.ndarray:
        """Return the last state of each text's first token: float32 [texts, hidden]. The last layer
        is computed for these alone.

        Args and raises: as `states`.
        """
        found = np.empty((len(texts), self.config.hidden_size), np.float32)
        for rows, step in self._steps(texts, types):
            found[rows] = self._run(step, step.starts, states=True)
        return found

    def logits(self, texts: Texts, types: Texts | None = None) -> np.ndarray:
        """Return the logits of each text's classes: float32 [texts, labels].

        Args and raises: as `states`; and ConfigError where the model has no classifier.
        """
        if not self.config.labels:
            must = "one with a classifier"
            raise ConfigError(describe("model", "EncoderEngine.logits", must, "none"))
        found = np.empty((len(texts), len(self.config.labels)), np.float32)
        for rows, step in self._steps(texts, types):
            found[rows] = self._run(step, step.starts, states=False)
        return found

    def vectors(self, texts: Texts) -> np.ndarray:
        """Return one vector a text, float32 [texts, hidden], pooled and normalized as the config
        says.

        Args and raises: as `states`.
        """
        if self.config.pooling == "first":
            pooled = self.first_states(texts)
        else:
            pooled = np.empty((len(texts), self.config.hidden_size), np.float32)
            for row, states in enumerate(self.states(texts)):
                pooled[row] = states.mean(0)
        return normalized(pooled) if self.config.normalize else pooled

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors of texts; those longer than `max_embed_tokens` are cut.

        Raises:
            ConfigError: the model has no tokenizer.
        """
        return self.vectors(self._encoded(texts))

    def classify(self, texts: Sequence[str]) -> list[str]:
        """Return the label of each text; long ones are cut as by `embed`.

        Raises:
            ConfigError: the model has no classifier or no tokenizer.
        """
        return [self.config.labels[i] for i in self.logits(self._encoded(texts)).argmax(-1)]

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        if self.tokenizer is None:
            step = "Load a bundle with a tokenizer, or give token ids"
            raise ConfigError(describe("tokenizer", "EncoderEngine", "loaded", None, step))
        limit = self.config.max_embed_tokens or self.config.max_positions
        return [cut(ids, limit) for ids in self.tokenizer.encode_batch(list(texts))]

    def _steps(self, texts: Texts, types: Texts | None) -> Iterator[tuple[list[int], _Step]]:
        """Return the texts of each step by number, those of like length together, and the step."""
        _check(texts, types, self.config.max_positions)
        rows: list[int] = []
        tokens = pages = 0
        for row in sorted(range(len(texts)), key=lambda row: len(texts[row])):
            length = len(texts[row])
            more = _pages_of(length)
            is_full = tokens + length > self.native.max_tokens
            if rows and (is_full or pages + more > self.pages.num_pages):
                yield rows, _step(rows, texts, types)
                rows, tokens, pages = [], 0, 0
            rows, tokens, pages = [*rows, row], tokens + length, pages + more
        if rows:
            yield rows, _step(rows, texts, types)

    def _run(
        self, step: _Step, selected: Sequence[int] | np.ndarray, *, states: bool
    ) -> np.ndarray:
        """Return the states of selected tokens, or the head's outputs."""
        places = np.ascontiguousarray(selected, np.int32)
        width = self.config.hidden_size if states else len(self.config.labels)
        output = np.empty((len(places), width), np.float32)
        arrays = (step.tokens, step.positions, step.rows, step.table, places, output)
        try:
            self.native.run(self.pages, *arrays, types=step.types, states=states)
        except ValueError as error:
            must = "consistent"
            raise ConfigError(describe("texts", "EncoderEngine", must, str(error))) from error
        return output


@dataclasses.dataclass(frozen=True)
class _Step:
    """Texts side by side, as the native program takes them."""

    tokens: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    table: np.ndarray
    types: np.ndarray | None
    starts: np.ndarray
    stops: np.ndarray
    """First token of each text, and the one behind its last."""


def _step(rows: Sequence[int], texts: Texts, types: Texts | None) -> _Step:
    lengths = np.array([len(texts[row]) for row in rows])
    pages = -(-lengths // PAGE_SIZE)
    table = np.zeros((len(rows), pages.max()), np.int32)
    for row, (first, count) in enumerate(zip(np.cumsum(pages) - pages, pages, strict=True)):
        table[row, :count] = np.arange(first, first + count)
    stops = np.cumsum(lengths)
    return _Step(
        _joined([texts[row] for row in rows]),
        np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        np.repeat(np.arange(len(rows), dtype=np.int32), lengths),
        table,
        None if types is None else _joined([types[row] for row in rows]),
        stops - lengths,
        stops,
    )


def _joined(parts: Texts) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.int32) for part in parts])


def _check(texts: Texts, types: Texts | None, limit: int) -> None:
    if types is not None and [len(each) for each in types] != [len(each) for each in texts]:
        raise ShapeError(describe("types", "EncoderEngine", "of the lengths of texts", "others"))
    for text in texts:
        if not 1 <= len(text) <= limit:
            must = f"from 1 to {limit} tokens long"
            raise ShapeError(describe("text", "EncoderEngine", must, len(text), "Cut it"))


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Return vectors of length 1; zeros stay zeros."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(lengths, 1e-12)


def _pages_of(length: int) -> int:
    return -(-length // PAGE_SIZE)


def build_encoder_engine(
    config: EncoderConfig,
    weights: Weights,
    scheme: Scheme,
    *,
    tokenizer: Tokenizer | None = None,
    threads: int | None = None,
    instruction_set: str | None = None,
    progress: Callable[[float], None] | None = None,
    packed: Mapping[str, PackedBytes] | None = None,
) -> EncoderEngine:
    """Return the engine of an encoder; every weight is read once and packed.

    Args:
        config: of the encoder.
        weights: its weights by name.
        scheme: how they are stored; `kv` is the type that attention computes in.
        tokenizer: handed on.
        threads: None for the cores this process may use.
        instruction_set: None for the best one here, or what `DEEPSEEK_ISA` says.
        progress: called with the share of weights that are packed.
        packed: as in `build_engine`.

    Raises:
        BackendError: the kernels were not built, or a weight is missing.
        ConfigError: the encoder has no flat program, or the scheme does not fit it.
    """
    reason = why_encoder_not_flat(config)
    if reason is not None:
        must = "one that the engine knows"
        raise ConfigError(describe("model", "EncoderEngine", must, reason, "Run its modules"))
    program = encoder_program(config)
    isa = instruction_set or chosen_instruction_set()
    max_tokens = max(MAX_STEP_TOKENS, config.max_positions)
    native = compile_program(
        program,
        weights,
        scheme,
        max_tokens=max_tokens,
        threads=checked_threads(threads),
        instruction_set=isa,
        progress=progress,
        packed=packed,
    )
    num_pages = 2 * _pages_of(max_tokens)  # so that texts of half a page fill a step
    pages = kernels().KvPages(scheme.kv, native, num_pages)
    return EncoderEngine(config, scheme, program, isa, native, pages, tokenizer)
