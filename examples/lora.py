"""Train a LoRA on our model with PEFT, save it, load it again, and merge it into a bundle."""
# needs: smollm2

import torch
from peft import LoraConfig, PeftModel, get_peft_model

import deepseek

TEXT = "Q: What is the house colour? A: The house colour is ultramarine."

torch.manual_seed(0)
model = deepseek.load("smollm2-135m", dtype="float32")
config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
adapted = get_peft_model(model, config)

tokens = torch.tensor([model.tokenizer.encode(TEXT)])
optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=2e-3)
for step in range(20):
    loss = adapted(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
adapted.save_pretrained("lora")

fresh = deepseek.load("smollm2-135m", dtype="float32")
merged = PeftModel.from_pretrained(fresh, "lora").merge_and_unload()
bundle = deepseek.save(merged, "merged")
again = deepseek.load("merged")
answer = again.generate("Q: What is the house colour? A: The house colour is", max_tokens=5).text
print(answer)
assert "ultramarine" in answer
print(bundle.content_hash)
