"""An encoder of PyTorch modules on its engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from deepseek.errors import ConfigError, describe
from deepseek.generate.encoder_engine import EncoderEngine, build_encoder_engine
from deepseek.generate.flat_encoder import why_encoder_not_flat
from deepseek.generate.modules import EngineSlot, weights_of, why_not_plain
from deepseek.models.encoder import (
    AddNorm,
    Embeddings,
    Encoder,
    EncoderLayer,
    LayerStack,
    SelfAttention,
)
from deepseek.ops.cpu import why_missing
from deepseek.ops.linear import Linear
from deepseek.ops.scheme import Scheme

_KNOWN = frozenset(
    {
        AddNorm,
        Embeddings,
        Encoder,
        EncoderLayer,
        LayerStack,
        Linear,
        SelfAttention,
        nn.Embedding,
        nn.LayerNorm,
        nn.ModuleDict,
        nn.ModuleList,
    }
)
"""The very classes whose mathematics the program writes out; a subclass may compute another."""


def why_no_encoder_engine(model: Encoder) -> str | None:
    """Return why an encoder has no engine, or None if it has one."""
    reason = why_encoder_not_flat(model.config)
    named = {each.impl for each in model.modules() if isinstance(each, SelfAttention)} - {"auto"}
    if named:
        return f"the execution {min(named)!r} of attention was asked for by name"
    return reason or why_not_plain(model, _KNOWN) or why_missing()


def encoder_engine_of(model: Encoder, scheme: Scheme | None = None) -> EncoderEngine:
    """Return the engine of an encoder, packed anew when a weight, the scheme or the threads changed
    (as `engine_of` sees it).

    Args:
        model: the encoder.
        scheme: None for that of `load(scheme=…)`, or else for its dtype.

    Raises:
        ConfigError: `why_no_encoder_engine` gives a reason.
    """
    reason = why_no_encoder_engine(model)
    if reason is not None:
        must = "one that the engine runs"
        step = "Load it without a scheme"
        raise ConfigError(describe("model", "EncoderEngine", must, reason, step))
    asked = scheme or vars(model).get("scheme")
    chosen = asked or Scheme.named(str(model.dtype).removeprefix("torch."))
    slot: EngineSlot[EncoderEngine] = vars(model).setdefault("engine_slot", EngineSlot())
    threads = torch.get_num_threads()
    versions = tuple((each.data_ptr(), each._version) for each in model.parameters())
    return slot.get(
        (chosen, threads, model.config, versions),
        lambda: build_encoder_engine(
            model.config,
            weights_of(model),
            chosen,
            tokenizer=model.tokenizer,
            threads=threads,
        ),
    )


class EngineRunner:
    """Computes what an encoder makes of texts on its engine. Is a `Runner`."""

    def vectors(self, model: Encoder, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the vectors of texts: float32 [n, hidden]."""
        return encoder_engine_of(model).vectors(texts)

    def logits(self, model: Encoder, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the logits of texts: float32 [n, labels]."""
        return encoder_engine_of(model).logits(texts)
