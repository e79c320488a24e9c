"""What torchao, NNCF and llm-compressor make of a decoder's weights, as models of transformers.

They are imported when they are asked for, and need not be there: `README.md` says how to install
them. What they leave in floats by default, embedding and head, is rounded to eight bits a row here,
so that all are of one size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepseek.compress.calibration import Batch
from deepseek.compress.quantize.grid import Grid, round_weight
from deepseek.errors import BackendError, describe

_GROUP = 32
_MODULES = {"torchao": "torchao", "nncf": "nncf", "llm-compressor": "llmcompressor"}
_HEADS = ("model.embed_tokens.weight", "lm_head.weight")


@dataclasses.dataclass(frozen=True)
class OtherModel:
    """What one of them made."""

    name: str
    log_chances: Callable[[Tensor], Tensor]
    """The logarithms of its chances of each next token of a window [T]: [T, vocab]."""
    num_bytes: int
    """Of all weights: codes, scales in float16 and zero points."""


def check_installed(names: Sequence[str]) -> None:
    """Raise a BackendError unless the programs of some kinds can be imported."""
    for name in names:
        module = next(module for start, module in _MODULES.items() if name.startswith(start))
        try:
            importlib.import_module(module)
        except ImportError as error:
            must, step = "installed, with what it needs", "See benchmarks/peers/README.md"
            raise BackendError(describe(name, "--others", must, error, step)) from error


def quantized(name: str, folder: Path, samples: Sequence[Batch]) -> OtherModel:
    """Return a model in float32 as one of `KINDS` has rounded it.

    Args:
        name: of the kind.
        folder: the model, as transformers reads it.
        samples: what those learn from that learn.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    bits, per_group, make = KINDS[name]
    num_bytes = sum(
        _bytes(each, 8 if place in _HEADS else bits, place not in _HEADS and bits == 4, per_group)
        for place, each in model.named_parameters()
        if each.dim() == 2
    )
    rows = [row for batch in samples for row in batch.input_ids]
    with contextlib.redirect_stdout(sys.stderr):  # they talk
        made = make(model, rows)

    def log_chances(window: Tensor) -> Tensor:
        with torch.no_grad():
            return made(input_ids=window[None]).logits[0].float().log_softmax(-1)

    return OtherModel(name, log_chances, num_bytes)


def _bytes(weight: Tensor, bits: int, in_groups: bool, per_group: float) -> int:
    rows, width = weight.shape
    groups = rows * (width // _GROUP if in_groups else 1)
    return rows * width * bits // 8 + int(groups * (per_group if in_groups else 2))


def _round_heads(model: Any) -> None:
    head = model.get_output_embeddings().weight
    head.data.copy_(round_weight(head.data, Grid(8, None, True)).values())


def _is_inner(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def _torchao(bits: int) -> Callable[[Any, Sequence[Tensor]], Any]:
    def make(model: Any, rows: Sequence[Tensor]) -> Any:
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerAxis, PerGroup
        from torchao.quantization.quant_primitives import MappingType

        config = IntxWeightOnlyConfig(
            weight_dtype=torch.int8 if bits == 8 else torch.int4,
            granularity=PerAxis(0) if bits == 8 else PerGroup(_GROUP),
            mapping_type=MappingType.SYMMETRIC if bits == 8 else MappingType.ASYMMETRIC,
        )
        _round_heads(model)
        quantize_(model, config, filter_fn=_is_inner)
        return model

    return make


def _nncf(bits: int) -> Callable[[Any, Sequence[Tensor]], Any]:
    def make(model: Any, rows: Sequence[Tensor]) -> Any:
        import nncf

        samples = [{"input_ids": row[None]} for row in rows]
        if bits == 8:
            example = nncf.Dataset(samples[:1])
            mode = nncf.CompressWeightsMode.INT8_SYM
            return nncf.compress_weights(model, mode=mode, dataset=example)
        return nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT4_ASYM,
            group_size=_GROUP,
            ratio=1.0,
            dataset=nncf.Dataset(samples),
            subset_size=len(samples),
            awq=True,
            scale_estimation=True,
        )

    return make


def _llm_compressor(method: str) -> Callable[[Any, Sequence[Tensor]], Any]:
    def make(model: Any, rows: Sequence[Tensor]) -> Any:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.awq import AWQModifier
        from llmcompressor.modifiers.quantization import GPTQModifier

        _round_heads(model)
        weights = QuantizationArgs(
            num_bits=4, type="int", symmetric=False, strategy="group", group_size=_GROUP
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        modifier = {"gptq": GPTQModifier, "awq": AWQModifier}[method]
        recipe = modifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
        ids = [row.tolist() for row in rows]
        data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(x) for x in ids]})
        oneshot(
            model=model,
            dataset=data,
            recipe=recipe,
            max_seq_length=max(map(len, ids)),
            num_calibration_samples=len(ids),
        )
        return model

    return make


KINDS: dict[str, tuple[int, float, Callable[[Any, Sequence[Tensor]], Any]]] = {
    "torchao-int8": (8, 2, _torchao(8)),
    "nncf-int8": (8, 2, _nncf(8)),
    "torchao-int4": (4, 2.5, _torchao(4)),
    "nncf-int4": (4, 2.5, _nncf(4)),
    "llm-compressor-awq-int4": (4, 2.5, _llm_compressor("awq")),
    "llm-compressor-gptq-int4": (4, 2.5, _llm_compressor("gptq")),
}
"""Bits of the layers, bytes of a group's scale and zero point, and what rounds. int8: a scale a
row; int4: groups of 32 with zero points. NNCF: AWQ and its own estimate of scales."""
