"""The side that is trusted: our model, run by its modules in float32, as a reader of itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from deepseek.errors import ConfigError, describe
from deepseek.export.formats import Floats, Ids, Kind
from deepseek.export.verifying.cases import Space
from deepseek.export.verifying.texts import TEXTS
from deepseek.models import Decoder, Encoder

if TYPE_CHECKING:
    from deepseek.data import Tokenizer
    from deepseek.export.formats import Reader
    from deepseek.ops.attention import KVCache

NUM_OUTLIERS = 16


class ModelReader:
    """A decoder or encoder of ours, run by its modules in the dtype that it has.

    Args:
        model: on the CPU.
        max_batch: rows that are asked of it at most.
    """

    def __init__(self, model: Decoder | Encoder, *, max_batch: int = 8) -> None:
        self.model = model
        self.name = f"deepseek {str(model.dtype).removeprefix('torch.')}"
        self.kind: Kind = kind_of_model(model)
        self.max_tokens = model.config.max_positions
        self.max_batch = max_batch
        self.has_cache = isinstance(model, Decoder)

    def forward(self, ids: Ids, mask: Ids) -> Floats:
        """Return what the model answers; see `Reader`."""
        with torch.inference_mode():
            output = self.model(torch.from_numpy(ids), torch.from_numpy(mask))
            if self.kind == "encoder":
                return _floats(output.last_hidden_state)
            return _floats(output.logits)

    def step(self, ids: Ids, state: object | None) -> tuple[Floats, object]:
        """Read more tokens; see `Reader`. The state before is copied, as it must not change."""
        assert isinstance(self.model, Decoder)
        rows, length = ids.shape
        with torch.inference_mode():
            read = 0 if state is None else cast("KVCache", state).lengths[0]
            cache = self.model.new_cache(rows, read + length)
            if state is not None:
                _refill(cache, cast("KVCache", state))
            output = self.model(torch.from_numpy(ids), cache=cache)
            return _floats(output.logits), cache

    def layers(self, ids: Ids, mask: Ids) -> Sequence[Floats]:
        """Return the states behind each layer; see `Reader`."""
        with torch.inference_mode():
            output = self.model(
                torch.from_numpy(ids), torch.from_numpy(mask), output_hidden_states=True
            )
            return [_floats(states) for states in output.hidden_states[1:]]


def _refill(cache: KVCache, earlier: KVCache) -> None:
    """Copy what an earlier cache of the same rows holds into an empty one that is no smaller."""
    for new, old in zip(cache.layers, earlier.layers, strict=True):
        rows = cache.num_rows
        for fresh, held in ((new.key_pages, old.key_pages), (new.value_pages, old.value_pages)):
            kept = held.shape[0] // rows
            by_row = fresh.unflatten(0, (rows, -1))
            by_row[:, :kept] = held.unflatten(0, (rows, -1))
    cache.tokens[:, : earlier.capacity] = earlier.tokens
    cache.lengths = list(earlier.lengths)


def _floats(values: Tensor) -> Floats:
    return values.float().numpy()


def kind_of_model(model: Decoder | Encoder) -> Kind:
    """Return what a model answers with."""
    if isinstance(model, Decoder):
        return "decoder"
    return "encoder" if model.classifier is None else "classifier"


class JitteredReader(ModelReader):
    """A reader whose embeddings, and what goes into and comes out of its products, are off by half
    a last bit of float32, drawn by a seed: what comes of it is what another order of sums may make
    of the model's answers."""

    def __init__(self, model: Decoder | Encoder, seed: int) -> None:
        super().__init__(model)
        self.seed = seed

    def forward(self, ids: Ids, mask: Ids) -> Floats:
        """Return what the model answers; see `Reader`."""
        draw = torch.Generator().manual_seed(self.seed)

        def jitter(states: Tensor) -> Tensor:
            drawn = torch.rand(states.shape, generator=draw, dtype=states.dtype)
            return states * (1 + (drawn - 0.5) * 2.0**-22)

        def before(module: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
            return jitter(given[0])

        def after(module: nn.Module, given: object, states: Tensor) -> Tensor:
            return jitter(states)

        handles = []
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                handles.append(module.register_forward_pre_hook(before))
            if isinstance(module, nn.Embedding | nn.Linear):
                handles.append(module.register_forward_hook(after))
        try:
            return super().forward(ids, mask)
        finally:
            for handle in handles:
                handle.remove()


def exact(model: Decoder | Encoder) -> ModelReader:
    """Return a reader of the same weights in float64, which tells how far float32 itself is off."""
    return ModelReader(copy.deepcopy(model).double())


def space_of(model: Decoder | Encoder, reader: Reader, longest: int) -> Space:
    """Return what can be asked of a model and a reader of its export.

    Args:
        model: the source.
        reader: of the export.
        longest: most tokens of a row.

    Raises:
        ConfigError: they do not answer with the same kind of numbers.
    """
    kind = kind_of_model(model)
    if reader.kind != kind:
        must = f"of its source's kind, {kind}"
        raise ConfigError(describe("export", "verify", must, reader.kind))
    weights = model.get_input_embeddings().weight
    vocab_size = weights.shape[0]
    return Space(
        vocab_size=vocab_size,
        max_tokens=min(model.config.max_positions, reader.max_tokens, longest),
        max_batch=reader.max_batch,
        pads_left=kind == "decoder",
        has_cache=reader.has_cache,
        boundaries=_boundaries(model.tokenizer, vocab_size),
        outliers=_outliers(weights),
        texts=_texts(model.tokenizer, vocab_size),
    )


def _boundaries(tokenizer: Tokenizer | None, vocab_size: int) -> tuple[int, ...]:
    special = () if tokenizer is None else sorted(tokenizer.special_token_ids)
    last = () if tokenizer is None else (tokenizer.vocab_size - 1,)
    ids = dict.fromkeys((0, vocab_size - 1, 1, vocab_size - 2, *last, *special))
    return tuple(token for token in ids if 0 <= token < vocab_size)


def _outliers(weights: nn.Parameter | Tensor) -> tuple[int, ...]:
    values = weights.detach().float()
    norms, largest = values.norm(dim=1), values.abs().amax(dim=1)
    count = min(NUM_OUTLIERS, len(norms))
    chosen = [norms.topk(count).indices, (-norms).topk(count).indices, largest.topk(count).indices]
    return tuple(dict.fromkeys(torch.cat(chosen).tolist()))


def _texts(tokenizer: Tokenizer | None, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    if tokenizer is None:
        return ()
    encoded = (tuple(tokenizer.encode(text)) for text in TEXTS)
    return tuple(ids for ids in encoded if ids and max(ids) < vocab_size)
