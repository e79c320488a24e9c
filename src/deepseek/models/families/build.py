"""From a Hugging Face config and its weights to our model, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek.errors import ConfigError, FormatError, describe
from deepseek.models.config import DecoderConfig, EncoderConfig
from deepseek.models.decoder import Decoder
from deepseek.models.encoder import Encoder
from deepseek.models.families.base import Family
from deepseek.models.families.bert import BERT
from deepseek.models.families.decoders import LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE
from deepseek.models.families.deepseek_v3 import DEEPSEEK_V3
from deepseek.models.families.own import OWN

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, DEEPSEEK_V3, BERT, OWN)
}
_EXPERT = re.compile(
    r"^(?P<prefix>.*\.mlp\.experts)\.(?P<index>\d+)\.(?P<part>gate|up|down)_proj\.weight$"
)
_STACKED = re.compile(r"^(?P<prefix>.*\.mlp\.experts)\.(?P<part>gate_up|down)_proj$")


def known_families() -> tuple[str, ...]:
    """Return every `model_type` that can be loaded."""
    return tuple(sorted(FAMILIES))


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig | EncoderConfig:
    """Return our config of a `config.json`.

    Raises:
        FormatError: an unknown family, or a setting this package does not compute.
    """
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        must = f"one of {', '.join(known_families())}"
        raise FormatError(describe("model_type", "config.json", must, kind))
    try:
        return FAMILIES[kind].read(hf)
    except (TypeError, ConfigError, KeyError, ZeroDivisionError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        must = f"a whole {kind} config"
        raise FormatError(describe("content", "config.json", must, str(error))) from error


def config_to_hf(config: DecoderConfig | EncoderConfig) -> dict[str, Any]:
    """Return the `config.json` of a config, which `transformers` reads; the inverse of
    `config_from_hf`.

    Raises:
        FormatError: the config's family cannot express it; use the family `deepseek_stack`, which
            can.
    """
    family = FAMILIES[config.family]
    if isinstance(config, DecoderConfig) and config.family != OWN.model_type:
        _check_expressible(config, family)
    header = {"model_type": family.model_type, "architectures": [family.architecture]}
    return header | family.write(config)


def _check_expressible(config: DecoderConfig, family: Family) -> None:
    back = family.read({"model_type": family.model_type} | family.write(config))
    if back == config:
        return
    ours, theirs = config.to_dict(), back.to_dict()
    lost = [name for name in ours if ours[name] != theirs[name]]
    step = f"Use family={OWN.model_type!r}, or another value of {', '.join(lost)}"
    must = f"one that {family.model_type} can express"
    raise FormatError(describe("config", "a bundle", must, {n: ours[n] for n in lost}, step))


def build_model(config: DecoderConfig | EncoderConfig) -> Decoder | Encoder:
    """Return the model of a config on the default device, freshly initialized (nothing is allocated
    on `meta`)."""
    return Encoder(config) if isinstance(config, EncoderConfig) else Decoder(config)


def state_from_hf(
    config: DecoderConfig | EncoderConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return a checkpoint's tensors under our names and in our layouts; the tied head is left out.

    Weights of one expert each are stacked, which copies them; all else is passed on as it is.

    Raises:
        FormatError: experts that are not numbered without a gap.
    """
    family = FAMILIES[config.family]
    state: dict[str, Tensor] = {}
    single: dict[str, dict[str, dict[int, Tensor]]] = {}
    for name, tensor in tensors.items():
        for pattern, replacement in family.renames:
            name = re.sub(pattern, replacement, name)
        if any(re.search(pattern, name) for pattern in family.ignored):
            continue
        if config.family == DEEPSEEK_V3.model_type and _is_prediction_layer(
            name, config.num_layers
        ):
            continue
        match = _EXPERT.match(name)
        if match is None:
            state[name] = tensor
        else:
            parts = single.setdefault(match["prefix"], {})
            parts.setdefault(match["part"], {})[int(match["index"])] = tensor
    for prefix, parts in single.items():
        state.update(_stack(prefix, parts))
    if isinstance(config, DecoderConfig) and config.tie_embeddings:
        state.pop("lm_head.weight", None)
    return state


def _is_prediction_layer(name: str, num_layers: int) -> bool:
    """Return whether a weight belongs to multi-token prediction, whose layers follow the others."""
    match = re.match(r"^model\.layers\.(\d+)\.", name)
    return match is not None and int(match[1]) >= num_layers


def _stack(prefix: str, parts: dict[str, dict[int, Tensor]]) -> dict[str, Tensor]:
    count = max(len(experts) for experts in parts.values())
    for part in ("gate", "up", "down"):
        numbers = sorted(parts.get(part, {}))
        if numbers != list(range(count)):
            missing = sorted(set(range(count)) - set(numbers))[:5]
            must = f"there for every expert 0 … {count - 1}"
            name = f"{prefix}.N.{part}_proj.weight"
            raise FormatError(describe(name, "a checkpoint", must, f"none for experts {missing}"))
    order = range(count)
    gate_up = [torch.cat((parts["gate"][index], parts["up"][index])) for index in order]
    return {
        f"{prefix}.gate_up_proj": torch.stack(gate_up),
        f"{prefix}.down_proj": torch.stack([parts["down"][index] for index in order]),
    }


def state_to_hf(
    config: DecoderConfig | EncoderConfig, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return a model's state as the family's checkpoint has it, the tied head left out.

    Other families' checkpoints have one tensor per expert; our own keeps them stacked.
    """
    written: dict[str, Tensor] = {}
    tied = isinstance(config, DecoderConfig) and config.tie_embeddings
    for name, tensor in state.items():
        match = None if config.family == OWN.model_type else _STACKED.match(name)
        if match is None:
            if not (tied and name == "lm_head.weight"):
                written[name] = tensor
        elif match["part"] == "gate_up":
            for index, both in enumerate(tensor):
                gate, up = both.chunk(2)
                written[f"{match['prefix']}.{index}.gate_proj.weight"] = gate.contiguous()
                written[f"{match['prefix']}.{index}.up_proj.weight"] = up.contiguous()
        else:
            for index, down in enumerate(tensor):
                written[f"{match['prefix']}.{index}.down_proj.weight"] = down.contiguous()
    return written
