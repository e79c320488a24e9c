"""Writes a decoder as a GGUF file, which llama.cpp and what stands on it run.

A weight on a grid keeps its numbers: four bits as Q4_0 where the grid is symmetric and as Q4_1
where it is not, eight bits as Q8_0. Their blocks of 32 take any group that is a multiple of 32 with
its scale repeated. Nothing is rounded again: a weight on another grid, and every weight on none, is
written in a floating-point type.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deepseek.errors import ConfigError, describe
from deepseek.export.formats import Exported
from deepseek.generate.modules import grids_kept
from deepseek.hub import Bundle
from deepseek.hub import load as load_bundle
from deepseek.hub.gguf_model import ROPE_FACTORS, gguf_name, llama3_divisors, permuted_rows
from deepseek.hub.gguf_tokenizer import pre_tokenizer_name
from deepseek.models import Decoder
from deepseek.models.config import DecoderConfig
from deepseek.models.families import state_to_hf
from deepseek.ops.grid import OFFSET, Bytes, GridSource, why_not_exact

if TYPE_CHECKING:
    import gguf

    from deepseek.data import Tokenizer

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""`general.architecture` of a family."""
FloatType = Literal["F32", "F16", "BF16"]
_BLOCK = 32
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
"""`general.file_type`. Source: llama.h, llama_ftype."""
_CONTROL, _USER_DEFINED, _UNUSED, _NORMAL = 3, 4, 5, 1


class _Stored(NamedTuple):
    """A tensor as the file holds it."""

    kind: str
    data: npt.NDArray[np.generic]
    """float32, or bytes [rows, bytes of a row]."""


def write_gguf(
    source: Bundle | Decoder | str | Path,
    path: str | Path,
    *,
    floats: FloatType | None = None,
) -> dict[str, str]:
    """Write a decoder as a GGUF file and return the type of each of its tensors.

    The file is there whole or not at all.

    Args:
        source: a bundle, its folder or name, or a decoder; of a decoder that was loaded, weights
            that still have the numbers of their folder keep its grids.
        path: of the file to be made; one that is there is replaced.
        floats: type of the matrices that are on no grid; None for the model's own dtype. Vectors
            are always float32, as llama.cpp wants them.

    Raises:
        ConfigError: a model that GGUF has no architecture for, or a tokenizer that it cannot name.
        FormatError: a folder that is not a whole model.
    """
    import gguf

    model = source if isinstance(source, Decoder) else _load(source)
    config, kind = model.config, floats or _float_type(model)
    _check(config)
    path = Path(path)
    fresh = path.with_name(f".{path.name}.part")
    writer = gguf.GGUFWriter(fresh, ARCHITECTURES[config.family])
    types = {}
    try:
        for name, stored in _tensors(model, kind):
            raw = None if stored.kind == "F32" else gguf.GGMLQuantizationType[stored.kind]
            writer.add_tensor(name, stored.data, raw_dtype=raw)
            types[name] = stored.kind
        matrices = [types[name] for name in types if name.endswith("weight") and "norm" not in name]
        usual = max(matrices, key=matrices.count)
        _add_config(writer, config, usual)
        if model.tokenizer is not None:
            _add_tokenizer(writer, model.tokenizer, config.vocab_size)
        if isinstance(model.bundle, Bundle):
            writer.add_name(model.bundle.card.name)
            if model.bundle.card.license:
                writer.add_license(model.bundle.card.license)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    return types


def write(bundle: Bundle, folder: Path, *, floats: FloatType | None = None) -> Exported:
    """Write a bundle as `model.gguf` in a folder; options as in `write_gguf`. Is a `Format`'s
    writer."""
    path = folder / "model.gguf"
    types = Counter(write_gguf(bundle, path, floats=floats).values())
    held = ", ".join(f"{kind} ({count})" for kind, count in types.most_common())
    return Exported("gguf", folder, (path,), (f"types of the tensors: {held}",))


def _load(source: Bundle | str | Path) -> Decoder:
    model = load_bundle(source.path if isinstance(source, Bundle) else source)
    if not isinstance(model, Decoder):
        raise ConfigError(describe("source", "write_gguf", "a decoder", type(model).__name__))
    return model


def _float_type(model: Decoder) -> FloatType:
    types: dict[torch.dtype, FloatType] = {torch.float16: "F16", torch.bfloat16: "BF16"}
    return types.get(model.dtype, "F32")


def _check(config: DecoderConfig) -> None:
    """Raise a ConfigError for what llama.cpp would not compute as the model does."""
    faults = {
        "family": config.family if config.family not in ARCHITECTURES else None,
        "experts": config.experts,
        "latent attention": config.latent,
        "window": config.window,
        "gates": config.gates,
        "pattern": config.pattern,
        "rope scaling": "dynamic" if config.rope.scaling == "dynamic" else None,
    }
    for name, value in faults.items():
        if value is not None:
            must = f"a plain decoder of {', '.join(ARCHITECTURES)}"
            raise ConfigError(describe("model", "GGUF", must, f"{name} {value}"))


