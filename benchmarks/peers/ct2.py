"""CTranslate2, int8."""

from __future__ import annotations

import json
import time
from pathlib import Path

import clock

asked = clock.request()

import ctranslate2  # noqa: E402 (threads are set first)

model = ctranslate2.Generator(
    asked["model"],
    device="cpu",
    compute_type="int8",
    inter_threads=1,
    intra_threads=asked["threads"],
)
words = json.loads((Path(asked["model"]) / "vocabulary.json").read_text())


def once(prompts: list[list[int]], new: int) -> tuple[list[list[int]], clock.Event, clock.Event]:
    """One batch; its callback tells when tokens are there."""
    times: list[float] = []
    seen: set[int] = set()
    first = None

    def note(step: ctranslate2.GenerationStepResult) -> bool:
        nonlocal first
        times.append(time.perf_counter())
        seen.add(step.batch_id)
        if first is None and len(seen) == len(prompts):
            first = (times[-1], len(times))
        return False

    results = model.generate_batch(
        [[words[token] for token in prompt] for prompt in prompts],
        max_length=new,
        min_length=new,
        include_prompt_in_result=False,
        beam_size=1,
        sampling_topk=1,
        callback=note,
    )
    assert first is not None
    return [each.sequences_ids[0] for each in results], first, (times[-1], len(times))


def load_text() -> clock.Text:
    """It has none: the model's own, through the tokenizers library."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(asked["tokenizer"])
    return lambda text: tokenizer.encode(text).ids, tokenizer.decode


clock.serve(asked, once, f"ctranslate2 {ctranslate2.__version__}", load_text)
