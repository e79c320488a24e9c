"""The family as data: every preset of the founding documents, and small sizes that run anywhere.

A preset is a decoder's shape. What a document's model has beside it (an image encoder, tensor-train
layers) is named in `awaits` until the package has it; the count speaks of the decoder alone.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from deepseek.errors import ConfigError, describe
from deepseek.models.config import DecoderConfig, ExpertsConfig, Pattern, RopeConfig
from deepseek.models.decoder import Decoder

Size = Literal["full", "small", "tiny"]
_OWN = "deepseek_stack"
_BILLION = 1_000_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """One model of the family."""

    name: str
    summary: str
    config: DecoderConfig
    num_params: int
    """Parameters the preset is meant to have; the build lies within 3 %."""
    stated: bool
    """The founding documents state the count; otherwise it is ours."""
    awaits: tuple[str, ...] = ()
    """Parts of the document's model that this decoder does not have yet."""

    def sized(self, size: Size) -> DecoderConfig:
        """Return the config at full size, or one of the same make that runs on a laptop."""
        return self.config if size == "full" else shrink(self.config, size)


_SEVEN = DecoderConfig(
    vocab_size=102400,
    hidden_size=4096,
    num_layers=30,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    intermediate_size=11008,
    max_positions=4096,
)
_THIRTY_TWO = DecoderConfig(
    vocab_size=102400,
    hidden_size=5120,
    num_layers=64,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=27648,
    max_positions=16384,
)
_EIGHT = DecoderConfig(
    vocab_size=128256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    max_positions=8192,
    rope=RopeConfig(theta=500000.0),
)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="base",
            summary="The smallest of the family, from which growth starts",
            config=DecoderConfig(
                vocab_size=32256,
                hidden_size=2048,
                num_layers=24,
                num_heads=16,
                num_kv_heads=16,
                head_dim=128,
                intermediate_size=5504,
                max_positions=4096,
                tie_embeddings=True,
            ),
            num_params=1_300_000_000,
            stated=True,
        ),
        Preset(
            name="7b",
            summary="General model, Chinese and English",
            config=_SEVEN,
            num_params=7 * _BILLION,
            stated=True,
        ),
        Preset(
            name="v1",
            summary="First generation, dense",
            config=_SEVEN.replace(
                hidden_size=5120,
                num_layers=38,
                num_heads=40,
                num_kv_heads=40,
                intermediate_size=13824,
            ),
            num_params=13 * _BILLION,
            stated=True,
        ),
        Preset(
            name="v2",
            summary="Second generation, sparse attention",
            config=_THIRTY_TWO.replace(
                family=_OWN, pattern=Pattern(first=1, recent=8, every=8, sparsity=0.9)
            ),
            num_params=32 * _BILLION,
            stated=True,
        ),
        Preset(
            name="33b",
            summary="The largest dense model",
            config=DecoderConfig(
                vocab_size=32256,
                hidden_size=7168,
                num_layers=62,
                num_heads=56,
                num_kv_heads=8,
                head_dim=128,
                intermediate_size=19200,
                max_positions=16384,
                rope=RopeConfig(theta=100000.0, scaling="linear", factor=4.0),
            ),
            num_params=33 * _BILLION,
            stated=True,
        ),
        Preset(
            name="pro",
            summary="Adapted to one of eight verticals, on the second generation",
            config=_THIRTY_TWO,
            num_params=32 * _BILLION,
            stated=False,
            awaits=("domain adaptation",),
        ),
        Preset(
            name="lite",
            summary="A fifth of the first generation, for phones and edge boxes",
            config=DecoderConfig(
                vocab_size=102400,
                hidden_size=2560,
                num_layers=34,
                num_heads=20,
                num_kv_heads=4,
                head_dim=128,
                intermediate_size=6912,
                max_positions=4096,
                tie_embeddings=True,
            ),
            num_params=2_600_000_000,
            stated=True,
        ),
        Preset(
            name="r1-8b",
            summary="Reasoning, dense",
            config=_EIGHT,
            num_params=8 * _BILLION,
            stated=True,
        ),
        Preset(
            name="r1-67b",
            summary="Reasoning, 16 experts of which 2 and a shared one are active",
            config=DecoderConfig(
                family=_OWN,
                vocab_size=102400,
                hidden_size=4096,
                num_layers=40,
                num_heads=32,
                num_kv_heads=8,
                head_dim=128,
                intermediate_size=11008,
                max_positions=16384,
                experts=ExpertsConfig(
                    num_experts=16, num_active=2, width=7680, num_shared=1, score="sigmoid"
                ),
            ),
            num_params=67 * _BILLION,
            stated=True,
        ),
        Preset(
            name="r2",
            summary="Reasoning with a context of 20K tokens",
            config=_EIGHT.replace(
                max_positions=20480,
                rope=RopeConfig(
                    theta=500000.0, scaling="yarn", factor=2.5, original_max_positions=8192
                ),
            ),
            num_params=8 * _BILLION,
            stated=False,
        ),
        Preset(
            name="vision",
            summary="Text and pictures",
            config=_SEVEN,
            num_params=7 * _BILLION,
            stated=False,
            awaits=("image encoder", "cross-modal attention"),
        ),
        Preset(
            name="mm",
            summary="Twelve modalities",
            config=_SEVEN,
            num_params=7 * _BILLION,
            stated=False,
            awaits=("modality encoders", "cross-modal attention"),
        ),
        Preset(
            name="3d",
            summary="Space-time data",
            config=_SEVEN,
            num_params=7 * _BILLION,
            stated=False,
            awaits=("volume and point-cloud encoders",),
        ),
        Preset(
            name="quantum",
            summary="Tensor-network layers",
            config=_SEVEN,
            num_params=7 * _BILLION,
            stated=False,
            awaits=("tensor-train layers",),
        ),
        Preset(
            name="self-evolving",
            summary="Continual learning",
            config=_SEVEN,
            num_params=7 * _BILLION,
            stated=False,
            awaits=("continual learning",),
        ),
    )
}


