"""llama.cpp through the low-level API of llama-cpp-python."""

from __future__ import annotations

import ctypes
import time

import clock

asked = clock.request()

import llama_cpp as api  # noqa: E402 (threads are set first)
import numpy as np  # noqa: E402

quiet = api.llama_log_callback(lambda level, text, data: None)
api.llama_log_set(quiet, ctypes.c_void_p(0))
api.llama_backend_init()
model = api.llama_model_load_from_file(asked["model"].encode(), api.llama_model_default_params())
assert model
settings = api.llama_context_default_params()
longest = -(-(asked["prompt_tokens"] + asked["new_tokens"]) // 256) * 256
settings.n_ctx = longest * asked["batch"]
settings.n_seq_max = asked["batch"]
settings.n_batch, settings.n_ubatch = 2048, 512
settings.n_threads = settings.n_threads_batch = asked["threads"]
context = api.llama_init_from_model(model, settings)
assert context
vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
memory = api.llama_get_memory(context)
batch = api.llama_batch_init(2048, 0, 1)


def submit(rows: list[tuple[int, int, int, bool]]) -> None:
    """Run (token, position, sequence, whether its logits are wanted)."""
    batch.n_tokens = len(rows)
    for place, (token, position, sequence, wanted) in enumerate(rows):
        batch.token[place], batch.pos[place] = token, position
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
        batch.logits[place] = wanted
    assert api.llama_decode(context, batch) == 0


def pick(place: int) -> int:
    """Return the likeliest token."""
    logits = api.llama_get_logits_ith(context, place)
    return int(np.ctypeslib.as_array(logits, shape=(vocabulary,)).argmax())


def once(prompts: list[list[int]], new: int) -> tuple[list[list[int]], clock.Event, clock.Event]:
    """Prompts in batches of at most 2048 tokens, then a token of every sequence a step."""
    api.llama_memory_clear(memory, True)
    out: list[list[int]] = [[] for _ in prompts]
    rows = [
        (token, place, sequence, place == len(prompt) - 1)
        for sequence, prompt in enumerate(prompts)
        for place, token in enumerate(prompt)
    ]
    for start in range(0, len(rows), 2048):
        part = rows[start : start + 2048]
        submit(part)
        for place, row in enumerate(part):
            if row[3]:
                out[row[2]].append(pick(place))
    first = (time.perf_counter(), len(prompts))
    for step in range(new - 1):
        submit([(out[s][-1], len(p) + step, s, True) for s, p in enumerate(prompts)])
        for sequence in range(len(prompts)):
            out[sequence].append(pick(sequence))
    return out, first, (time.perf_counter(), len(prompts) * new)


def encode(text: str) -> list[int]:
    """Return the ids of a text."""
    raw = text.encode()
    ids = (api.llama_token * (len(raw) + 8))()
    words = api.llama_model_get_vocab(model)
    count = api.llama_tokenize(words, raw, len(raw), ids, len(ids), True, True)
    return list(ids[:count])


def decode(ids: list[int]) -> str:
    """Return the text of ids."""
    words, piece = api.llama_model_get_vocab(model), ctypes.create_string_buffer(256)
    parts = []
    for token in ids:
        count = api.llama_token_to_piece(words, token, piece, len(piece), 0, True)
        parts.append(piece.raw[:count])
    return b"".join(parts).decode(errors="replace")


def load_text() -> clock.Text:
    """The vocabulary came with the model."""
    return encode, decode


clock.serve(asked, once, f"llama-cpp-python {api.__version__}", load_text)
