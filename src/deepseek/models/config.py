"""What a model is made of, as data: the decoder, its parts, and the encoder."""

from __future__ import annotations

import dataclasses
from typing import Literal

from deepseek.config import Config
from deepseek.errors import ConfigError, describe


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig(Config):
    """Rotary position embedding and its rule for contexts beyond the training length.

    Source: RoFormer (Su et al. 2021); `linear` Chen et al. 2023; `dynamic` the NTK-aware rule by
    sequence length; `yarn` Peng et al. 2023; `llama3` the Llama 3.1 release. Formulas as in
    `transformers`.
    """

    theta: float = 10000.0
    """Base of the geometric series of wavelengths."""
    scaling: Literal["default", "linear", "dynamic", "yarn", "llama3"] = "default"
    factor: float = 1.0
    """How many times the original context is stretched."""
    original_max_positions: int | None = None
    """Context of the original training, in tokens (yarn, llama3); None for the model's
    `max_positions`."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """Factor on cosines and sines (yarn); None for the paper's `0.1 ln(factor) + 1`."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """Round the bounds of yarn's ramp to whole channels."""
    interleaved: bool = False
    """The checkpoint orders rotated channels in pairs (DeepSeek) and not in halves (Llama)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig(Config):
    """Multi-head latent attention: keys and values are expanded from one small latent per token.

    Source: DeepSeek-V2 (2405.04434), section 2.1.
    """

    query_rank: int | None = None
    """Rank of the query projection; None for a full one."""
    kv_rank: int = 512
    """Channels of the latent."""
    nope_dim: int = 128
    """Channels of a head's query and key without a position."""
    rope_dim: int = 64
    """Channels of a head's query, and of the shared key, that are rotated."""
    value_dim: int = 128
    """Channels of a head's value."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig(Config):
    """A mixture of experts in place of the feed-forward of some layers.

    Source: DeepSeekMoE (2401.06066) for shared and fine-grained experts; DeepSeek-V3 (2412.19437),
    section 2.1.2, for sigmoid scores, the balancing bias and groups.
    """

    num_experts: int
    """Routed experts."""
    num_active: int
    """Routed experts per token."""
    width: int
    """Hidden channels of one expert."""
    num_shared: int = 0
    """Experts that every token passes, as one feed-forward of `num_shared * width` channels."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become weights; `sigmoid` also has the balancing bias."""
    normalize: bool = True
    """Divide the chosen weights by their sum."""
    scale: float = 1.0
    """Factor on the chosen weights."""
    num_groups: int = 1
    """Groups the experts are divided into; a token uses `num_active_groups` of them."""
    num_active_groups: int = 1
    dense_layers: tuple[int, ...] = ()
    """Layers that keep a dense feed-forward."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_active <= self.num_experts:
            must = f"between 1 and num_experts ({self.num_experts})"
            raise ConfigError(describe("num_active", "ExpertsConfig", must, self.num_active))
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            must = f"a divisor of num_experts ({self.num_experts})"
            raise ConfigError(describe("num_groups", "ExpertsConfig", must, self.num_groups))
        if self.num_groups > 1 and self.num_experts // self.num_groups < 2:
            must = f"at most half of num_experts ({self.num_experts})"
            raise ConfigError(describe("num_groups", "ExpertsConfig", must, self.num_groups))
        if not 1 <= self.num_active_groups <= self.num_groups:
            must = f"between 1 and num_groups ({self.num_groups})"
            got = self.num_active_groups
            raise ConfigError(describe("num_active_groups", "ExpertsConfig", must, got))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pattern(Config):
    """The union of the blocks at the start of a text, the recent ones, every so many-th one, and a
    random share of the rest, drawn once for each layer and place.

    Source: sinks and a window as StreamingLLM (2309.17453), dilation as Longformer (2004.05150,
    section 3.1), random blocks as BigBird (2007.14062, section 2); here by blocks, and causal.
    """

    first: int = 1
    """Blocks at the start of a text that are always seen."""
    recent: int = 4
    """Blocks before a query that are always seen, its own included."""
    every: int | None = None
    """Distance in blocks between those that are seen all the way back; None for none."""
    sparsity: float = 1.0
    """Share of the blocks left by these that is not seen; 0 for dense attention."""
    seed: int = 0
    """Of the random blocks."""
    block_size: int = 64
    """Slots of a block, the page size of the cache."""

    def __post_init__(self) -> None:
        if self.first < 0 or self.recent < 1 or (self.every is not None and self.every < 1):
            got = f"first {self.first}, recent {self.recent}, every {self.every}"
            must = "from 0, from 1 and from 1 on"
            raise ConfigError(describe("first, recent and every", "Pattern", must, got))
        if not 0 <= self.sparsity <= 1:
            raise ConfigError(describe("sparsity", "Pattern", "from 0 to 1", self.sparsity))
        if self.seed < 0 or self.block_size < 1:
            got = f"seed {self.seed}, block_size {self.block_size}"
            raise ConfigError(describe("seed and block_size", "Pattern", "from 0 and 1 on", got))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateConfig(Config):
    """A gate on each query head's attention output, before the output projection:
    `2 sigmoid(W x + b)` of the layer's normed input x.

    With W and b zero, as they begin, every gate is exactly 1, and a model that was trained without
    gates computes what it did.

    Source: gated attention (2505.06708), section 2.2: by head, behind the values, sigmoid. The
    factor 2 is ours. A division by sigmoid(b) would be 1 at the start too, but leaves a gate that
    a bias cannot close.
    """

    threshold: float = 0.0
    """Outside training a head whose gate is below it gives zeros, and is not computed; 0 for
    never."""

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, float | int) or not 0 <= self.threshold < 2:
            must = "from 0 to below 2, which no gate reaches"
            raise ConfigError(describe("threshold", "GateConfig", must, self.threshold))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(Config):
    """A decoder-only language model: every family this package runs is a point in this space."""

    family: str = "llama"
    """Key of the family table: how the model is named and laid out in a Hugging Face folder."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    """Hidden channels of a dense feed-forward."""
    max_positions: int = 2048
    """Context the model was made for, in tokens."""
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    """The head is the embedding."""
    positions: Literal["rope", "alibi"] = "rope"
    rope: RopeConfig = RopeConfig()
    qkv_bias: bool = False
    output_bias: bool = False
    """Bias of the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm of each head's query and key before rotation."""
    window: int | None = None
    """Sliding window in tokens, the own token included, of the layers in `window_layers`."""
    window_layers: tuple[int, ...] = ()
    pattern: Pattern | None = None
    """What every layer sees by place alone, where attention is sparse; only the family
    `deepseek_stack` has a place for it."""
    gates: GateConfig | None = None
    """Of the attention heads; only the family `deepseek_stack` has a place for them."""
    latent: LatentConfig | None = None
    experts: ExpertsConfig | None = None
    init_std: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(
                    describe(name, "DecoderConfig", "at least 1", getattr(self, name))
                )
        if self.num_heads % self.num_kv_heads:
            must = f"a divisor of num_heads ({self.num_heads})"
            raise ConfigError(describe("num_kv_heads", "DecoderConfig", must, self.num_kv_heads))
        rotated = self.head_dim if self.latent is None else self.latent.rope_dim
        if self.positions == "rope" and rotated % 2:
            raise ConfigError(describe("head_dim", "DecoderConfig", "even with rope", rotated))
        if self.window is not None and self.window < 1:
            raise ConfigError(describe("window", "DecoderConfig", "at least 1", self.window))
        if self.window is not None and self.pattern is not None:
            must = "None where there is a window, of which pattern.recent is one"
            raise ConfigError(describe("pattern", "DecoderConfig", must, self.pattern))
        if self.positions == "alibi" and self.latent is not None:
            must = "rope for latent attention, whose shared key carries the position"
            raise ConfigError(describe("positions", "DecoderConfig", must, self.positions))

    @property
    def model_type(self) -> str:
        """The family, by the name PEFT and transformers ask for."""
        return self.family

    def has_experts(self, layer: int) -> bool:
        """Return whether the feed-forward of a layer is a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(Config):
    """A bidirectional encoder of the BERT family, with the pooling that makes a sentence vector of
    its states."""

    family: str = "bert"
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int = 512
    num_token_types: int = 2
    norm_eps: float = 1e-12
    activation: Literal["gelu", "gelu_new", "relu"] = "gelu"
    has_pooler: bool = True
    """The checkpoint carries the first token's pooling layer."""
    labels: tuple[str, ...] = ()
    """Names of the classes that the classifier tells apart, in the order of its logits; empty for
    no classifier."""
    pooling: Literal["mean", "first"] = "mean"
    """How `embed` makes one vector of a text's states."""
    normalize: bool = True
    """`embed` scales vectors to length 1."""
    max_embed_tokens: int | None = None
    """`embed` cuts texts to this many tokens; None for `max_positions`."""
    init_std: float = 0.02
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_positions"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    describe(name, "EncoderConfig", "at least 1", getattr(self, name))
                )
        if self.hidden_size % self.num_heads:
            must = f"a multiple of num_heads ({self.num_heads})"
            raise ConfigError(describe("hidden_size", "EncoderConfig", must, self.hidden_size))
        if self.labels and not self.has_pooler:
            must = "True where there are labels: the classifier reads its output"
            raise ConfigError(describe("has_pooler", "EncoderConfig", must, self.has_pooler))
        if len(set(self.labels)) < len(self.labels):
            raise ConfigError(describe("labels", "EncoderConfig", "all different", self.labels))


def cut(ids: list[int], limit: int) -> list[int]:
    """Return the first token ids of a text and the one that ends it, `limit` in all."""
    return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]
