"""Saves a model as a bundle that `transformers` loads too: all of it or nothing, with the hash of
every file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from deepseek.data import Tokenizer
from deepseek.errors import ConfigError, FormatError, describe
from deepseek.hub.atomic import files_in, recover, replace_folder
from deepseek.hub.bundle import Bundle, card_bytes, make_card, read_json
from deepseek.hub.quantized import quantized_tensors
from deepseek.hub.safetensors import MAX_SHARD_BYTES, write_tensors
from deepseek.hub.sentence import write_pooling
from deepseek.hub.store import CARD, safe_name
from deepseek.models import Decoder, Encoder, EncoderConfig, RoutedPlanner
from deepseek.models.families import config_to_hf, state_to_hf, their_name
from deepseek.ops.quantized import QuantizedWeight
from deepseek.ops.scheme import KVStorage
from deepseek.records import BundleCard, FileRecord, Measurement, Parent, StageRecord

COMPANIONS = (
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Normalize/config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "sentence_bert_config.json",
    "vocab.txt",
)
"""Files of a folder that other libraries need and that do not change with the weights."""

_MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", CARD)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What a card says beyond the files."""

    name: str
    summary: str = ""
    license: str = ""
    stage: StageRecord | None = None
    parents: Sequence[Parent] = ()
    measurements: Sequence[Measurement] = ()
    attention: Mapping[str, Any] | None = None
    kv: KVStorage | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantized:
    """Weights that `save` writes as they lie on their grids.

    What transformers 5.23 with compressed-tensors 0.20 reads of it: symmetric linear weights on any
    grids, as it is; weights that all have one grid, embedding, tied head and zero points included,
    with `quantization_config=CompressedTensorsConfig(dequantize=True)`. It fails on others (an
    embedding beside other grids; zero points beside other grids): `deepseek.load` and
    `deepseek.save` make a folder of plain numbers for it. vLLM takes linear weights alone.
    """

    weights: Mapping[str, QuantizedWeight]
    """By the model's own names of parameters; of stacked experts one by one
    (`…experts.3.down_proj.weight`)."""
    kv: KVStorage | None = None
    """How keys and values are to be cached; it goes on the card, as no layout can say it."""
    layout: Literal["compressed-tensors", "gptq"] = "compressed-tensors"
    """gptq takes linear weights of one grid alone."""


def save(
    model: Decoder | Encoder,
    folder: str | Path,
    *,
    name: str | None = None,
    stage: StageRecord | None = None,
    parents: Sequence[Parent] = (),
    measurements: Sequence[Measurement] = (),
    summary: str = "",
    license: str = "",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    quantized: Quantized | None = None,
) -> Bundle:
    """Write a model into a folder as a bundle and return it.

    Whatever happens on the way, the folder holds the old model or the new one, whole. Files of
    yours in it stay.

    Args:
        model: its weights, config, tokenizer and, where it has one, the bundle it came from are
            written or recorded; that its attention is routed, and how, goes on the card.
        folder: a new or empty folder, or one that holds a model, which is replaced.
        name: what the bundle is called; the folder's name unless given.
        stage: what was done to make it, with which settings.
        parents: what it was made from; the bundle the model was loaded from unless given.
        measurements: what was observed of it.
        summary, license: for the card; the parent's licence unless given.
        max_shard_bytes: largest size of a weight file.
        quantized: weights to be written on their grids in place of the model's numbers; all other
            numbers are then written in the shortest dtype that holds them.

    Raises:
        ConfigError: a quantized weight is none of the model's, has another shape or does not fit
            the layout, or the folder holds something that is no model, or cannot be written to.
        CapacityError: the disk is full; the folder is as it was.
    """
    if max_shard_bytes < 1:
        raise ConfigError(describe("max_shard_bytes", "save", "at least 1", max_shard_bytes))
    origin = model.bundle if isinstance(model.bundle, Bundle) else None
    if origin is not None:
        parents = parents or (Parent(name=origin.card.name, content_hash=origin.content_hash),)
        license = license or origin.card.license
    about = About(
        name=name or safe_name(Path(folder).resolve().name),
        summary=summary,
        license=license,
        stage=stage,
        parents=parents,
        measurements=measurements,
        attention=_attention(model),
        kv=None if quantized is None else quantized.kv,
    )
    config = config_to_hf(model.config) | {"dtype": str(_dtype(model)).removeprefix("torch.")}
    state = _state(model)
    tensors: Mapping[str, Tensor] = state_to_hf(
        model.config, state, one_by_one=quantized is not None
    )
    pairs: Iterable[tuple[str, Tensor]] = tensors.items()
    if quantized is not None and quantized.weights:
        weights = {
            their_name(model.config, name): weight for name, weight in quantized.weights.items()
        }
        settings, pairs = quantized_tensors(tensors, weights, quantized.layout)
        config |= {"quantization_config": settings}

    def write(fresh: Path) -> dict[str, FileRecord]:
        write_settings(fresh, config, model.tokenizer, _generation(model, config))
        if isinstance(model.config, EncoderConfig):
            write_pooling(model.config, fresh)
        if origin is not None:
            _copy_companions(origin, fresh, has_other_tokens=_has_other_tokens(model, origin))
        return write_tensors(fresh, pairs, max_shard_bytes)

    return write_bundle(Path(folder), write, about)


