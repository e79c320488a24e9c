"""The sizes of a model that can be cut, and the config that says them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

from deepseek.compress.prune.groups import Group
from deepseek.config import Config
from deepseek.errors import ConfigError, describe
from deepseek.models import DecoderConfig, EncoderConfig

Part = Literal["layers", "width", "heads", "channels", "experts", "expert_channels"]
"""What can be cut: layers; the width of the states, with embeddings and norms; KV heads with the
query heads that read them; hidden channels of the feed-forward; experts; their hidden channels."""
PARTS: tuple[Part, ...] = get_args(Part)

AnyConfig = DecoderConfig | EncoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape(Config):
    """Sizes of a model by part; None for what it has already."""

    layers: int | None = None
    width: int | None = None
    """An encoder's is a multiple of its channels of a head."""
    heads: int | None = None
    """KV heads, each with the query heads that read it; an encoder's follow its width. Experts in
    groups are counted as `experts`."""
    channels: int | None = None
    """Hidden channels of a dense feed-forward."""
    experts: int | None = None
    """Routed experts; where they are in groups, groups."""
    expert_channels: int | None = None

    def size(self, part: Part) -> int | None:
        """Return the size of a part."""
        return getattr(self, part)

    @property
    def sizes(self) -> dict[Part, int]:
        """The sizes that are given, by part."""
        found: dict[Part, int | None] = {part: self.size(part) for part in PARTS}
        return {part: size for part, size in found.items() if size is not None}


def shape_of(config: AnyConfig) -> Shape:
    """Return the sizes of a model; None for parts that it has not."""
    if isinstance(config, EncoderConfig):
        return Shape(
            layers=config.num_layers,
            width=config.hidden_size,
            heads=config.num_heads,
            channels=config.intermediate_size,
        )
    experts = config.experts
    is_sparse = [config.has_experts(layer) for layer in range(config.num_layers)]
    return Shape(
        layers=config.num_layers,
        width=config.hidden_size,
        heads=config.num_kv_heads,
        channels=None if all(is_sparse) else config.intermediate_size,
        experts=None if experts is None else expert_units(config),
        expert_channels=None if experts is None else experts.width,
    )


def expert_units(config: DecoderConfig) -> int:
    """Return the units in which experts can be removed: groups where they are in some."""
    assert config.experts is not None
    groups = config.experts.num_groups
    return config.experts.num_experts if groups == 1 else groups


_DECODER_PARTS: Mapping[str, tuple[str, int]] = {
    "width": (r"embed_tokens\.weight$", 1),
    "heads": (r"\.self_attn\.o_proj\.weight$", 1),
    "channels": (r"\.mlp\.gate_proj\.weight$", 0),
    "experts": (r"\.mlp\.gate\.weight$", 0),
    "expert_channels": (r"\.mlp\.experts\.down_proj$", 2),
    "shared": (r"\.mlp\.shared_experts\.gate_proj\.weight$", 0),
}
_ENCODER_PARTS: Mapping[str, tuple[str, int]] = {
    "width": (r"\.word_embeddings\.weight$", 1),
    "heads": (r"\.attention\.output\.dense\.weight$", 1),
    "channels": (r"\.intermediate\.dense\.weight$", 0),
    "pooler": (r"^pooler\.dense\.weight$", 0),
}
"""Where a size of the config is read off: a dimension of one weight. All else that changes with it
is found by tracing."""


def part_of(group: Group, config: AnyConfig) -> str | None:
    """Return the part that a group belongs to: one of `PARTS`, or one that follows another
    (`shared`, `pooler`); None where the config has no size for it."""
    table = _ENCODER_PARTS if isinstance(config, EncoderConfig) else _DECODER_PARTS
    for part, (pattern, dim) in table.items():
        if any(re.search(pattern, name) and dim == at for name, at in group.places):
            return part
    return None


