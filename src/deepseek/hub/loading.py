"""Loads a model: from a bundle in the store, any Hugging Face folder, or a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from deepseek.data import Tokenizer
from deepseek.errors import ConfigError, FormatError, describe
from deepseek.hub.bundle import Bundle, routing_asked
from deepseek.hub.gguf import GgufFile, read_gguf
from deepseek.hub.gguf_model import hf_config, hf_tensors
from deepseek.hub.gguf_tokenizer import read_tokenizer
from deepseek.hub.grids import grids_of
from deepseek.hub.safetensors import read_tensors
from deepseek.hub.sentence import with_pooling
from deepseek.hub.store import resolve
from deepseek.models import (
    Decoder,
    DecoderConfig,
    Encoder,
    EncoderConfig,
    Planner,
    RoutedPlanner,
    WindowPlanner,
)
from deepseek.models.families import build_model, config_from_hf, state_from_hf
from deepseek.models.stretch import stretched
from deepseek.ops.attention import ATTENTION_IMPLS, AttentionImpl
from deepseek.ops.routing import Routing

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load(
    name_or_folder: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    verify: bool = False,
    attention: AttentionImpl | Literal["dense", "routed"] | Routing | Planner = "auto",
    context: int | None = None,
) -> Decoder | Encoder:
    """Return a model in eval mode, with its `tokenizer` and `bundle`, or None where it has none.

    Weights of a folder are mapped, not read: loading is fast, and pages come in as they are used.
    The file is never written to, also when the model is trained in place.

    Args:
        name_or_folder: a name (`smollm2-135m`) that was pulled, a model folder, or a `.gguf` file.
        dtype: "float32", "bfloat16", "float16" or the torch dtype of the weights; None for what is
            stored (float32 for quantized GGUF, and for a bundle with weights on a grid of
            integers, whose numbers it holds exactly).
        device: where the weights go.
        verify: read every file and compare its hash with the card first.
        attention: "routed", or a `Routing`, for a decoder whose layers choose the blocks that they
            see; "dense" for one whose tokens see all before them; "auto" for what the bundle's card
            records, dense where it records nothing; a planner, for a decoder that has no windows
            and no pattern of its own. Or an execution of attention, see `deepseek.ops.attention`;
            what is seen is then as with "auto".
        context: in tokens, to which the positions of a decoder are stretched; None for the model's
            own.

    Raises:
        ConfigError: the name is unknown or not pulled yet, or an argument is not one that can be
            used.
        FormatError: a file is missing, damaged or not what it says, or weights and config do not
            fit together.
    """
    kind = as_dtype(dtype)
    choices = ("auto", "dense", "routed", *ATTENTION_IMPLS)
    if not isinstance(attention, Routing | Planner) and attention not in choices:
        must = f"one of {', '.join(choices)}, a Routing or a planner"
        raise ConfigError(describe("attention", "load", must, attention))
    place = _as_device(device)
    path = resolve(name_or_folder)
    if path.is_file():
        model = _load_gguf(read_gguf(path), kind)
    else:
        model = _load_bundle(Bundle.open(path, verify=verify), kind)
    if context is not None:
        _stretch(model, context)
    if attention == "dense":
        _refuse_pattern(model, "dense")
    if isinstance(attention, Planner):
        _plan(model, attention)
        return model.to(place).eval()
    routing = routing_asked(attention, model.bundle if isinstance(model.bundle, Bundle) else None)
    if routing is not None:
        _route(model, routing)
    if isinstance(attention, str) and attention not in ("dense", "routed"):
        _execute(model, attention)
    return model.to(place).eval()


def _execute(model: Decoder | Encoder, attention: AttentionImpl) -> None:
    if isinstance(model, Decoder):
        model.impl = attention
    else:
        model.use_attention(attention)


def _stretch(model: Decoder | Encoder, context: int) -> None:
    if not isinstance(model, Decoder):
        must = "None for an encoder, whose positions are learned one by one"
        raise ConfigError(describe("context", "load", must, context))
    model.config = stretched(model.config, context)


def _route(model: Decoder | Encoder, routing: Routing) -> None:
    if not isinstance(model, Decoder):
        must = "'auto' or an execution for an encoder, which sees all of its short texts"
        raise ConfigError(describe("attention", "load", must, "routed"))
    _refuse_pattern(model, "routed")
    assert model.planner is None or isinstance(model.planner, WindowPlanner)
    model.planner = RoutedPlanner(model.config, routing, model.planner)


def _plan(model: Decoder | Encoder, planner: Planner) -> None:
    if not isinstance(model, Decoder) or model.planner is not None:
        must = "'auto' or an execution: only a decoder that sees all takes a planner"
        step = "Set `model.planner` to have another one in place of a decoder's own"
        raise ConfigError(describe("attention", "load", must, type(planner).__name__, step))
    model.planner = planner


def _refuse_pattern(model: Decoder | Encoder, asked: str) -> None:
    if isinstance(model, Decoder) and model.config.pattern is not None:
        must = "'auto' or an execution: this model was made for a static pattern of attention"
        raise ConfigError(describe("attention", "load", must, asked))


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the torch dtype of a name.

    Raises:
        ConfigError: it is none that weights can be converted to.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if (found is None and dtype is not None) or (
        found is not None and found not in DTYPES.values()
    ):
        raise ConfigError(describe("dtype", "load", f"one of {', '.join(DTYPES)}", dtype))
    return found


def _as_device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        must = f"one that is here ({first})"
        raise ConfigError(describe("device", "load", must, str(device))) from error


def fill(
    model: nn.Module, state: Mapping[str, Tensor], owner: str, dtype: torch.dtype | None = None
) -> None:
    """Give a model built on `meta` its weights; the tensors become its parameters without a copy.

    Args:
        model: nothing of it is allocated yet.
        state: a tensor for every parameter and persistent buffer, by the model's names; one of tied
            names is enough.
        owner: what the weights come from, for messages.
        dtype: what floating parameters are converted to; None for as they are.

    Raises:
        FormatError: weights are missing, left over or of a wrong shape; the first few are named.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    aliases = _aliases(parameters)
    given = {name: value for name, value in state.items() if name not in aliases}
    _check_fit(model, given, owner)
    for name, value in given.items():
        if dtype is not None and name in parameters and value.is_floating_point():
            value = value.to(dtype)
        _set(
            model,
            name,
            nn.Parameter(value, value.is_floating_point()) if name in parameters else value,
        )
    for name, same in aliases.items():
        _set(model, name, model.get_parameter(same))
    left = [
        name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta
    ]
    if left:
        raise FormatError(describe("weights", owner, "complete", f"none for {left[:3]}"))


