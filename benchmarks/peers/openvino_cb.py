"""OpenVINO GenAI: the continuous-batching pipeline, without prefix caching."""

from __future__ import annotations

import time

import clock

asked = clock.request()

import numpy as np  # noqa: E402 (threads are set first)
import openvino as ov  # noqa: E402
import openvino_genai as genai  # noqa: E402

scheduler = genai.SchedulerConfig()
scheduler.enable_prefix_caching = False
if asked["mode"] == "batch":
    # so that no prompt is read while others decode
    scheduler.max_num_batched_tokens = asked["batch"] * asked["prompt_tokens"]
scheduler.max_num_seqs = max(scheduler.max_num_seqs, asked["batch"])
properties = {"INFERENCE_NUM_THREADS": asked["threads"], "PERFORMANCE_HINT": "LATENCY"}
pipe = genai.ContinuousBatchingPipeline(asked["model"], scheduler, "CPU", properties)
number = 0


def settings(new: int) -> genai.GenerationConfig:
    """Greedy, for exactly `new` tokens."""
    config = genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.ignore_eos = new, False, True
    return config


def once(prompts: list[list[int]], new: int) -> tuple[list[list[int]], clock.Event, clock.Event]:
    """Requests are added together and stepped until all are done."""
    global number
    handles = []
    for prompt in prompts:
        number += 1
        ids = ov.Tensor(np.array([prompt], dtype=np.int64))
        handles.append(pipe.add_request(number, ids, settings(new)))
    out: list[list[int]] = [[] for _ in prompts]
    first = None
    last_s = time.perf_counter()
    while pipe.has_non_finished_requests():
        pipe.step()
        for place, handle in enumerate(handles):
            while handle.can_read():
                for output in handle.read().values():
                    out[place].extend(output.generated_ids)
        last_s = time.perf_counter()
        if first is None and all(out):
            first = (last_s, sum(map(len, out)))
    assert first is not None
    return out, first, (last_s, sum(map(len, out)))


def load_text() -> clock.Text:
    """The pipeline's own tokenizer."""
    tokenizer = pipe.get_tokenizer()
    return lambda text: tokenizer.encode(text).input_ids.data[0].tolist(), tokenizer.decode


clock.serve(asked, once, f"openvino_genai {genai.get_version()}", load_text)
