"""The real SmolLM2 against transformers, past several blocks of the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from deepseek.hub import load
from deepseek.models import Decoder
from tests.house import REPO
from tests.tolerances import MODEL_LOGITS_ATOL


@pytest.mark.slow
def test_smollm2_is_as_exact_as_transformers(smollm2_folder: Path) -> None:
    """Logits reach 38, where float32 is off by 1e-4 from float64: both are held to that."""
    model = load(smollm2_folder, dtype="float32")
    assert isinstance(model, Decoder) and model.tokenizer is not None
    kind = transformers.AutoModelForCausalLM
    theirs = kind.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    exact = kind.from_pretrained(smollm2_folder, dtype=torch.float64).eval()
    text = (REPO / "docs" / "design" / "0001-block-table.md").read_text(encoding="utf-8")
    tokens = torch.tensor([model.tokenizer.encode(text)[:301]])
    with torch.inference_mode():
        truth, reference = exact(tokens).logits, theirs(tokens).logits
        whole = model(tokens).logits
        cache = model.new_cache(1, 301)
        parts = [model(tokens[:, :130], cache=cache).logits]
        parts += [model(tokens[:, 130:290], cache=cache).logits]
        parts += [model(tokens[:, at : at + 1], cache=cache).logits for at in range(290, 301)]
    allowed = max(MODEL_LOGITS_ATOL, 1.5 * float((reference - truth).abs().max()))
    assert float((whole - truth).abs().max()) <= allowed
    assert float((torch.cat(parts, 1) - truth).abs().max()) <= allowed
    short = slice(0, 16)
    assert float((whole - reference)[:, short].abs().max()) <= MODEL_LOGITS_ATOL
