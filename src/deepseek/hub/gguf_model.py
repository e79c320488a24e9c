"""Turns a GGUF file into what a Hugging Face folder holds: a config, weights under their HF names,
generation settings.

Names and layouts follow llama.cpp's converter read backwards. Two things there are easy to miss:
for `llama` it reorders the rows of the query and key projections, so that its rotary embedding
turns neighbouring
pairs, and it folds Llama 3's rope scaling into a tensor of divisors, from which the four numbers of
the config are
found again here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from deepseek.errors import ConfigError, FormatError, describe
from deepseek.hub.gguf import GgufFile

if TYPE_CHECKING:
    import torch

ROPE_FACTORS = "rope_freqs.weight"
_IGNORED = re.compile(
    r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight|blk\.\d+\.rope_freqs\.weight"
)

_TOP_NAMES: Mapping[str, str] = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_OUR_TENSOR = re.compile(r"model\.layers\.(\d+)\.([\w.]+)\.(weight|bias)")

# (low frequency factor, high frequency factor, original length) of the published Llama 3 models
_LLAMA3_SCALINGS = ((1.0, 4.0, 8192),)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How one GGUF architecture is written as a Hugging Face model."""

    model_type: str
    class_name: str
    permuted: bool
    """Whether the rows of the query and key projections were reordered."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", permuted=False),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", permuted=False),
}
"""By `general.architecture`. Mistral's files say `llama` and are the same model to us."""


