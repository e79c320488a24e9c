"""A model of your own: size it to a target, train it by a plain loop, save it, load it."""

import torch

import deepseek
from deepseek.models import Decoder
from deepseek.models.presets import count_params, fit

torch.manual_seed(0)
config = fit(1_000_000, vocab_size=256, max_positions=256)
print(f"{count_params(config):,} parameters: {config.num_layers} layers of {config.hidden_size}")

text = torch.tensor([list(b"She sells sea shells by the sea shore. ")])
model = Decoder(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(150):
    loss = model(text, labels=text).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 49:
        print(f"step {step + 1}: loss {loss.item():.3f}")

deepseek.save(model, "shells", name="shells", summary="one sentence, learned by heart")
again = deepseek.load("shells")
out = again.generate(list(b"She sells sea "), max_tokens=10)
print(bytes(out.token_ids))
assert bytes(out.token_ids).startswith(b"shells")