def check_weights(config: Mapping[str, object], shapes: Mapping[str, Tensor], owner: str) -> None:
    """Raise a FormatError unless weights fit a `config.json`; nothing is allocated when `shapes`
    are meta tensors.
    """
    ours = config_from_hf(config)
    with torch.device("meta"):
        model = build_model(ours)
    _check_fit(model, state_from_hf(ours, shapes), owner)


def _load_bundle(bundle: Bundle, dtype: torch.dtype | None) -> Decoder | Encoder:
    config = config_from_hf(bundle.config)
    if isinstance(config, EncoderConfig):
        config = with_pooling(config, bundle.path)
    tensors = read_tensors(bundle.path, bundle.plain_tensors)
    if bundle.grids:
        dtype = dtype or torch.float32
        tensors |= {
            name: torch.from_numpy(grid.read().values()).to(dtype)
            for name, grid in bundle.grids.items()
        }
    model = _assemble(config, tensors, str(bundle.path), dtype)
    if isinstance(model, Decoder):
        model.grids, model.kv = grids_of(bundle), bundle.kv
    model.tokenizer = Tokenizer.from_folder(bundle.path)
    model.bundle = bundle
    return model


def _load_gguf(file: GgufFile, dtype: torch.dtype | None) -> Decoder | Encoder:
    config = config_from_hf(hf_config(file))
    if dtype is None:
        dtype = stored_dtype(file)
    model = _assemble(config, dict(hf_tensors(file, dtype)), str(file.path), None)
    model.tokenizer = read_tokenizer(file)
    return model


def stored_dtype(file: GgufFile) -> torch.dtype:
    """Return the dtype that holds every matrix of a GGUF file exactly: half types only where all
    have them.
    """
    kinds = {tensor.stored.name for tensor in file.tensors.values() if len(tensor.shape) > 1}
    halves = {"F16": torch.float16, "BF16": torch.bfloat16}
    return halves.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def _assemble(
    config: DecoderConfig | EncoderConfig,
    tensors: Mapping[str, Tensor],
    owner: str,
    dtype: torch.dtype | None,
) -> Decoder | Encoder:
    with torch.device("meta"):
        model = build_model(config)
    fill(model, state_from_hf(config, tensors), owner, dtype)
    return model


def _aliases(parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Return, for every further name of a tied parameter, its first one."""
    first: dict[int, str] = {}
    same = {name: first.setdefault(id(value), name) for name, value in parameters.items()}
    return {name: origin for name, origin in same.items() if name != origin}


def _check_fit(model: nn.Module, given: Mapping[str, Tensor], owner: str) -> None:
    aliases = _aliases(dict(model.named_parameters(remove_duplicate=False)))
    expected = {name: value for name, value in model.state_dict().items() if name not in aliases}
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected and name not in aliases]
    wrong = [
        f"{name} {list(given[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in given and given[name].shape != value.shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of a wrong shape": wrong}
    found = [f"{len(names)} {what} ({_few(names)})" for what, names in faults.items() if names]
    if found:
        step = "Do config.json and the weights belong together"
        message = f"weights of {owner} must be those of its config; got {'; '.join(found)}. {step}?"
        raise FormatError(message)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, value)
