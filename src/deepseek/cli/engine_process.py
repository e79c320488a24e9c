"""One engine in a process of its own: what it costs to start, to read a prompt and to generate.

    python -m deepseek.cli.engine_process '{"engine": "deepseek", "scheme": "int4", ...}'

prints one JSON object. Nothing is imported that the engine does not need.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Generate = Callable[[list[int], int], Iterator[object]]
"""Reads a prompt and gives something for each new token, when it is there."""


def deepseek_engine(asked: dict[str, Any]) -> Generate:
    """Return generation by our engine, without torch."""
    from deepseek.face import load_engine
    from deepseek.generate import stream

    engine = load_engine(asked["model"], scheme=asked["scheme"], threads=asked["threads"])
    if engine is None:
        raise SystemExit("this model does not run on the engine")
    return lambda prompt, count: stream(engine, prompt, max_tokens=count, ignore_eos=True)


def transformers_engine(asked: dict[str, Any]) -> Generate:
    """Return greedy decoding by the forward pass of transformers."""
    import torch
    import transformers

    torch.set_num_threads(asked["threads"])
    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(asked["model"], dtype=getattr(torch, asked["scheme"])).eval()

    def generate(prompt: list[int], count: int) -> Iterator[object]:
        tokens, cache = torch.tensor([prompt]), None
        with torch.inference_mode():
            for _ in range(count):
                output = model(
                    input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                cache, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)
                yield int(tokens)

    return generate


def llama_cpp_engine(asked: dict[str, Any]) -> Generate:
    """Return greedy decoding by llama.cpp on the GGUF that the model came from."""
    # a peer, used where somebody has installed it
    model = importlib.import_module("llama_cpp").Llama(
        asked["model"],
        n_ctx=asked["prompt_tokens"] + asked["new_tokens"] + 8,
        n_threads=asked["threads"],
        n_threads_batch=asked["threads"],
        verbose=False,
    )

    def generate(prompt: list[int], count: int) -> Iterator[object]:
        model.reset()
        for number, token in enumerate(model.generate(prompt, temp=0.0, reset=True), start=1):
            yield token
            if number == count:
                return

    return generate


ENGINES: dict[str, Callable[[dict[str, Any]], Generate]] = {
    "deepseek": deepseek_engine,
    "transformers": transformers_engine,
    "llama.cpp": llama_cpp_engine,
}


def timed(generate: Generate, prompt: list[int], count: int) -> tuple[float, float]:
    """Return tokens/s of reading the prompt, and of the tokens after the first."""
    start = time.perf_counter()
    arrivals = [time.perf_counter() for _ in generate(prompt, count)]
    return len(prompt) / (arrivals[0] - start), (count - 1) / (arrivals[-1] - arrivals[0])


def main() -> None:
    """Measure as the request says."""
    # what an engine prints goes to standard error
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asked: dict[str, Any] = json.loads(sys.argv[1])
    count, length = asked["new_tokens"], asked["prompt_tokens"]
    # each prompt differs from the one before, so that nothing is reused
    prompts = [[(17 + 7 * i + n) % 1000 + 5 for i in range(length)] for n in range(4)]
    generate = ENGINES[asked["engine"]](asked)
    next(iter(generate(prompts[0], 1)))
    started_s = time.time() - asked["started_at"]
    timed(generate, prompts[0], count)
    speeds = [timed(generate, prompt, count) for prompt in prompts[1:]]
    with open("/proc/self/status", encoding="ascii") as file:
        peak = next(line for line in file if line.startswith("VmHWM:"))
    result = {
        "cold_start_s": started_s,
        "prefill_tokens_per_s": max(prefill for prefill, _ in speeds),
        "decode_tokens_per_s": max(decode for _, decode in speeds),
        "process_peak_rss_bytes": int(peak.split()[1]) * 1024,
    }
    print(json.dumps(result), file=answer, flush=True)


if __name__ == "__main__":
    main()