def hf_config(file: GgufFile) -> dict[str, object]:
    """Return the content of `config.json` for the model in a GGUF file.

    Raises:
        FormatError: the architecture is unknown, a value is missing or makes no sense, or the model
            uses something that a config of its family cannot say.
    """
    architecture = _architecture(file)
    prefix = file.text("general.architecture")
    if file.integer(f"{prefix}.expert_count", 0):
        raise _refuse(
            file, "expert_count", "0 (a dense model)", file.integer(f"{prefix}.expert_count")
        )
    hidden, heads = (
        file.integer(f"{prefix}.embedding_length"),
        file.integer(f"{prefix}.attention.head_count"),
    )
    if not heads or not hidden:
        raise _refuse(file, "attention.head_count", "at least 1", heads)
    rotary = file.integer(f"{prefix}.rope.dimension_count", hidden // heads)
    head_dim = file.integer(f"{prefix}.attention.key_length", rotary)
    if rotary != head_dim and f"{prefix}.rope.dimension_count" in file.metadata:
        raise _refuse(file, "rope.dimension_count", f"the size of a head, {head_dim}", rotary)
    value_dim = file.integer(f"{prefix}.attention.value_length", head_dim)
    if value_dim != head_dim:
        raise _refuse(file, "attention.value_length", f"the size of a head, {head_dim}", value_dim)
    kv_heads = file.integer(f"{prefix}.attention.head_count_kv", heads)
    if not 0 < kv_heads <= heads or heads % kv_heads:
        raise _refuse(file, "attention.head_count_kv", f"a divisor of {heads}", kv_heads)
    config: dict[str, object] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": _vocab_size(file),
        "hidden_size": hidden,
        "intermediate_size": file.integer(f"{prefix}.feed_forward_length"),
        "num_hidden_layers": file.integer(f"{prefix}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": file.integer(f"{prefix}.context_length"),
        "rms_norm_eps": file.number(f"{prefix}.attention.layer_norm_rms_epsilon"),
        "rope_theta": file.number(f"{prefix}.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, prefix, head_dim),
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **token_ids(file),
    }
    if prefix == "llama":
        config |= {
            "attention_bias": "blk.0.attn_q.bias" in file.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        }
    if prefix == "qwen3":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    return config


def token_ids(file: GgufFile) -> dict[str, object]:
    """Return the ids of the special tokens in a GGUF file, under their names in a config."""
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {name: f"tokenizer.ggml.{key}_token_id" for name, key in keys.items()}
    return {name: file.integer(key) for name, key in found.items() if key in file.metadata}


def generation_config(file: GgufFile) -> dict[str, object]:
    """Return the content of `generation_config.json`: where generation begins and stops."""
    ids = token_ids(file)
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(tokens, list) and isinstance(template, str) and "eos_token_id" in ids:
        # a chat turn may end with another token than a text does; llama.cpp stops at both
        turn_ends = [
            tokens.index(mark)
            for mark in ("<|im_end|>", "<|eot_id|>")
            if mark in template and mark in tokens
        ]
        ends = list(dict.fromkeys([ids["eos_token_id"], *turn_ends]))
        ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return ids


def hf_tensors(
    file: GgufFile, dtype: torch.dtype | None = None, report: Callable[[float], None] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (HF name, weight) for every weight in a GGUF file, in the file's order, two being read
    ahead.

    Args:
        file: a file of an architecture in `ARCHITECTURES`.
        dtype: what the weights are converted to; None keeps float16 and bfloat16 and makes float32
            of the rest.
        report: is called with the share that is done.

    Raises:
        FormatError: a tensor has a name that no model of the architecture has.
    """
    from concurrent.futures import ThreadPoolExecutor

    names = {name: hf_name(file, name) for name in file.tensors if not _IGNORED.fullmatch(name)}
    total, done = sum(file.tensors[name].num_bytes for name in names), 0
    with ThreadPoolExecutor(2) as pool:
        waiting = {}
        queue = iter(names)
        for name in names:
            while len(waiting) < 3 and (ahead := next(queue, None)) is not None:
                waiting[ahead] = pool.submit(_weight, file, ahead, dtype)
            yield names[name], waiting.pop(name).result()
            done += file.tensors[name].num_bytes
            if report is not None:
                report(done / total)


def tensor_shapes(file: GgufFile) -> dict[str, torch.Tensor]:
    """Return the weights of a GGUF file by HF name, on `meta`: shapes without values."""
    import torch

    entries = {n: entry for n, entry in file.tensors.items() if not _IGNORED.fullmatch(n)}
    return {
        hf_name(file, n): torch.empty(entry.shape, device="meta") for n, entry in entries.items()
    }


def hf_name(file: GgufFile, name: str) -> str:
    """Return the Hugging Face name of a GGUF tensor.

    Raises:
        FormatError: the file's architecture has no such tensor.
    """
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    found = _LAYER_TENSOR.fullmatch(name)
    if found is None or found[2] not in _LAYER_NAMES:
        must = f"a tensor of a {file.text('general.architecture')} model"
        raise FormatError(describe("tensor", str(file.path), must, name))
    return f"model.layers.{int(found[1])}.{_LAYER_NAMES[found[2]]}.{found[3]}"


def gguf_name(name: str) -> str:
    """Return the GGUF name of a weight of ours; the inverse of `hf_name`.

    Raises:
        ConfigError: the architectures have no such tensor.
    """
    for theirs, ours in _TOP_NAMES.items():
        if ours == name:
            return theirs
    found = _OUR_TENSOR.fullmatch(name)
    stem = next((key for key, ours in _LAYER_NAMES.items() if found and found[2] == ours), None)
    if found is None or stem is None:
        raise ConfigError(describe("weight", "GGUF", "one that its architectures have", name))
    return f"blk.{found[1]}.{stem}.{found[3]}"


def permuted_rows(rows: int, num_heads: int) -> npt.NDArray[np.int64]:
    """Return the order in which `llama` files hold the rows of a query or key projection: those
    that turn together side by side.

    Source: `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py.
    """
    return np.arange(rows).reshape(num_heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _weight(file: GgufFile, name: str, dtype: torch.dtype | None) -> torch.Tensor:
    import torch

    stored = file.tensors[name].stored.name
    if stored in ("F16", "BF16"):
        kept = torch.float16 if stored == "F16" else torch.bfloat16
        weight = (
            torch.from_numpy(file.raw(name).copy()).view(kept).reshape(file.tensors[name].shape)
        )
    else:
        values = file.values(name)
        weight = torch.from_numpy(
            values if values.flags.owndata and values.flags.writeable else values.copy()
        )
    if _architecture(file).permuted and (found := _LAYER_TENSOR.fullmatch(name)) is not None:
        heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(found[2])
        if heads is not None:
            default = file.integer("llama.attention.head_count")
            weight = _unpermute(
                file, weight, file.integer(f"llama.attention.{heads}", default), name
            )
    return weight if dtype is None else weight.to(dtype)


def _unpermute(file: GgufFile, weight: torch.Tensor, num_heads: int, name: str) -> torch.Tensor:
    """Return the rows of each head with its even and odd ones apart again, as two halves.

    Source: `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py, inverted.
    """
    rows = weight.shape[0]
    if num_heads < 1 or rows % (2 * num_heads):
        must = f"a multiple of twice the number of heads, {num_heads}"
        raise FormatError(
            describe(f"number of rows of tensor {name!r}", str(file.path), must, rows)
        )
    split = weight.reshape(num_heads, rows // num_heads // 2, 2, *weight.shape[1:])
    return split.transpose(1, 2).reshape(weight.shape)


def _architecture(file: GgufFile) -> Architecture:
    name = file.text("general.architecture")
    if name not in ARCHITECTURES:
        must = f"one of {', '.join(ARCHITECTURES)}"
        raise FormatError(describe("general.architecture", str(file.path), must, name))
    return ARCHITECTURES[name]


def _vocab_size(file: GgufFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        got = None if embedding is None else embedding.shape
        raise FormatError(
            describe(
                "tensor 'token_embd.weight'", str(file.path), "there, with two dimensions", got
            )
        )
    return embedding.shape[0]


def _rope_scaling(file: GgufFile, prefix: str, head_dim: int) -> dict[str, object] | None:
    key = f"{prefix}.rope.scaling"
    kind = file.text(f"{key}.type", "none")
    if ROPE_FACTORS in file.tensors:
        if kind not in ("none", "llama3"):
            raise _refuse(file, "rope.scaling.type", "none beside a tensor of rope factors", kind)
        theta = file.number(f"{prefix}.rope.freq_base", 10000.0)
        return _llama3_scaling(file, file.values(ROPE_FACTORS).reshape(-1), theta, head_dim)
    factor = file.number(f"{key}.factor", file.number(f"{prefix}.rope.scale_linear", 1.0))
    if kind == "none" and factor == 1.0:
        return None
    if kind in ("none", "linear"):
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        scaling: dict[str, object] = {"rope_type": "yarn", "factor": factor}
        if f"{key}.original_context_length" in file.metadata:
            scaling["original_max_position_embeddings"] = file.integer(
                f"{key}.original_context_length"
            )
        return scaling
    raise _refuse(file, "rope.scaling.type", "none, linear or yarn", kind)


def _llama3_scaling(
    file: GgufFile, divisors: npt.NDArray[np.float32], theta: float, head_dim: int
) -> dict[str, object]:
    """Return the Llama 3 scaling whose divisors of the frequencies are those in the file."""
    factor = float(divisors.max())
    for low, high, original in _LLAMA3_SCALINGS:
        expected = llama3_divisors(theta, head_dim, factor, low, high, original)
        if len(expected) == len(divisors) and np.allclose(expected, divisors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    must = "the divisors of a Llama 3 rope scaling"
    raise FormatError(describe(f"tensor {ROPE_FACTORS!r}", str(file.path), must, "other values"))


def llama3_divisors(
    theta: float, head_dim: int, factor: float, low: float, high: float, original: int
) -> npt.NDArray[np.float64]:
    """Return by what Llama 3's rope scaling divides each frequency, lowest index first; shape
    [head_dim / 2].

    Args:
        theta: base of the rotary embedding.
        head_dim: size of a head.
        factor: by how much the context was stretched.
        low: wavelengths above original / low are divided by the factor in full.
        high: wavelengths below original / high are left alone.
        original: context length before stretching, in tokens.
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths = 2 * math.pi / frequencies
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / factor + smooth)


def _refuse(file: GgufFile, key: str, must: str, got: object) -> FormatError:
    return FormatError(describe(f"metadata {key!r}", str(file.path), must, got))
