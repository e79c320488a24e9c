"""transformers on PyTorch with SDPA, by the shortest greedy loop. Option: `dtype`."""

from __future__ import annotations

import time

import clock

asked = clock.request()

import torch  # noqa: E402 (threads are set first)
import transformers  # noqa: E402

torch.set_num_threads(asked["threads"])
dtype = getattr(torch, asked.get("dtype", "bfloat16"))
model = transformers.AutoModelForCausalLM.from_pretrained(asked["model"], dtype=dtype).eval()


@torch.inference_mode()
def once(prompts: list[list[int]], new: int) -> tuple[list[list[int]], clock.Event, clock.Event]:
    """`forward` with its cache, the logits of the last token only."""
    ids, cache = torch.tensor(prompts), None
    tokens, times = [], []
    for _ in range(new):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        ids = output.logits[:, -1:].argmax(-1)
        tokens.append(ids)
        times.append(time.perf_counter())
    count = len(prompts)
    return torch.cat(tokens, 1).tolist(), (times[0], count), (times[-1], count * new)


def load_text() -> clock.Text:
    """The model's own tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked["model"])
    return lambda text: tokenizer(text).input_ids, tokenizer.decode


clock.serve(
    asked, once, f"transformers {transformers.__version__}, torch {torch.__version__}", load_text
)
