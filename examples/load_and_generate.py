"""Load a real model by name; continue a text, answer a question, stream, generate in a batch."""
# needs: smollm2

import deepseek
from deepseek.generate import Sampling, chat_prompt, stream

model = deepseek.load("smollm2-135m", dtype="bfloat16")
assert model.tokenizer is not None

print(model.generate("The capital of France is", max_tokens=5).text)

question = [{"role": "user", "content": "Name three colours."}]
for piece in stream(model, chat_prompt(model.tokenizer, question), max_tokens=40):
    print(piece.text, end="", flush=True)
print()

warm = Sampling(temperature=0.7, top_p=0.9, seed=7)
first = model.generate(["Once upon a time", "The recipe needs"], max_tokens=12, sampling=warm)
again = model.generate(["Once upon a time", "The recipe needs"], max_tokens=12, sampling=warm)
assert [one.text for one in first] == [one.text for one in again], "a seed repeats itself"
for completion in first:
    print(
        repr(completion.text), completion.finish_reason, f"{completion.tokens_per_s:.0f} tokens/s"
    )
