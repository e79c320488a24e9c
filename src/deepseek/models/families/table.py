"""The families as a table, and the translation of their configs and names. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from deepseek.errors import ConfigError, FormatError, describe
from deepseek.models.config import DecoderConfig, EncoderConfig
from deepseek.models.families.base import Family
from deepseek.models.families.bert import BERT
from deepseek.models.families.decoders import LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE
from deepseek.models.families.deepseek_v3 import DEEPSEEK_V3
from deepseek.models.families.own import OWN

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, DEEPSEEK_V3, BERT, OWN)
}


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
    has_classifier = isinstance(config, EncoderConfig) and config.labels
    architecture = family.classifier if has_classifier else family.architecture
    header = {"model_type": family.model_type, "architectures": [architecture]}
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


def our_name(config: DecoderConfig | EncoderConfig, name: str) -> str | None:
    """Return our name of a checkpoint's weight; None for one that the model does not use."""
    family = FAMILIES[config.family]
    for pattern, replacement in family.renames:
        name = re.sub(pattern, replacement, name)
    if any(re.search(pattern, name) for pattern in family.ignored):
        return None
    if config.family == DEEPSEEK_V3.model_type and _is_prediction_layer(name, config.num_layers):
        return None
    return name


def their_name(config: DecoderConfig | EncoderConfig, name: str) -> str:
    """Return the name that a weight of ours has in a checkpoint that this package writes."""
    has_classifier = isinstance(config, EncoderConfig) and config.labels
    if not has_classifier or name.startswith("classifier."):
        return name
    return FAMILIES[config.family].body + name


def _is_prediction_layer(name: str, num_layers: int) -> bool:
    """Return whether a weight belongs to multi-token prediction, whose layers follow the others."""
    match = re.match(r"^model\.layers\.(\d+)\.", name)
    return match is not None and int(match[1]) >= num_layers
