"""ONNX Runtime GenAI."""

from __future__ import annotations

import json
import time

import clock

asked = clock.request()

import numpy as np  # noqa: E402 (threads are set first)
import onnxruntime_genai as genai  # noqa: E402

config = genai.Config(asked["model"])
threads = {"intra_op_num_threads": asked["threads"], "inter_op_num_threads": 1}
config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
model = genai.Model(config)


def once(prompts: list[list[int]], new: int) -> tuple[list[list[int]], clock.Event, clock.Event]:
    """One generator for the batch; the end of a sequence is masked by its least length."""
    count, length = len(prompts), len(prompts[0])
    params = genai.GeneratorParams(model)
    total = length + new
    params.set_search_options(
        do_sample=False, max_length=total, min_length=total, batch_size=count, num_beams=1
    )
    generator = genai.Generator(model, params)
    ids = np.array(prompts, dtype=np.int32)
    generator.append_tokens(ids if count > 1 else ids[0])
    times = []
    for _ in range(new):
        generator.generate_next_token()
        if not times:
            generator.get_next_tokens()
        times.append(time.perf_counter())
    out = [list(generator.get_sequence(place))[length:] for place in range(count)]
    return out, (times[0], count), (times[-1], count * new)


def load_text() -> clock.Text:
    """Its own tokenizer."""
    tokenizer = genai.Tokenizer(model)
    return lambda text: list(tokenizer.encode(text)), tokenizer.decode


clock.serve(asked, once, f"onnxruntime_genai {genai.__version__}", load_text)
