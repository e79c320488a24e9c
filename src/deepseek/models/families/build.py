"""From a config and a checkpoint's weights to our model, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from deepseek.errors import FormatError, describe
from deepseek.models.config import DecoderConfig, EncoderConfig
from deepseek.models.decoder import Decoder
from deepseek.models.encoder import Encoder
from deepseek.models.families.own import OWN
from deepseek.models.families.table import our_name, their_name

_EXPERT = re.compile(
    r"^(?P<prefix>.*\.mlp\.experts)\.(?P<index>\d+)\.(?P<part>gate|up|down)_proj\.weight$"
)
_STACKED = re.compile(r"^(?P<prefix>.*\.mlp\.experts)\.(?P<part>gate_up|down)_proj$")


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
    state: dict[str, Tensor] = {}
    single: dict[str, dict[str, dict[int, Tensor]]] = {}
    for theirs, tensor in tensors.items():
        name = our_name(config, theirs)
        if name is None:
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
    config: DecoderConfig | EncoderConfig,
    state: Mapping[str, Tensor],
    *,
    one_by_one: bool = False,
) -> dict[str, Tensor]:
    """Return a model's state as the family's checkpoint has it, the tied head left out.

    Other families' checkpoints have one tensor per expert; our own keeps them stacked, unless
    `one_by_one` is set: both are read.
    """
    written: dict[str, Tensor] = {}
    tied = isinstance(config, DecoderConfig) and config.tie_embeddings
    for name, tensor in state.items():
        is_kept = config.family == OWN.model_type and not one_by_one
        match = None if is_kept else _STACKED.match(name)
        if match is None:
            if not (tied and name == "lm_head.weight"):
                written[their_name(config, name)] = tensor
        elif match["part"] == "gate_up":
            for index, both in enumerate(tensor):
                gate, up = both.chunk(2)
                written[f"{match['prefix']}.{index}.gate_proj.weight"] = gate.contiguous()
                written[f"{match['prefix']}.{index}.up_proj.weight"] = up.contiguous()
        else:
            for index, down in enumerate(tensor):
                written[f"{match['prefix']}.{index}.down_proj.weight"] = down.contiguous()
    return written
