"""What every format's tests ask of its reader: the source's answers, at any shape it takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from deepseek import hub
from deepseek.export import Reader
from deepseek.models import Decoder, Encoder
from tests.tolerances import MODEL_LOGITS_ATOL


def answers(model: Decoder | Encoder, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return what the source says for a batch, as `Reader.forward` has it."""
    with torch.inference_mode():
        said = model(torch.from_numpy(ids), torch.from_numpy(mask))
    if isinstance(model, Decoder):
        return said.logits.numpy()
    return (said.last_hidden_state if said.logits is None else said.logits).numpy()


def drawn(rows: int, length: int, most: int, seed: int = 0) -> np.ndarray:
    """Return ids [rows, length] below `most`."""
    return np.random.default_rng(seed).integers(0, most, (rows, length))


def error_of(reader: Reader, model: Decoder | Encoder, ids: np.ndarray, mask: np.ndarray) -> float:
    """Return the largest difference of an answer where there are tokens."""
    found, expected = reader.forward(ids, mask), answers(model, ids, mask)
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    return float(np.abs((found - expected)[counts(reader, mask)]).max())


def counts(reader: Reader, mask: np.ndarray) -> np.ndarray:
    """Return which answers count: those of tokens; of a classifier, texts whose first slot is
    one."""
    return (mask[:, 0] if reader.kind == "classifier" else mask) == 1


def check_forward(reader: Reader, model: Decoder | Encoder, most: int) -> None:
    """Assert that answers are the source's: short, long, and padded on both sides."""
    rows = min(4, reader.max_batch)
    for length in (1, 2, 7, min(33, reader.max_tokens)):
        ids = drawn(rows, length, most, length)
        assert error_of(reader, model, ids, np.ones_like(ids)) < MODEL_LOGITS_ATOL
    for left, right in ((3, 0), (0, 3), (2, 4)):
        ids = drawn(rows, 11, most)
        mask = np.ones_like(ids)
        mask[-1, :left] = 0
        mask[-1, 11 - right :] = 0
        assert error_of(reader, model, ids, mask) < MODEL_LOGITS_ATOL


def check_steps(reader: Reader, model: Decoder, most: int) -> None:
    """Assert that a text read in pieces, of one row and of several, is the text; and that a state
    can be gone on from twice."""
    for rows in {1, min(3, reader.max_batch)}:
        ids = drawn(rows, 14, most)
        expected = answers(model, ids, np.ones_like(ids))
        state, start, pieces, states = None, 0, [], []
        for size in (5, 1, 1, 4, 3):
            states.append(state)
            logits, state = reader.step(ids[:, start : start + size], state)
            pieces.append(logits)
            start += size
        assert np.abs(np.concatenate(pieces, 1) - expected).max() < MODEL_LOGITS_ATOL
        again, _ = reader.step(ids[:, 6:7], states[2])
        assert np.array_equal(again, pieces[2])


def check_layers(reader: Reader, model: Decoder | Encoder, most: int) -> None:
    """Assert that the states behind each layer are the source's."""
    ids = drawn(min(3, reader.max_batch), 9, most)
    with torch.inference_mode():
        said = model(torch.from_numpy(ids), output_hidden_states=True)
    found = reader.layers(ids, np.ones_like(ids))
    assert found is not None
    assert len(found) == model.config.num_layers
    for one, other in zip(found, said.hidden_states[1:], strict=True):
        assert np.abs(one - other.numpy()).max() < MODEL_LOGITS_ATOL


def greedy(reader: Reader, ids: list[int], count: int) -> list[int]:
    """Return the ids that the reader goes on with, the likeliest each time."""
    logits, state = reader.step(np.array([ids]), None)
    made = [int(logits[0, -1].argmax())]
    while len(made) < count:
        logits, state = reader.step(np.array([made[-1:]]), state)
        made.append(int(logits[0, -1].argmax()))
    return made


def source_greedy(model: Decoder, ids: list[int], count: int) -> list[int]:
    """Return the ids that the source goes on with, the likeliest each time."""
    cache, made = model.new_cache(1, len(ids) + count), list(ids)
    fresh = ids
    with torch.inference_mode():
        for _ in range(count):
            logits = model(torch.tensor([fresh]), cache=cache, last_only=True).logits
            fresh = [int(logits[0, -1].argmax())]
            made += fresh
    return made[len(ids) :]


def check_real_decoder(reader: Reader, folder: Path) -> None:
    """Assert that logits are near the source's, padded too, and that the same 64 words follow."""
    model = hub.load(folder, dtype="float32")
    assert isinstance(model, Decoder)
    assert model.tokenizer is not None
    ids = drawn(min(2, reader.max_batch), 65, 49000)
    mask = ids * 0 + 1
    mask[0, :9] = 0
    assert error_of(reader, model, ids, mask) < 1e-3
    prompt = model.tokenizer.encode("The capital of France is")
    assert greedy(reader, prompt, 64) == source_greedy(model, prompt, 64)


def saved(model: Decoder | Encoder, folder: Path) -> Path:
    """Return the folder of a model that was just saved."""
    hub.save(model, folder)
    return folder
