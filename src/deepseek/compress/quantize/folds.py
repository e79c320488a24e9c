"""Factors that move between neighbours: what makes channels smaller before a product makes its
weights larger, and the model computes what it did."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from deepseek.compress.quantize.targets import Model
from deepseek.models import Encoder
from deepseek.models.decoder import Decoder, DecoderLayer
from deepseek.models.layers import Attention, Experts, FeedForward, LatentAttention


@dataclasses.dataclass(frozen=True)
class Fold:
    """A place where a factor for each channel can be moved."""

    producers: tuple[str, ...]
    """Parameters whose first dimension is the channels: divided."""
    consumers: tuple[str, ...]
    """Parameters whose last dimension is the channels: multiplied."""
    sees: str
    """The module whose inputs the channels are."""
    layer: int | None = None
    """Where it lies; None behind the layers."""
    copies: Tensor | None = None
    """The producer's channel of each of the consumers' [K]; None for the same."""

    def spread(self, factor: Tensor) -> Tensor:
        """Return the factor of each channel of the consumers [K]."""
        return factor if self.copies is None else factor[self.copies]

    def gathered(self, values: Tensor) -> Tensor:
        """Return the largest of the consumers' values [K] for each channel of the producers."""
        if self.copies is None:
            return values
        size = int(self.copies.max()) + 1
        return torch.zeros(size).scatter_reduce(0, self.copies, values, "amax")


def apply_fold(model: Model, fold: Fold, factor: Tensor) -> None:
    """Move a factor in place.

    Args:
        model: its parameters are float32.
        fold: where.
        factor: above 0, for each channel of the producers.
    """
    with torch.no_grad():
        for name in fold.producers:
            parameter = model.get_parameter(name)
            parameter.div_(factor.view(-1, *[1] * (parameter.dim() - 1)))
        for name in fold.consumers:
            model.get_parameter(name).mul_(fold.spread(factor))


def folds(model: Model) -> list[Fold]:
    """Return every place of a model, in the order of its pass.

    A decoder has them behind its norms, between value and output products and between the up and
    down products. An encoder's norms stand in the residual too, so only its values are left.
    """
    if isinstance(model, Encoder):
        return [
            _between(
                model, layer, f"encoder.layer.{layer}.attention",
                "self.value", ("output.dense",),
            )
            for layer in range(model.config.num_layers)
        ]  # fmt: skip
    found = [each for layer in range(model.config.num_layers) for each in _of_layer(model, layer)]
    if not model.config.tie_embeddings:
        found.append(Fold(("model.norm.weight",), ("lm_head.weight",), "lm_head"))
    return found


def _of_layer(model: Decoder, layer: int) -> Iterator[Fold]:
    module = model.model.layers[layer]
    assert isinstance(module, DecoderLayer)
    prefix = f"model.layers.{layer}"
    attention = module.self_attn
    gate = () if attention.head_gate is None else ("head_gate",)
    first = f"{prefix}.input_layernorm.weight"
    if isinstance(attention, LatentAttention):
        query = ("q_proj",) if attention.latent.query_rank is None else ("q_a_proj",)
        names = (*query, "kv_a_proj_with_mqa", *gate)
        yield _behind(layer, first, f"{prefix}.self_attn", names)
        if attention.latent.query_rank is not None:
            norm = f"{prefix}.self_attn.q_a_layernorm.weight"
            yield _behind(layer, norm, f"{prefix}.self_attn", ("q_b_proj",))
        norm = f"{prefix}.self_attn.kv_a_layernorm.weight"
        yield _behind(layer, norm, f"{prefix}.self_attn", ("kv_b_proj",))
    else:
        assert isinstance(attention, Attention)
        names = ("q_proj", "k_proj", "v_proj", *gate)
        yield _behind(layer, first, f"{prefix}.self_attn", names)
        config = model.config
        channels = torch.arange(config.num_kv_heads * config.head_dim)
        by_head = channels.unflatten(0, (config.num_kv_heads, -1))
        copies = by_head.repeat_interleave(config.num_heads // config.num_kv_heads, 0).flatten()
        yield _between(model, layer, f"{prefix}.self_attn", "v_proj", ("o_proj",), copies)
    yield from _of_feed_forward(model, layer, f"{prefix}.mlp")


def _of_feed_forward(model: Decoder, layer: int, prefix: str) -> Iterator[Fold]:
    norm = f"model.layers.{layer}.post_attention_layernorm.weight"
    module = model.get_submodule(prefix)
    if isinstance(module, Experts):
        consumers = [f"{prefix}.gate.weight", f"{prefix}.experts.gate_up_proj"]
        if module.shared_experts is not None:
            shared = f"{prefix}.shared_experts"
            consumers += [f"{shared}.gate_proj.weight", f"{shared}.up_proj.weight"]
        yield Fold((norm,), tuple(consumers), prefix, layer)
        return
    assert isinstance(module, FeedForward)
    yield _behind(layer, norm, prefix, ("gate_proj", "up_proj"))
    yield _between(model, layer, prefix, "up_proj", ("down_proj",))


def _behind(layer: int, norm: str, prefix: str, names: tuple[str, ...]) -> Fold:
    consumers = tuple(f"{prefix}.{name}.weight" for name in names)
    return Fold((norm,), consumers, f"{prefix}.{names[0]}", layer)


def _between(
    model: Model,
    layer: int,
    prefix: str,
    producer: str,
    consumers: tuple[str, ...],
    copies: Tensor | None = None,
) -> Fold:
    own = {name for name, _ in model.get_submodule(f"{prefix}.{producer}").named_parameters()}
    producers = tuple(f"{prefix}.{producer}.{name}" for name in ("weight", "bias") if name in own)
    weights = tuple(f"{prefix}.{name}.weight" for name in consumers)
    return Fold(producers, weights, f"{prefix}.{consumers[0]}", layer, copies)