def preset(name: str) -> Preset:
    """Return a preset by name.

    Raises:
        ConfigError: no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(describe("name", "preset", f"one of {', '.join(PRESETS)}", name))
    return PRESETS[name]


def count_params(config: DecoderConfig) -> int:
    """Return the number of parameters, a tied head counted once, without allocating any."""
    with torch.device("meta"):
        model = Decoder(config)
    return sum(parameter.numel() for parameter in model.parameters())


def shrink(config: DecoderConfig, size: Literal["small", "tiny"]) -> DecoderConfig:
    """Return a config of the same make (KV groups, experts, ties, rope) with few parameters.

    small: some ten million, trains on a laptop in minutes. tiny: under one million, for tests.
    """
    hidden, layers, vocab = {"small": (384, 8, 8192), "tiny": (64, 2, 512)}[size]
    head_dim = {"small": 64, "tiny": 16}[size]
    heads = hidden // head_dim
    group = min(config.num_heads // config.num_kv_heads, heads)
    while heads % group:
        group -= 1
    experts = config.experts
    if experts is not None:
        experts = experts.replace(width=hidden // 2)
    return config.replace(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads // group,
        head_dim=head_dim,
        intermediate_size=hidden * 8 // 3 // 16 * 16,
        window_layers=tuple(layer for layer in config.window_layers if layer < layers),
        experts=experts,
    )


def fit(num_params: int, *, vocab_size: int = 49152, max_positions: int = 8192) -> DecoderConfig:
    """Return the dense decoder whose parameter count comes nearest to a target.

    Width and depth grow together (a layer per 8 to 64 channels, 128 at most), heads have 64
    channels and three share a KV head, and the head is tied: the make of SmolLM2. The width of the
    feed-forward takes up the rest.

    Raises:
        ConfigError: the target is smaller than the embedding of the smallest width.
    """
    smallest = vocab_size * 192
    if num_params < smallest:
        step = "Use a smaller vocab_size"
        raise ConfigError(describe("num_params", "fit", f"at least {smallest:,}", num_params, step))
    candidates = [
        DecoderConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            num_layers=layers,
            num_heads=hidden // 64,
            num_kv_heads=hidden // 192,
            head_dim=64,
            intermediate_size=hidden * 8 // 3,
            max_positions=max_positions,
            norm_eps=1e-5,
            tie_embeddings=True,
            rope=RopeConfig(theta=100000.0),
        )
        for hidden in range(192, 12288 + 1, 192)
        for layers in range(max(2, hidden // 64), min(128, hidden // 8) + 1)
    ]
    near = min(candidates, key=lambda config: abs(_dense_count(config) - num_params))
    # the feed-forward's width takes up what whole layers and heads leave over
    missing = (num_params - _dense_count(near)) / (3 * near.hidden_size * near.num_layers)
    width = near.intermediate_size + round(missing / 16) * 16
    return near.replace(intermediate_size=max(width, near.hidden_size))


def _dense_count(config: DecoderConfig) -> int:
    hidden, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
    attention = hidden * config.head_dim * 2 * (heads + kv_heads)
    layer = attention + 3 * hidden * config.intermediate_size + 2 * hidden
    return config.vocab_size * hidden + config.num_layers * layer + hidden
