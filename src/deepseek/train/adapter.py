"""Low-rank adapters in a model: put in, merged, and written for PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from deepseek.errors import ConfigError, describe, missing_extra
from deepseek.hub import Bundle
from deepseek.models import Decoder
from deepseek.ops.linear import FrozenLinear, Linear
from deepseek.train.config import ALL_LINEAR, LowRank

if TYPE_CHECKING:
    from peft import LoraConfig

TRAINED = ("*.lora_*",)
"""Patterns of the names of what is trained."""


def insert_adapter(model: Decoder, config: LowRank, seed: int) -> None:
    """Put adapters into a model, in place; they change nothing until they are trained.

    With an int4 base the matrices of all layers, and not the head, are kept in four bits.

    Args:
        model: in float32.
        config: of the adapters.
        seed: of their first weights.

    Raises:
        ConfigError: no layer has such a name.
        MissingExtra: PEFT is not installed.
    """
    try:
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise missing_extra("peft", "transformers", "to train adapters") from error
    config = config.replace(targets=_resolved(model, config))
    if config.base == "int4":
        _replace(model.model.layers, Linear, FrozenLinear)
    torch.manual_seed(seed)
    inject_adapter_in_model(_peft_config(config), model)


def merge_adapter(model: Decoder) -> None:
    """Add what adapters have learned to the matrices they stand beside, and take them out."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                base = _widened(child.get_base_layer())
                child.base_layer = base
                child.merge()
                setattr(parent, name, base)
    _replace(model.model.layers, FrozenLinear, _widened)
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        if hasattr(model, attribute):
            delattr(model, attribute)


def save_adapter(model: Decoder, config: LowRank, folder: Path) -> None:
    """Write the adapters of a model as PEFT reads them (`PeftModel.from_pretrained`)."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name="default")
    named = {f"base_model.model.{name}": value.contiguous() for name, value in state.items()}
    save_file(named, str(folder / "adapter_model.safetensors"))
    origin = model.bundle.path if isinstance(model.bundle, Bundle) else None
    written = _peft_config(config.replace(targets=_adapted(model)))
    written.base_model_name_or_path = None if origin is None else str(origin)
    written.inference_mode = True
    facts = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in written.to_dict().items()
    }
    (folder / "adapter_config.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


def _adapted(model: Decoder) -> tuple[str, ...]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    return tuple(sorted(found))


def frozen_bytes(model: Decoder) -> int:
    """Return the bytes of all weights that are not trained."""
    found = sum(each.nbytes for each in model.parameters() if not each.requires_grad)
    return found + sum(each.num_bytes for each in model.modules() if isinstance(each, FrozenLinear))


def _peft_config(config: LowRank) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        task_type="CAUSAL_LM",
    )


def _resolved(model: Decoder, config: LowRank) -> tuple[str, ...]:
    """Return the names of the layers that are adapted."""
    layers = {
        name.rpartition(".")[2]
        for name, module in model.model.layers.named_modules()
        if isinstance(module, nn.Linear)
    }
    if config.targets == (ALL_LINEAR,):
        return tuple(sorted(layers))
    for target in config.targets:
        if target not in layers:
            step = f"There are {', '.join(sorted(layers))}, and {ALL_LINEAR} for all of them"
            raise ConfigError(describe("targets", "the adapter", "names of layers", target, step))
    return config.targets


def _replace(inside: nn.Module, kind: type[nn.Module], make: object) -> None:
    assert callable(make)
    for parent in list(inside.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is kind:
                setattr(parent, name, make(child))


def _widened(layer: nn.Module) -> nn.Module:
    """Return a layer whose weight can be added to."""
    if not isinstance(layer, FrozenLinear):
        return layer
    wide = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    wide.weight = nn.Parameter(layer.weight)
    if layer.bias is not None:
        wide.bias = layer.bias
    return wide
