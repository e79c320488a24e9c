"""Gates of attention heads: given to a model that has none, and watched while it runs."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deepseek.errors import ConfigError, describe
from deepseek.models.config import GateConfig
from deepseek.models.decoder import Decoder, DecoderLayer
from deepseek.models.families.own import OWN_MODEL_TYPE
from deepseek.models.layers import Attention, LatentAttention, gate_layer, head_gates
from deepseek.ops.head_count import HeadCount


def add_gates(model: Decoder, gates: GateConfig) -> Decoder:
    """Give every attention head of a model a gate that is 1 for now, in place, and return the
    model.

    What it computes does not change until the gates are trained. Its family becomes
    `deepseek_stack`, which alone has a place for them. Of a model that has gates, they stay, and
    `gates` replaces what its config says of them: so a threshold is set.

    Args:
        model: a decoder.
        gates: what its config is to say of them.

    Raises:
        ConfigError: it is no decoder, or `gates` no GateConfig.
    """
    if not isinstance(model, Decoder):
        must = "a decoder"
        raise ConfigError(describe("model", "add_gates", must, type(model).__name__))
    if not isinstance(gates, GateConfig):
        step = "Use GateConfig(threshold=…)"
        raise ConfigError(describe("gates", "add_gates", "a GateConfig", gates, step))
    config = model.config.replace(family=OWN_MODEL_TYPE, gates=gates)
    if model.config.gates is None:
        for attention in _attentions(model):
            layer = gate_layer(config).to(model.device, model.dtype)
            attention.head_gate = layer.train(attention.training)
    model.config = config
    return model


class GateWatch:
    """Watches the gates of a model's forward passes while it is open (`with GateWatch(model) as
    watch`).

    It hangs on the modules, so that generation goes through them too meanwhile; the engine has a
    count of its own, `Engine.head_count`.
    """

    def __init__(self, model: Decoder) -> None:
        """Make one for a model.

        Raises:
            ConfigError: it has no gates.
        """
        if model.config.gates is None:
            must, step = "one with gates", "Use deepseek.models.add_gates"
            raise ConfigError(describe("model", "GateWatch", must, "one without", step))
        self._model, self._threshold = model, model.config.gates.threshold
        self._newest: deque[Tensor] = deque(maxlen=model.config.num_layers)
        self._total, self._closed = 0, 0
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> GateWatch:
        for attention in _attentions(self._model):
            assert attention.head_gate is not None
            self._hooks.append(attention.head_gate.register_forward_hook(self._note))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _note(self, layer: nn.Module, _: object, logits: Tensor) -> None:
        # nothing is computed here for the backward pass: layers may be run again for it, unwatched
        self._newest.append(logits)
        self._total += logits.numel()
        if not layer.training:
            self._closed += int((head_gates(logits.detach()) < self._threshold).sum())

    @property
    def count(self) -> HeadCount:
        """Heads of all passes, padding's too; in training none is closed."""
        return HeadCount(self._total, self._closed)

    def by_token(self) -> Tensor:
        """Return the mean gate over layers and heads of each token of the newest pass, float32
        [B, T], before any threshold; it can be differentiated.

        Raises:
            ConfigError: there was no pass yet.
        """
        if not self._newest:
            raise ConfigError(describe("passes", "GateWatch", "at least one", "none"))
        return head_gates(torch.stack(list(self._newest))).mean((0, 3))


def _attentions(model: Decoder) -> list[Attention | LatentAttention]:
    return [layer.self_attn for layer in model.model.layers if isinstance(layer, DecoderLayer)]
