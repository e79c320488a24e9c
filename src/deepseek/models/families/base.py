"""What a family has to say: its names in Hugging Face, and the two translations of its config."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from deepseek.errors import FormatError, describe
from deepseek.models.config import DecoderConfig, EncoderConfig, RopeConfig

HFConfig = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models, as `transformers` knows it."""

    model_type: str
    """`model_type` in `config.json`."""
    architecture: str
    """Class name in `architectures`."""
    read: Callable[[HFConfig], DecoderConfig | EncoderConfig]
    """Return our config of theirs."""
    write: Callable[[Any], dict[str, Any]]
    """Return the fields of theirs that say what ours says."""
    renames: tuple[tuple[str, str], ...] = ()
    """Regular expressions and replacements that turn their weight names into ours."""
    classifier: str | None = None
    """Class name in `architectures` of the model with a classifier of sequences."""
    body: str = ""
    """What stands before the names of that model's weights, those of the classifier apart."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of weights of theirs that the model does not use."""


def required(hf: HFConfig, name: str) -> Any:
    """Return a field of a `config.json`.

    Raises:
        FormatError: the field is missing.
    """
    if hf.get(name) is None:
        raise FormatError(
            describe(name, "config.json", "given", "nothing", "Is the folder a whole model")
        )
    return hf[name]


def refuse(hf: HFConfig, name: str, allowed: tuple[Any, ...]) -> None:
    """Raise a FormatError if a field of a `config.json` says something this package does not
    compute."""
    if name in hf and hf[name] not in allowed:
        must = " or ".join(repr(value) for value in allowed)
        raise FormatError(describe(name, "config.json", must, hf[name]))


def read_rope(
    hf: HFConfig, *, default_theta: float = 10000.0, interleaved: bool = False
) -> RopeConfig:
    """Return the rope of a `config.json`, from `rope_parameters` or from `rope_theta` and
    `rope_scaling`.

    Raises:
        FormatError: a scaling rule this package does not know.
    """
    given = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    kind = given.get("rope_type") or given.get("type") or "default"
    known = ("default", "linear", "dynamic", "yarn", "llama3")
    if kind not in known:
        must = f"one of {', '.join(known)}"
        raise FormatError(describe("rope_type", "config.json", must, kind))
    if given.get("partial_rotary_factor", hf.get("partial_rotary_factor") or 1.0) != 1.0:
        raise FormatError(describe("partial_rotary_factor", "config.json", "1.0", given))
    maximum = hf.get("max_position_embeddings")
    original = given.get("original_max_position_embeddings")
    original = hf.get("original_max_position_embeddings") or original
    factor = given.get("factor")
    if factor is None and kind == "yarn" and original and maximum:
        factor = maximum / original
    return RopeConfig(
        theta=float(given.get("rope_theta") or hf.get("rope_theta") or default_theta),
        scaling=kind,
        factor=1.0 if factor is None else float(factor),
        original_max_positions=original if kind in ("yarn", "llama3") else None,
        low_freq_factor=float(given.get("low_freq_factor") or 1.0),
        high_freq_factor=float(given.get("high_freq_factor") or 4.0),
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        attention_factor=given.get("attention_factor"),
        mscale=given.get("mscale"),
        mscale_all_dim=given.get("mscale_all_dim"),
        truncate=bool(given.get("truncate", True)),
        interleaved=interleaved,
    )


def write_rope(rope: RopeConfig, max_positions: int) -> dict[str, Any]:
    """Return `rope_parameters` as transformers 5 reads them."""
    written: dict[str, Any] = {"rope_type": rope.scaling, "rope_theta": rope.theta}
    if rope.scaling != "default":
        written["factor"] = rope.factor
    if rope.scaling in ("yarn", "llama3"):
        written["original_max_position_embeddings"] = rope.original_max_positions or max_positions
    if rope.scaling == "llama3":
        written |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
        }
    if rope.scaling == "yarn":
        written |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(rope, name) is not None:
                written[name] = getattr(rope, name)
        if not rope.truncate:
            written["truncate"] = False
    return written


def token_ids(hf: HFConfig) -> dict[str, Any]:
    """Return the special token ids of a `config.json` as fields of a DecoderConfig."""
    eos = hf.get("eos_token_id")
    return {
        "bos_token_id": hf.get("bos_token_id"),
        "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
        "pad_token_id": hf.get("pad_token_id"),
    }


def common_fields(hf: HFConfig) -> dict[str, Any]:
    """Return the fields that every decoder family shares."""
    refuse(hf, "hidden_act", ("silu", "swish"))
    heads = required(hf, "num_attention_heads")
    hidden = required(hf, "hidden_size")
    return {
        "vocab_size": required(hf, "vocab_size"),
        "hidden_size": hidden,
        "num_layers": required(hf, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hidden // heads,
        "intermediate_size": required(hf, "intermediate_size"),
        "max_positions": hf.get("max_position_embeddings") or 2048,
        "norm_eps": float(hf.get("rms_norm_eps") or 1e-6),
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "init_std": float(hf.get("initializer_range") or 0.02),
        **token_ids(hf),
    }


def write_common(config: DecoderConfig) -> dict[str, Any]:
    """Return what `common_fields` and `read_rope` read."""
    eos = config.eos_token_id
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "rope_parameters": write_rope(config.rope, config.max_positions),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": config.pad_token_id,
    }
