"""The encoder: the BERT family, and sentence vectors from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.errors import ConfigError, ShapeError, describe
from deepseek.models.config import EncoderConfig, cut
from deepseek.models.layers import embedding
from deepseek.ops.attention import AttentionImpl, DenseKV, Layout, attention
from deepseek.ops.linear import Linear

if TYPE_CHECKING:
    import numpy as np

    from deepseek.data import Tokenizer

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda states: F.gelu(states, approximate="tanh"),
    "relu": F.relu,
}


class EncoderOutput(NamedTuple):
    """What a forward pass gives."""

    last_hidden_state: Tensor
    """[B, T, hidden]."""
    pooler_output: Tensor | None
    """[B, hidden]: tanh of a linear map of the first token's state; None where the checkpoint has
    no pooler."""
    hidden_states: tuple[Tensor, ...] | None
    """Embedding output and each layer's: layers + 1 tensors [B, T, hidden]; None unless asked
    for."""
    logits: Tensor | None = None
    """[B, labels]: of the classes; None where there is no classifier."""


class Runner(Protocol):
    """Computes what an encoder makes of token ids of texts."""

    def vectors(self, model: Encoder, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Return float32 [n, hidden], as `Encoder.embed` has them."""
        ...

    def logits(self, model: Encoder, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Return float32 [n, labels]."""
        ...


class Embeddings(nn.Module):
    """Sum of word, position and token type embeddings, normed."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.word_embeddings = embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = embedding(config.max_positions, config.hidden_size)
        self.token_type_embeddings = embedding(config.num_token_types, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Return [B, T, hidden]."""
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        states = self.word_embeddings(input_ids) + self.token_type_embeddings(types)
        return self.LayerNorm(states + self.position_embeddings.weight[: input_ids.shape[1]])


class SelfAttention(nn.Module):
    """Query, key and value projections and the attention between them."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.impl: AttentionImpl = "auto"
        self.num_heads = config.num_heads
        self.query = Linear(config.hidden_size, config.hidden_size)
        self.key = Linear(config.hidden_size, config.hidden_size)
        self.value = Linear(config.hidden_size, config.hidden_size)

    def forward(self, states: Tensor, layout: Layout) -> Tensor:
        """Return [B, T, hidden]."""
        rows, length, _ = states.shape
        queries, keys, values = (
            projection(states).view(rows, length, self.num_heads, -1).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        out = attention(queries, DenseKV(keys, values), layout, impl=self.impl)
        return out.transpose(1, 2).reshape(rows, length, -1)


class AddNorm(nn.Module):
    """A projection, added to the residual and normed: BERT's `output` blocks."""

    def __init__(self, inner: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.dense = Linear(inner, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        """Return [B, T, hidden]."""
        return self.LayerNorm(self.dense(states) + residual)


class EncoderLayer(nn.Module):
    """Post-norm layer of BERT (Devlin et al. 2018)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.norm_eps
        self.attention = nn.ModuleDict(
            {"self": SelfAttention(config), "output": AddNorm(hidden, hidden, eps)}
        )
        self.intermediate = nn.ModuleDict({"dense": Linear(hidden, config.intermediate_size)})
        self.output = AddNorm(config.intermediate_size, hidden, eps)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, states: Tensor, layout: Layout) -> Tensor:
        """Return [B, T, hidden]."""
        attended = self.attention["output"](self.attention["self"](states, layout), states)
        return self.output(self.activation(self.intermediate["dense"](attended)), attended)


class LayerStack(nn.Module):
    """The layers, under the name that Hugging Face folders have for them."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))


class Encoder(nn.Module):
    """A BERT-type encoder. `tokenizer` and `bundle` are set by whoever loads it.

    With `labels` in its config it classifies texts too, as transformers'
    `BertForSequenceClassification` does: a linear map of the pooler's output. Deviation: no
    dropout.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = LayerStack(config)
        self.pooler: nn.ModuleDict | None = None
        if config.has_pooler:
            self.pooler = nn.ModuleDict({"dense": Linear(config.hidden_size, config.hidden_size)})
        self.classifier: Linear | None = None
        if config.labels:
            self.classifier = Linear(config.hidden_size, len(config.labels))
        self.tokenizer: Tokenizer | None = None
        self.bundle: object | None = None
        self.runner: Runner | None = None
        """Computes `embed` and `classify` in place of the modules: `load` sets it for a scheme."""
        self._initialize()

    def _initialize(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.is_meta or "LayerNorm" in name:
                continue
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.init_std)

    def use_attention(self, impl: AttentionImpl) -> None:
        """Execute attention in every layer as `deepseek.ops.attention.attention` says."""
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.impl = impl

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.embeddings.word_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.embeddings.word_embeddings.weight.dtype

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding of the tokens (PEFT and transformers ask by this name)."""
        return self.embeddings.word_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
    ) -> EncoderOutput:
        """Return the states of every token.

        Args:
            input_ids: int64 [B, T], T at most `max_positions`.
            attention_mask: [B, T], 1 for a token, 0 for padding; None for no padding.
            token_type_ids: int64 [B, T], the segment of each token; None for segment 0.
            output_hidden_states: also return every layer's output.

        Raises:
            ShapeError: inputs that do not fit together or are longer than the model's positions.
        """
        rows, length = input_ids.shape
        if length > self.config.max_positions:
            must = f"at most {self.config.max_positions} tokens"
            raise ShapeError(describe("input_ids", "Encoder", must, length, "Cut the text"))
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            must = f"of shape {[rows, length]}, like input_ids"
            raise ShapeError(
                describe("attention_mask", "Encoder", must, list(attention_mask.shape))
            )
        mask = (
            None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        )
        layout = Layout.dense(rows, length, mask, causal=False)
        states = self.embeddings(input_ids, token_type_ids)
        kept = [states]
        for layer in self.encoder.layer:
            states = layer(states, layout)
            if output_hidden_states:
                kept.append(states)
        pooled = None if self.pooler is None else torch.tanh(self.pooler["dense"](states[:, 0]))
        logits = None if self.classifier is None else self.classifier(pooled)
        return EncoderOutput(states, pooled, tuple(kept) if output_hidden_states else None, logits)

    def use_labels(self, labels: Sequence[str]) -> None:
        """Give the encoder a fresh classifier of classes of these names, in place of what it had.

        Raises:
            ConfigError: names that are not all different, none, or an encoder without a pooler.
        """
        if not labels:
            raise ConfigError(describe("labels", "Encoder", "at least one", list(labels)))
        self.config = self.config.replace(labels=tuple(labels))
        self.classifier = Linear(self.config.hidden_size, len(labels))
        nn.init.normal_(self.classifier.weight, std=self.config.init_std)
        nn.init.zeros_(self.classifier.bias)
        self.classifier.to(self.device, self.dtype)

    def embed(self, texts: Sequence[str], *, batch_size: int = 32) -> Tensor:
        """Return one vector per text, [n, hidden], pooled and normalized as the config says,
        without gradient.

        Texts longer than `max_embed_tokens` are cut. Texts of like length share a batch.

        Raises:
            ConfigError: the model has no tokenizer, or a single text was given.
        """
        encoded = self._encoded(texts, "embed")
        if self.runner is not None:
            return torch.from_numpy(self.runner.vectors(self, encoded)).to(self.dtype)
        return self._in_batches(encoded, batch_size, self.config.hidden_size, self._pooled)

    def classify(self, texts: Sequence[str], *, batch_size: int = 32) -> list[str]:
        """Return the label of each text, without gradient; long ones are cut as by `embed`.

        Raises:
            ConfigError: the model has no classifier or no tokenizer, or a single text was given.
        """
        labels = self.config.labels
        if self.classifier is None:
            step = "Load a bundle that has one, or train one with deepseek.train.fit_classifier"
            raise ConfigError(describe("classifier", "Encoder.classify", "there", None, step))
        encoded = self._encoded(texts, "classify")
        if self.runner is not None:
            logits = torch.from_numpy(self.runner.logits(self, encoded))
        else:
            logits = self._in_batches(encoded, batch_size, len(labels), self._logits)
        return [labels[number] for number in logits.argmax(-1).tolist()]

    def _encoded(self, texts: Sequence[str], method: str) -> list[list[int]]:
        owner = f"Encoder.{method}"
        if isinstance(texts, str):
            raise ConfigError(
                describe("texts", owner, "a list of texts", texts, "Put it in a list")
            )
        if self.tokenizer is None:
            step = "Load a bundle with a tokenizer, or call the model with input_ids"
            raise ConfigError(describe("tokenizer", owner, "loaded", None, step))
        limit = self.config.max_embed_tokens or self.config.max_positions
        return [cut(ids, limit) for ids in self.tokenizer.encode_batch(list(texts))]

    def _in_batches(
        self,
        encoded: Sequence[Sequence[int]],
        batch_size: int,
        width: int,
        compute: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Return what `compute` makes of the ids and the mask of each batch, [n, width], in the
        order of the texts."""
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        found = torch.empty(len(encoded), width, dtype=self.dtype)
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                found[chosen] = compute(*self.padded([encoded[index] for index in chosen])).cpu()
        return found

    def padded(self, encoded: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return the ids of texts side by side and their mask, int64 [n, longest] each."""
        lengths = torch.tensor([len(ids) for ids in encoded])
        input_ids = torch.full((len(encoded), int(lengths.max())), self.config.pad_token_id or 0)
        for row, ids in enumerate(encoded):
            input_ids[row, : len(ids)] = torch.tensor(ids)
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        return input_ids.to(self.device), mask.long().to(self.device)

    def _pooled(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        states = self(input_ids, mask).last_hidden_state
        if self.config.pooling == "first":
            pooled = states[:, 0]
        else:
            pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).to(states)
        return F.normalize(pooled, dim=-1) if self.config.normalize else pooled

    def _logits(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        return self(input_ids, mask).logits
