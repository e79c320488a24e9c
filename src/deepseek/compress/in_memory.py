"""`model.quantize(…)`: a loaded model put on a grid in memory, for trying things out."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from deepseek.compress.quantize.stage import Quantize, apply
from deepseek.compress.work import Report, Work
from deepseek.hub import Quantized
from deepseek.models import Decoder, Encoder


def quantize(
    model: Decoder | Encoder,
    *,
    bits: int = 8,
    seed: int = 0,
    report: Report = lambda words, share: None,
    **settings: Any,
) -> Quantized:
    """Put the weights of a model on a grid of integers, in place; generation then computes on it.

    Args:
        model: with a tokenizer, where the method learns from text.
        bits: 8, each row with a scale, rotated and rounded; or 4, in groups of 32, learned.
        seed: of what is drawn.
        report: told of long work.
        **settings: other fields of `Quantize`: `method="gptq"`, `group=64`, `calibration=…`.

    Returns:
        The weights on their grids: `deepseek.save(model, folder, quantized=…)` writes them.

    Raises:
        ConfigError: a setting is none that can be, or the model cannot be quantized.
    """
    stage = Quantize.usual(bits, **settings)
    with tempfile.TemporaryDirectory(prefix="deepseek-quantize-") as folder:
        place = Path(folder)
        work = Work(model=model, start=place, folder=place, seed=seed, report=report)
        apply(stage, work)
    if isinstance(model, Decoder):
        model.grids = {name: weight.grid() for name, weight in work.quantized.items()}
    return Quantized(weights=work.quantized)
