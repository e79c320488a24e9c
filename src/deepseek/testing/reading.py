"""What the reader of an exported model must hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import numpy as np
import torch

from deepseek.errors import DeepseekError, VerifyError, describe
from deepseek.export import Reader
from deepseek.models import Decoder, Encoder

_LENGTHS = (1, 2, 7, 40)
_PADDING = ((3, 0), (0, 3), (2, 4))
"""Slots of padding on the left and on the right."""
_PIECES = (5, 1, 1, 4, 3)
_ROWS = 3


class ReaderTrial:
    """A reader on trial.

    Args:
        reader: to be judged.
        model: its source.
        owner: as faults name it.
        atol: largest difference allowed.
    """

    def __init__(self, reader: Reader, model: Decoder | Encoder, owner: str, atol: float) -> None:
        self.reader, self.model, self.owner, self.atol = reader, model, owner, atol
        self.largest_error = 0.0
        self.has_cache, self.has_layers = reader.has_cache, False
        self._rows = min(_ROWS, reader.max_batch)

    def prove(self) -> None:
        """Try everything that the reader says it has.

        Raises:
            VerifyError: something does not hold.
        """
        if self.reader.max_tokens < 1 or self.reader.max_batch < 1 or not self.reader.name:
            got = f"{self.reader.name!r}, {self.reader.max_batch}, {self.reader.max_tokens}"
            self.fail("name, max_batch and max_tokens", "words, 1 at least and 1 at least", got)
        for rows in {1, self._rows}:
            for length in _LENGTHS:
                ids = self._draw(rows, min(length, self.reader.max_tokens))
                self._forward(f"{list(ids.shape)}", ids, np.ones_like(ids))
        self._padded()
        self._too_long()
        if self.has_cache and isinstance(self.model, Decoder):
            self._steps()
        self._layers()

    def fail(self, name: str, must: str, got: object, cause: Exception | None = None) -> NoReturn:
        """Say what is wrong.

        Raises:
            VerifyError: always.
        """
        raise VerifyError(describe(name, self.owner, must, got)) from cause

    def _draw(self, rows: int, length: int) -> np.ndarray:
        most = self.model.config.vocab_size
        return np.random.default_rng(length).integers(0, most, (rows, length))

    def _call(self, name: str, function: Callable[..., np.ndarray], *arrays: np.ndarray) -> object:
        before = [each.copy() for each in arrays]
        try:
            found = function(*arrays)
        except Exception as error:
            self.fail(name, "answered", f"{type(error).__name__}: {error}", error)
        if not all(map(np.array_equal, before, arrays)):
            self.fail(name, "computed without changing what it is given", "changed inputs")
        return found

    def _close(self, name: str, found: object, expected: np.ndarray, where: np.ndarray) -> None:
        if not isinstance(found, np.ndarray) or found.dtype != np.float32:
            self.fail(name, "a float32 array", getattr(found, "dtype", type(found)))
        if found.shape != expected.shape:
            self.fail(name, f"of shape {list(expected.shape)}", list(found.shape))
        difference = np.abs(found - expected)[where]
        error = float(difference.max()) if np.isfinite(difference).all() else float("inf")
        if error > self.atol:
            self.fail(name, f"within {self.atol:g} of the source", f"{error:.3g} away")
        self.largest_error = max(self.largest_error, error)

    def _forward(self, name: str, ids: np.ndarray, mask: np.ndarray) -> None:
        found = self._call(f"answer to {name}", self.reader.forward, ids, mask)
        counts = mask[:, 0] if self.reader.kind == "classifier" else mask
        self._close(f"answer to {name}", found, self._answers(ids, mask), counts == 1)

    def _answers(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            said = self.model(torch.from_numpy(ids), torch.from_numpy(mask))
        if self.reader.kind == "encoder":
            return said.last_hidden_state.numpy()
        return said.logits.numpy()

    def _padded(self) -> None:
        for left, right in _PADDING:
            ids = self._draw(self._rows, min(11, self.reader.max_tokens))
            mask = np.ones_like(ids)
            mask[-1, :left] = 0
            mask[-1, mask.shape[1] - right :] = 0
            name = f"padding of {left} on the left and {right} on the right"
            self._forward(name, ids, mask)

    def _too_long(self) -> None:
        ids = np.zeros((1, self.reader.max_tokens + 1), np.int64)
        try:
            self.reader.forward(ids, np.ones_like(ids))
        except DeepseekError:
            return
        except Exception as error:
            self.fail(
                "text above max_tokens", "a DeepseekError", f"{type(error).__name__}: {error}"
            )
        self.fail("text above max_tokens", "a DeepseekError", "an answer")

    def _steps(self) -> None:
        for rows in {1, self._rows}:
            ids = self._draw(rows, sum(_PIECES))
            whole = np.ones_like(ids)
            expected, state, start = self._answers(ids, whole), None, 0
            kept: list[tuple[int, int, object]] = []
            for size in _PIECES:
                kept.append((start, size, state))
                state = self._step(ids, expected, start, size, state)
                start += size
            for start, size, state in kept:  # from states that were gone on from already
                self._step(ids, expected, start, size, state)

    def _step(
        self, ids: np.ndarray, expected: np.ndarray, start: int, size: int, state: object | None
    ) -> object:
        piece = slice(start, start + size)
        name = f"step of {size} behind {start}, {len(ids)} rows"
        try:
            found, after = self.reader.step(ids[:, piece], state)
        except Exception as error:
            self.fail(name, "answered", f"{type(error).__name__}: {error}", error)
        self._close(name, found, expected[:, piece], np.ones_like(ids[:, piece]) == 1)
        return after

    def _layers(self) -> None:
        ids = self._draw(self._rows, min(9, self.reader.max_tokens))
        whole = np.ones_like(ids)
        found = self._call("states behind layers", self.reader.layers, ids, whole)  # type: ignore[arg-type]
        if found is None:
            return
        self.has_layers = True
        with torch.inference_mode():
            said = self.model(torch.from_numpy(ids), output_hidden_states=True).hidden_states[1:]
        if not isinstance(found, list | tuple) or len(found) != len(said):
            self.fail("states behind layers", f"{len(said)} arrays, or None", type(found).__name__)
        for number, (one, other) in enumerate(zip(found, said, strict=True)):
            self._close(f"states behind layer {number}", one, other.numpy(), whole == 1)