def _tensors(model: Decoder, kind: FloatType) -> Iterator[tuple[str, _Stored]]:
    config, grids = model.config, grids_kept(model)
    if config.rope.scaling == "llama3":
        yield ROPE_FACTORS, _Stored("F32", _llama3_divisors(config))
    for name, value in state_to_hf(config, model.state_dict()).items():
        order = _row_order(config, name, value.shape[0])
        stored = _of_grid(grids[name], order) if name in grids else None
        yield gguf_name(name), stored or _of_floats(value[torch.from_numpy(order)], kind)


def _row_order(config: DecoderConfig, name: str, rows: int) -> npt.NDArray[np.int64]:
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
    if heads is None or ARCHITECTURES[config.family] != "llama":
        return np.arange(rows)
    return permuted_rows(rows, heads)


def _llama3_divisors(config: DecoderConfig) -> npt.NDArray[np.float32]:
    rope = config.rope
    original = rope.original_max_positions or config.max_positions
    found = llama3_divisors(
        rope.theta,
        config.head_dim,
        rope.factor,
        rope.low_freq_factor,
        rope.high_freq_factor,
        original,
    )
    return found.astype(np.float32)


def _of_floats(value: Tensor, kind: FloatType) -> _Stored:
    """Return a weight in a floating-point type; a vector always in float32."""
    if kind == "F32" or value.dim() < 2:
        return _Stored("F32", np.ascontiguousarray(value.detach().float().numpy()))
    narrow = value.detach().to(torch.float16 if kind == "F16" else torch.bfloat16).contiguous()
    return _Stored(kind, narrow.view(torch.uint8).numpy())


def _of_grid(source: GridSource, order: npt.NDArray[np.int64]) -> _Stored | None:
    """Return a weight in blocks that hold its numbers, or None where none do."""
    if source.group % _BLOCK or source.is_rotated:
        return None
    grid = source.read()
    if why_not_exact(grid.bits, grid.scale, grid.zero) is not None:
        return None
    repeats = grid.group // _BLOCK
    scale, zero = (np.repeat(part[order], repeats, 1) for part in (grid.scale, grid.zero))
    codes = grid.codes[order].reshape(len(order), -1, _BLOCK)
    parts: list[Bytes] = [_halves(scale)]
    kind = "Q8_0" if grid.bits == 8 else "Q4_0"
    if grid.bits == 8:
        parts.append((codes ^ np.uint8(OFFSET[8])).astype(np.uint8))
    else:
        if (zero != OFFSET[4]).any():
            kind = "Q4_1"
            parts.append(_halves(scale * -zero.astype(np.float32)))
        parts.append((codes[..., :16] | codes[..., 16:] << 4).astype(np.uint8))
    return _Stored(kind, np.concatenate(parts, -1).reshape(len(order), -1))


def _halves(values: npt.NDArray[np.generic]) -> Bytes:
    """Return numbers [N, blocks] as float16, byte by byte [N, blocks, 2]."""
    return values.astype("<f2")[..., None].view(np.uint8)


def _add_config(writer: gguf.GGUFWriter, config: DecoderConfig, usual: str) -> None:
    import gguf

    writer.add_file_type(_FILE_TYPES[usual])
    if usual.startswith("Q"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_rope_dimension_count(config.head_dim)
    if config.rope.scaling in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(config.rope.scaling))
        writer.add_rope_scaling_factor(config.rope.factor)
    if config.rope.scaling == "yarn":
        original = config.rope.original_max_positions or config.max_positions
        writer.add_rope_scaling_orig_ctx_len(original)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Add a byte-level tokenizer; ids that it does not have are unused tokens."""
    import json

    name = pre_tokenizer_name(tokenizer.backend)
    if name is None:
        must = "a byte-level BPE whose cuts GGUF has a name for"
        raise ConfigError(describe("tokenizer", "GGUF", must, "another"))
    content = json.loads(tokenizer.backend.to_str())
    by_id = {index: token for token, index in tokenizer.backend.get_vocab().items()}
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    added = {each["content"]: each["special"] for each in content["added_tokens"]}
    kinds = {True: _CONTROL, False: _USER_DEFINED, None: _NORMAL}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(
        [
            kinds[added.get(token)] if index in by_id else _UNUSED
            for index, token in enumerate(tokens)
        ]
    )
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    _add_special(writer, tokenizer)


def _add_special(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    ids: Mapping[str, int | None] = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "padding": tokenizer.pad_token_id,
        "unknown": tokenizer.unk_token_id,
    }
    for key, index in ids.items():
        if index is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", index)
    example = tokenizer.encode("a")
    writer.add_add_bos_token(bool(example) and example[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(example) and example[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
