"""The files by which sentence-transformers says how an encoder's states become one vector."""

from __future__ import annotations

import json
from pathlib import Path

from deepseek.errors import FormatError, describe
from deepseek.hub.bundle import read_json
from deepseek.models import EncoderConfig

_MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}
_PACKAGE = "sentence_transformers.models"


def with_pooling(config: EncoderConfig, folder: Path) -> EncoderConfig:
    """Return the config with the pooling, normalization and text length that a folder states.

    A folder without these files leaves the config as it is.

    Raises:
        FormatError: a pooling this package does not compute.
    """
    modules = folder / "modules.json"
    if not modules.is_file():
        return config
    pooling = read_json(folder / "1_Pooling" / "config.json")
    chosen = [mode for mode, is_on in pooling.items() if mode in _all_modes(pooling) and is_on]
    if len(chosen) != 1 or chosen[0] not in _MODES:
        must = f"one of {', '.join(_MODES)}"
        raise FormatError(describe("pooling mode", str(folder / "1_Pooling"), must, chosen))
    length = folder / "sentence_bert_config.json"
    limit = read_json(length).get("max_seq_length") if length.is_file() else None
    return config.replace(
        pooling=_MODES[chosen[0]],
        normalize=f"{_PACKAGE}.Normalize" in modules.read_text(encoding="utf-8"),
        max_embed_tokens=limit if isinstance(limit, int) else None,
    )


def write_pooling(config: EncoderConfig, folder: Path) -> None:
    """Write the files that `with_pooling` reads, as sentence-transformers has them."""
    steps = ["Transformer", "Pooling"] + (["Normalize"] if config.normalize else [])
    modules = [
        {
            "idx": place,
            "name": str(place),
            "path": "" if place == 0 else f"{place}_{step}",
            "type": f"{_PACKAGE}.{step}",
        }
        for place, step in enumerate(steps)
    ]
    pooling: dict[str, object] = {"word_embedding_dimension": config.hidden_size}
    pooling |= {mode: name == config.pooling for mode, name in _MODES.items()}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    _write(folder / "modules.json", modules)
    _write(folder / "1_Pooling" / "config.json", pooling)
    limit = config.max_embed_tokens or config.max_positions
    _write(folder / "sentence_bert_config.json", {"max_seq_length": limit})


def _all_modes(pooling: dict[str, object]) -> list[str]:
    return [name for name in pooling if name.startswith("pooling_mode_")]


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
