"""Small models, tokenizers and GGUF files that the tests of the hub are made of."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from deepseek.data import Tokenizer
from deepseek.hub.gguf_model import llama3_divisors
from deepseek.models import Decoder
from deepseek.models.families import build_model, config_from_hf, config_to_hf, state_to_hf

TEXT = (
    "The quick brown fox jumps over the lazy dog. It's 2024, isn't it? "
    "def f(x):\n    return x ** 2  # squared\n\tif  y:\n 深度求索 你好,世界! "
    "naïve café 1,234.56 <|mark|> ÀÉÎ    spaces\n\n\n"
)

HF_CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tiny_decoder(seed: int = 0, **changes: Any) -> Decoder:
    """Return a decoder of two layers with random weights."""
    torch.manual_seed(seed)
    model = build_model(config_from_hf({**HF_CONFIG, **changes}))
    assert isinstance(model, Decoder)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def tiny_tokenizer() -> Tokenizer:
    """Return a byte-level tokenizer that knows little, with a chat template."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=alphabet,
        special_tokens=["<|text|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    template = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
    return Tokenizer(
        backend, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=template
    )


def write_gguf(
    path: Path,
    model: Decoder,
    architecture: str = "llama",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: Mapping[str, object] | None = None,
    divisors: npt.NDArray[np.float32] | None = None,
) -> Path:
    """Write a model as llama.cpp's converter does, all its matrices in one stored type."""
    config = config_to_hf(model.config)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if architecture == "llama":
        writer.add_rope_dimension_count(config["head_dim"])
    for key, value in (extra or {}).items():
        add_value(writer, key, value)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in state_to_hf(model.config, model.state_dict()).items():
        part = name.split(".")[-2]
        if architecture == "llama" and part in heads:
            tensor = permute(tensor, heads[part])
        add_tensor(writer, gguf_name(name), tensor.float().numpy(), kind)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    finish(writer)
    return path


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a weight."""
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in top:
        return top[name]
    _, _, layer, rest = name.split(".", 3)
    stem, _, suffix = rest.rpartition(".")
    return f"blk.{layer}.{GGUF_NAMES[stem]}.{suffix}"


def permute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return query or key rows in llama.cpp's order: those that turn together side by side."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def add_value(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    """Add one metadata value by the type of the Python value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        assert isinstance(value, list)
        writer.add_array(key, value)


def add_tensor(
    writer: gguf.GGUFWriter,
    name: str,
    values: npt.NDArray[np.float32],
    kind: gguf.GGMLQuantizationType,
) -> None:
    """Add a tensor; vectors stay in float32, as every converter leaves them."""
    if values.ndim < 2 or kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, np.ascontiguousarray(values))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        data = gguf.quants.quantize(np.ascontiguousarray(values), kind)
    writer.add_tensor(name, data, raw_dtype=kind)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write what was collected and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_tensor(head_dim: int, factor: float, theta: float) -> npt.NDArray[np.float32]:
    """Return the tensor of divisors that a converter writes for a Llama 3 model."""
    return llama3_divisors(theta, head_dim, factor, 1.0, 4.0, 8192).astype(np.float32)


def text(value: str) -> bytes:
    """Return a string as GGUF stores it."""
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key: str, code: int, value: bytes) -> bytes:
    """Return one metadata entry as GGUF stores it."""
    return text(key) + struct.pack("<I", code) + value


def entry(name: str, dims: list[int], code: int = 0, offset: int = 0) -> bytes:
    """Return one line of the tensor table as GGUF stores it."""
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + sizes + struct.pack("<IQ", code, offset)


def raw_gguf(
    pairs: list[bytes],
    entries: list[bytes],
    data: bytes = b"",
    *,
    version: int = 3,
    num_pairs: int | None = None,
    num_entries: int | None = None,
    magic: bytes = b"GGUF",
) -> bytes:
    """Return the bytes of a GGUF file, as wrong as the parts are."""
    counts = (len(entries) if num_entries is None else num_entries,)
    counts += (len(pairs) if num_pairs is None else num_pairs,)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(entries)
    return head + b"\0" * (-len(head) % 32) + data
