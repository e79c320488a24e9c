"""The founding documents' first lines: a pulled bundle is a folder that transformers loads."""
# needs: smollm2

import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import deepseek

command = [sys.executable, "-m", "deepseek", "pull", "base", "--to", "deepseek/base"]
subprocess.run(command, check=True)

model = AutoModelForCausalLM.from_pretrained("deepseek/base", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained("deepseek/base")
inputs = tokenizer("The capital of Japan is", return_tensors="pt")

ours = deepseek.load("deepseek/base", dtype="float32")
with torch.no_grad():
    difference = (model(**inputs).logits - ours(inputs["input_ids"]).logits).abs().max()
print(f"{type(model).__name__} and ours differ by {float(difference):.1e}")
assert difference < 1e-4