def wanted(part: str, config: AnyConfig, shape: Shape) -> int | None:
    """Return the units that a group of a part is to have; None for as many as it has."""
    if part == "pooler":
        return shape.width
    if part == "shared":
        assert isinstance(config, DecoderConfig) and config.experts is not None
        width = shape.expert_channels
        return None if width is None else width * config.experts.num_shared
    return shape.size(part)  # type: ignore[arg-type]


def filled(config: AnyConfig, shape: Shape) -> Shape:
    """Return a shape with every size that a model has.

    Raises:
        ConfigError: a size is none that can be cut to.
    """
    have = shape_of(config)
    for part, size in shape.sizes.items():
        most = have.size(part)
        if most is None or not 1 <= size <= most:
            must = f"from 1 to {most}" if most else "None for a model that has none"
            raise ConfigError(describe(part, "Shape", must, size))
    full = have.replace(**shape.sizes)
    if isinstance(config, EncoderConfig):
        return _encoder_shape(config, shape, full)
    experts = config.experts
    if experts is not None and full.experts is not None:
        each = experts.num_experts // expert_units(config)
        if full.experts * each < experts.num_active:
            must = f"enough for the {experts.num_active} that a token uses"
            raise ConfigError(describe("experts", "Shape", must, full.experts))
    return full


def _encoder_shape(config: EncoderConfig, asked: Shape, full: Shape) -> Shape:
    """Heads and width are one size in a BERT config."""
    dim = config.hidden_size // config.num_heads
    assert full.width is not None
    if asked.heads is not None and asked.width is None:
        full = full.replace(width=asked.heads * dim)
    if full.width is None or full.width % dim:
        must = f"a multiple of the {dim} channels of a head"
        raise ConfigError(describe("width", "Shape", must, full.width))
    heads = full.width // dim
    if asked.heads not in (None, heads):
        must = f"{heads} for an encoder of width {full.width}, or None"
        raise ConfigError(describe("heads", "Shape", must, asked.heads))
    return full.replace(heads=heads)


def resized(config: AnyConfig, shape: Shape, layers: Sequence[int]) -> AnyConfig:
    """Return the config of a model that was cut.

    Args:
        config: before.
        shape: of `filled`.
        layers: which are kept, counted from 0, in order.

    Raises:
        ConfigError: transformers would refuse it.
    """
    if isinstance(config, EncoderConfig):
        return config.replace(
            num_layers=len(layers),
            hidden_size=shape.width,
            num_heads=shape.heads,
            intermediate_size=shape.channels,
        )
    per_group = config.num_heads // config.num_kv_heads
    assert shape.heads is not None
    changes: dict[str, object] = {
        "num_layers": len(layers),
        "hidden_size": shape.width,
        "num_kv_heads": shape.heads,
        "num_heads": shape.heads * per_group,
        "window_layers": _renumbered(config.window_layers, layers),
    }
    if shape.channels is not None:
        changes["intermediate_size"] = shape.channels
    experts = config.experts
    if experts is not None:
        assert shape.experts is not None
        each = experts.num_experts // expert_units(config)
        groups = 1 if experts.num_groups == 1 else shape.experts
        changes["experts"] = experts.replace(
            num_experts=shape.experts * each,
            width=shape.expert_channels,
            num_groups=groups,
            num_active_groups=min(experts.num_active_groups, groups),
            dense_layers=_renumbered(experts.dense_layers, layers),
        )
    return _readable(config.replace(**changes))


def _readable(config: DecoderConfig) -> DecoderConfig:
    """Return a config that transformers reads. It refuses a Llama whose width is no multiple of its
    heads, though it computes with `head_dim`; Mistral is the same model and is not refused."""
    if config.family != "llama" or config.hidden_size % config.num_heads == 0:
        return config
    if config.qkv_bias or config.output_bias or config.mlp_bias:
        must = f"a multiple of the {config.num_heads} heads, where a Llama has biases"
        raise ConfigError(describe("width", "Shape", must, config.hidden_size))
    return config.replace(family="mistral")


def _renumbered(some: Iterable[int], layers: Sequence[int]) -> tuple[int, ...]:
    return tuple(place for place, layer in enumerate(layers) if layer in set(some))