def write_bundle(
    folder: Path, write: Callable[[Path], Mapping[str, FileRecord]], about: About
) -> Bundle:
    """Make or replace a bundle: `write` fills a fresh folder, the card is made, and the two folders
    change places.

    Args:
        folder: as in `save`.
        write: writes all files but the card into the folder it is given, and returns the hashes it
            knows already.
        about: the rest of the card.

    Raises:
        ConfigError: the folder holds something that is no model, or cannot be written to.
        CapacityError: the disk is full; the folder is as it was.
    """
    ours = _files_of_ours(folder)
    with replace_folder(
        folder, keep=lambda item: item not in ours and not _is_weights(item)
    ) as fresh:
        known = write(fresh)
        fields = {field.name: getattr(about, field.name) for field in dataclasses.fields(about)}
        card: BundleCard = make_card(fresh, known, **fields)
        (fresh / CARD).write_bytes(card_bytes(card))
    return Bundle(folder, card, has_card=True)


def write_settings(
    folder: Path,
    config: Mapping[str, object],
    tokenizer: Tokenizer | None,
    generation: Mapping[str, object],
) -> None:
    """Write everything but weights: `config.json`, the tokenizer's files and
    `generation_config.json`.
    """
    _write_json(folder / "config.json", config)
    if generation:
        _write_json(folder / "generation_config.json", generation)
    if tokenizer is not None:
        tokenizer.save(folder)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _dtype(model: Decoder | Encoder) -> torch.dtype:
    return next(value.dtype for value in model.parameters() if value.is_floating_point())


def _state(model: Decoder | Encoder) -> dict[str, Tensor]:
    state = model.state_dict()
    strangers = [name for name, value in state.items() if value.is_meta]
    if strangers:
        raise ConfigError(describe("model", "save", "allocated", f"{strangers[0]} on meta"))
    return state


def _attention(model: Decoder | Encoder) -> dict[str, Any] | None:
    """Return what the card records of how a model's layers choose the blocks that they see."""
    planner = model.planner if isinstance(model, Decoder) else None
    return planner.routing.to_dict() if isinstance(planner, RoutedPlanner) else None


def _generation(model: Decoder | Encoder, config: Mapping[str, object]) -> dict[str, object]:
    """Return generation settings: those the model came with, and the ids its tokenizer or config
    names.
    """
    if not isinstance(model, Decoder):
        return {}
    settings: dict[str, object] = {}
    if isinstance(model.bundle, Bundle):
        with contextlib.suppress(FormatError):
            settings = dict(read_json(model.bundle.path / "generation_config.json"))
        if _has_other_tokens(model, model.bundle):
            settings = {key: settings[key] for key in settings if not key.endswith(_OF_TOKENS)}
    ids = {
        key: config[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if config.get(key) is not None
    }
    if model.tokenizer is not None:
        ends = list(model.tokenizer.eos_token_ids)
        named = {
            "bos_token_id": model.tokenizer.bos_token_id,
            "eos_token_id": (ends if len(ends) > 1 else ends[0]) if ends else None,
            "pad_token_id": model.tokenizer.pad_token_id,
        }
        ids |= {key: value for key, value in named.items() if value is not None}
    return ids | settings


_OF_TOKENS = ("_token_id", "suppress_tokens", "_ids")
"""Ends of generation settings that name tokens by their numbers."""


def _has_other_tokens(model: Decoder | Encoder, origin: Bundle) -> bool:
    """Tell whether a number stands for another token than in the bundle a model came from."""
    return origin.config.get("vocab_size") != model.config.vocab_size


def _copy_companions(origin: Bundle, fresh: Path, *, has_other_tokens: bool) -> None:
    source = origin.path
    for name in COMPANIONS:
        if has_other_tokens and name == "vocab.txt":
            continue
        if (source / name).is_file() and not (fresh / name).exists():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, fresh / name)


def _files_of_ours(folder: Path) -> set[str]:
    """Return the files of a folder that the new bundle replaces; refuse a folder that is not ours
    to replace.
    """
    recover(folder)
    if not folder.exists():
        return set()
    step = "Choose a new folder, or empty this one"
    if not folder.is_dir():
        raise ConfigError(describe("folder", "save", "a folder", f"the file {folder}", step))
    names = list(_first(files_in(folder), 1))
    if not names and not any(folder.iterdir()):
        return set()
    ours = {*_MODEL_FILES, *_TOKENIZER_FILES}
    if (folder / CARD).is_file():
        with contextlib.suppress(FormatError):
            return ours | set(BundleCard.from_dict(read_json(folder / CARD)).files)
        return ours
    config: Mapping[str, object] = {}
    with contextlib.suppress(FormatError):
        config = read_json(folder / "config.json")
    if "model_type" not in config:
        got = f"{folder}, which holds other files"
        raise ConfigError(describe("folder", "save", "new, empty or a model folder", got, step))
    return ours


def _first(names: Iterable[str], count: int) -> Iterator[str]:
    for _, name in zip(range(count), names, strict=False):
        yield name


def _is_weights(name: str) -> bool:
    return (
        "/" not in name
        and name.startswith("model")
        and name.endswith((".safetensors", ".safetensors.index.json"))
    )
