"""Exports that are wrong, each in one known way: what `verify` must catch.

Every bug is planted into a copy of the source and run by our own modules, so that nothing but the
bug differs. Each is one that exporters were seen to make: swapped weights, another rotation, a mask
that is off by one, a cache that loses a position, a batch whose rows mix.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.export.formats import Floats, Ids
from deepseek.export.verifying.source import ModelReader
from deepseek.models import Decoder, Encoder
from deepseek.models.context import PassContext
from deepseek.models.layers import RMSNorm
from deepseek.ops.attention import DenseKV, KVCache


@dataclasses.dataclass(frozen=True)
class Bug:
    """A way in which an export can be wrong."""

    name: str
    plant: Callable[[Any], ModelReader]
    """Returns the reader of a wrong export of a model, which is left as it is."""
    layer: int | None = None
    """Where it is, from 0 and from the end where negative; None where no layer's pass shows it."""
    kinds: frozenset[str] = frozenset()
    """Kinds of cases of which one at least must fail; empty for any."""
    beyond: int = 0
    """Tokens that a text must have for the bug to show."""


def of_weights(
    name: str, change: Callable[[Decoder], None], layer: int | None = None, **rest: Any
) -> Bug:
    """Return a bug that changes weights or settings of the model."""

    def plant(model: Decoder) -> ModelReader:
        wrong = copy.deepcopy(model)
        with torch.no_grad():
            change(wrong)
        return ModelReader(wrong)

    return Bug(name, plant, layer, **rest)


def of_reader(name: str, kind: type[ModelReader], **rest: Any) -> Bug:
    """Return a bug of how the model is run."""
    return Bug(name, lambda model: kind(copy.deepcopy(model)), **rest)


def _swap(first: nn.Module, second: nn.Module) -> None:
    one, other = cast(Tensor, first.weight), cast(Tensor, second.weight)
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)


def _layer(model: Decoder, number: int) -> Any:
    return model.model.layers[number]


def _swap_gate_and_up(number: int) -> Callable[[Decoder], None]:
    return lambda model: _swap(
        _layer(model, number).mlp.gate_proj, _layer(model, number).mlp.up_proj
    )


def _swap_keys_and_values(model: Decoder) -> None:
    _swap(_layer(model, 1).self_attn.k_proj, _layer(model, 1).self_attn.v_proj)


def _swap_layers(model: Decoder) -> None:
    _swap(_layer(model, 0).mlp.down_proj, _layer(model, 1).mlp.down_proj)


def _swap_norms(model: Decoder) -> None:
    _swap(_layer(model, 1).input_layernorm, _layer(model, 1).post_attention_layernorm)


def _swap_heads(model: Decoder) -> None:
    weight, dim = _layer(model, 0).self_attn.q_proj.weight, model.config.head_dim
    weight.copy_(torch.cat([weight[dim : 2 * dim], weight[:dim], weight[2 * dim :]]))


def _turn_by(factor: float) -> Callable[[Decoder], None]:
    def change(model: Decoder) -> None:
        rope = model.config.rope
        model.config = model.config.replace(rope=rope.replace(theta=rope.theta * factor))

    return change


def _turn_in_pairs(model: Decoder) -> None:
    """Order rotated channels in pairs, as GGUF has them, for a runtime that turns halves."""
    layers: Any = model.model.layers
    for layer in layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            heads = part.weight.shape[0] // model.config.head_dim
            halves = part.weight.reshape(heads, 2, model.config.head_dim // 2, -1)
            part.weight.copy_(halves.swapaxes(1, 2).reshape(part.weight.shape).clone())


def _eps(factor: float, only: int | None = None) -> Callable[[Decoder], None]:
    def change(model: Decoder) -> None:
        place = model if only is None else _layer(model, only)
        for module in place.modules():
            if isinstance(module, RMSNorm):
                module.eps = module.eps * factor

    return change


def _scale_group(number: int, factor: float) -> Callable[[Decoder], None]:
    def change(model: Decoder) -> None:
        _layer(model, number).mlp.down_proj.weight[3, :32].mul_(factor)

    return change


def _zero_point(model: Decoder) -> None:
    """Move a group of one row by a sixteenth of its range: a zero point that is off by one."""
    group = _layer(model, 0).self_attn.v_proj.weight[1, :32]
    group.add_((group.max() - group.min()) / 15)


def _swap_nibbles(model: Decoder) -> None:
    row = _layer(model, 1).mlp.up_proj.weight[2]
    row.copy_(row.reshape(-1, 2).flip(1).reshape(-1).clone())


def _drop_bias(model: Decoder) -> None:
    _layer(model, 1).self_attn.k_proj.bias = None
    _layer(model, 1).self_attn.v_proj.bias = None


def _untie(model: Decoder) -> None:
    """Give the head weights of its own that are a little older than the embedding's."""
    weight = model.model.embed_tokens.weight
    fresh = nn.Parameter(weight * 1.01 + 0.001 * weight.roll(1, 0))
    model.lm_head.weight = fresh


def _drop_norm(model: Decoder) -> None:
    model.model.norm.weight.fill_(1.0)


def _embedding_row(which: Callable[[Decoder], int]) -> Callable[[Decoder], None]:
    def change(model: Decoder) -> None:
        table = model.model.embed_tokens.weight
        if model.config.tie_embeddings:
            model.lm_head.weight = nn.Parameter(table.clone())
        row = which(model)
        table[row] = table[row - 1]

    return change


def _swap_head_rows(model: Decoder) -> None:
    head = model.lm_head.weight.clone()
    head[-2:] = head[-2:].flip(0)
    model.lm_head.weight = nn.Parameter(head)


def _round_layer(number: int) -> Callable[[Decoder], None]:
    def change(model: Decoder) -> None:
        for parameter in _layer(model, number).parameters():
            parameter.copy_(parameter.bfloat16().float())

    return change


def _gelu(model: Decoder) -> None:
    class Gelu(nn.Module):
        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, states: Tensor) -> Tensor:
            gated = F.gelu(self.mlp.gate_proj(states)) * self.mlp.up_proj(states)
            return self.mlp.down_proj(gated)

    _layer(model, 0).mlp = Gelu(_layer(model, 0).mlp)


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What a query sees in a wrong mask: keys up to `ahead` places behind itself, from `first` on,
    at most `most` of them."""

    ahead: int = 0
    first: int = 0
    most: int | None = None
    pads: bool = False
    """Whether padding is seen as if it were text."""


def _see(seen: _Seen, number: int = 0) -> Callable[[Decoder], None]:
    def change(model: Decoder) -> None:
        _layer(model, number).self_attn = _Masked(_layer(model, number).self_attn, seen)

    return change


class _Masked(nn.Module):
    """Attention under a wrong mask, where there is no cache."""

    def __init__(self, inner: nn.Module, seen: _Seen) -> None:
        super().__init__()
        self.inner, self.seen = inner, seen

    def forward(self, states: Tensor, context: PassContext) -> Tensor:
        if context.cache is not None:
            return self.inner(states, context)
        return self.inner(states, _Context(context, self.seen))


class _Context(PassContext):
    def __init__(self, inner: PassContext, seen: _Seen) -> None:
        values = {field.name: getattr(inner, field.name) for field in dataclasses.fields(inner)}
        super().__init__(**values)
        object.__setattr__(self, "seen", seen)

    def attend(
        self,
        layer: int,
        queries: Tensor,
        kv: object,
        gates: Tensor | None,
        scale: float | None = None,
    ) -> Tensor:
        assert isinstance(kv, DenseKV)
        seen: _Seen = vars(self)["seen"]
        length = queries.shape[2]
        away = torch.arange(length)[:, None] - torch.arange(length)
        allowed = away >= -seen.ahead
        allowed &= (torch.arange(length) >= seen.first) | (away == 0)
        if seen.most is not None:
            allowed &= away < seen.most
        allowed = allowed[None, None]
        if self.layout.key_mask is not None and not seen.pads:
            allowed = allowed & self.layout.key_mask[:, None, None, :length]
        allowed = allowed | (away == 0)
        share = queries.shape[1] // kv.keys.shape[1]
        keys, values = (part.repeat_interleave(share, 1) for part in (kv.keys, kv.values))
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed)


class _IgnoresMask(ModelReader):
    """Takes padding for text."""

    def forward(self, ids: Ids, mask: Ids) -> Floats:
        return super().forward(ids, np.ones_like(mask))


class _PadsRight(ModelReader):
    """Takes every padding to be on the right: counts the tokens and reads the first ones."""

    def forward(self, ids: Ids, mask: Ids) -> Floats:
        counted = np.arange(ids.shape[1]) < mask.sum(1, keepdims=True)
        return super().forward(ids, counted.astype(np.int64))


class _CacheReader(ModelReader):
    """Reads on at a place that is off by `shift`, having lost `lost` tokens."""

    shift, lost = 0, 0

    def step(self, ids: Ids, state: object | None) -> tuple[Floats, object]:
        if state is None:
            return super().step(ids, state)
        assert isinstance(self.model, Decoder)
        earlier = cast(KVCache, state)
        with torch.inference_mode():
            cache = copy.deepcopy(earlier)
            read = cache.lengths[0]
            cache = self._with_room(ids, earlier)
            cache.truncate([max(0, read - self.lost)] * ids.shape[0])
            places = torch.arange(read, read + ids.shape[1])[None] + self.shift
            output = self.model(torch.from_numpy(ids), position_ids=places, cache=cache)
            return output.logits.float().numpy(), cache

    def _with_room(self, ids: Ids, earlier: KVCache) -> KVCache:
        assert isinstance(self.model, Decoder)
        from deepseek.export.verifying.source import _refill

        cache = self.model.new_cache(ids.shape[0], earlier.lengths[0] + ids.shape[1])
        _refill(cache, earlier)
        return cache


class _CacheAhead(_CacheReader):
    shift = 1


class _CacheBehind(_CacheReader):
    shift = -1


class _CacheForgets(_CacheReader):
    lost = 1


class _CacheChanges(ModelReader):
    """Appends to the state that it was given."""

    def step(self, ids: Ids, state: object | None) -> tuple[Floats, object]:
        assert isinstance(self.model, Decoder)
        with torch.inference_mode():
            cache = cast("KVCache | None", state)
            if cache is None:
                cache = self.model.new_cache(ids.shape[0], self.max_tokens)
            return self.model(torch.from_numpy(ids), cache=cache).logits.float().numpy(), cache


class _CacheOfRowZero(ModelReader):
    """Lets every row of a batch read on behind the first row's text."""

    def step(self, ids: Ids, state: object | None) -> tuple[Floats, object]:
        found, new = super().step(ids, state)
        with torch.inference_mode():
            for layer in cast(KVCache, new).layers:
                for pages in (layer.key_pages, layer.value_pages):
                    rows = pages.unflatten(0, (ids.shape[0], -1))
                    rows[1:] = rows[:1].clone()
        return found, new


class _RowsMix(ModelReader):
    """Answers for the last row of a batch what the first one asked."""

    def forward(self, ids: Ids, mask: Ids) -> Floats:
        found = super().forward(ids, mask)
        if len(ids) > 1:
            found[-1] = found[0]
        return found


class _LargeBatches(ModelReader):
    """Is a little off for more than four rows."""

    def forward(self, ids: Ids, mask: Ids) -> Floats:
        found = super().forward(ids, mask)
        return found * np.float32(1.01) if len(ids) > 4 else found


class _OneToken(ModelReader):
    """Is wrong for a text of a single token."""

    def forward(self, ids: Ids, mask: Ids) -> Floats:
        found = super().forward(ids, mask)
        return found[..., ::-1].copy() if ids.shape[1] == 1 else found


class _Tail(ModelReader):
    """Leaves the last place of a length that is no multiple of 16 as memory was."""

    def forward(self, ids: Ids, mask: Ids) -> Floats:
        found = super().forward(ids, mask)
        if ids.shape[1] > 16 and ids.shape[1] % 16 == 1:
            found[:, -1] = 0.0
        return found


class _Overflows(ModelReader):
    """Has infinities where float16 would."""

    def forward(self, ids: Ids, mask: Ids) -> Floats:
        found = super().forward(ids, mask)
        states = self.layers(ids, mask)[0]
        largest = np.abs(states).max()
        where = np.abs(states).max(-1) >= largest
        return np.where(where[..., None] & (ids.shape[1] > 8), np.float32(np.nan), found)


class _BadHead(ModelReader):
    """Gives logits of half the precision."""

    def forward(self, ids: Ids, mask: Ids) -> Floats:
        return torch.from_numpy(super().forward(ids, mask)).bfloat16().float().numpy()


def _beyond(tokens: int) -> Bug:
    """Return the bug of positions that stand still behind so many."""

    class Beyond(ModelReader):
        def forward(self, ids: Ids, mask: Ids) -> Floats:
            places = torch.arange(ids.shape[1]).clamp(max=tokens)[None]
            with torch.inference_mode():
                given = torch.from_numpy(ids), torch.from_numpy(mask)
                return self.model(*given, position_ids=places).logits.float().numpy()

    return of_reader(f"positions stand still behind {tokens}", Beyond, beyond=tokens)


def usual_bugs(model: Decoder, beyond: int) -> list[Bug]:
    """Return the bugs that can be planted into a model.

    Args:
        model: of at least two layers; a bug of what it lacks (biases) is left out.
        beyond: tokens behind which positions stand still, and that a window is wide.
    """
    last = model.config.num_layers - 1
    found = [*_weight_bugs(last), *_mask_bugs(beyond), *_run_bugs(), _beyond(beyond)]
    if model.config.qkv_bias:
        found.append(of_weights("a bias is missing", _drop_bias, 1))
    if model.config.tie_embeddings:
        found.append(of_weights("the head is not the embedding", _untie))
    return found


def _weight_bugs(last: int) -> Sequence[Bug]:
    return [
        of_weights("gate and up swapped", _swap_gate_and_up(0), 0),
        of_weights("gate and up swapped in the last layer", _swap_gate_and_up(last), last),
        of_weights("down of two layers swapped", _swap_layers, 0),
        of_weights("norms of a layer swapped", _swap_norms, 1),
        of_weights("two heads' queries swapped", _swap_heads, 0),
        of_weights("rope theta ten times too large", _turn_by(10.0), 0),
        of_weights("rope theta one per cent too large", _turn_by(1.01), 0),
        of_weights("rope turns pairs, not halves", _turn_in_pairs, 0),
        of_weights("eps ten times too small", _eps(0.1), 0),
        of_weights("eps ten times too large", _eps(10.0), 0),
        of_weights("eps of one layer ten times too large", _eps(10.0, 1), 1),
        of_weights("scale of a group 1.5 times too large", _scale_group(0, 1.5), 0),
        of_weights("scale of a group zero", _scale_group(last, 0.0), last),
        of_weights("zero point of a group off by one", _zero_point, 0),
        of_weights("nibbles of a row swapped", _swap_nibbles, 1),
        of_weights("last norm's weight missing", _drop_norm, last),
        of_weights("embedding row 0 wrong", _embedding_row(lambda model: 0), 0),
        of_weights(
            "last embedding row wrong", _embedding_row(lambda m: m.config.vocab_size - 1), 0
        ),
        of_weights(
            "one embedding row wrong", _embedding_row(lambda m: m.config.vocab_size // 3), 0
        ),
        of_weights("two rows of the head swapped", _swap_head_rows),
        of_weights("a layer rounded to bfloat16", _round_layer(1), 1),
        of_weights("gelu in the place of silu", _gelu, 0),
    ]


def _mask_bugs(beyond: int) -> Sequence[Bug]:
    return [
        of_weights("a token sees the next", _see(_Seen(ahead=1)), 0),
        of_weights("a token sees the next, last layer", _see(_Seen(ahead=1), -1), -1),
        of_weights("the first token is not seen", _see(_Seen(first=1)), 0),
        of_weights("a window, one too narrow", _see(_Seen(most=beyond)), 0, beyond=beyond),
        of_weights("padding is seen", _see(_Seen(pads=True)), 0, kinds=frozenset({"padding"})),
    ]


def _run_bugs() -> Sequence[Bug]:
    pads, pieces = frozenset({"padding"}), frozenset({"cache", "cache-batch"})
    return [
        of_reader("mask ignored", _IgnoresMask, kinds=pads),
        of_reader("padding side ignored", _PadsRight, kinds=pads),
        of_reader("cache one position ahead", _CacheAhead, kinds=pieces),
        of_reader("cache one position behind", _CacheBehind, kinds=pieces),
        of_reader("cache loses a token", _CacheForgets, kinds=pieces),
        of_reader("a state is changed", _CacheChanges, kinds=pieces),
        of_reader("cache of row 0 for all", _CacheOfRowZero, kinds=frozenset({"cache-batch"})),
        of_reader("rows of a batch mix", _RowsMix, kinds=frozenset({"batch"})),
        of_reader("off for more than four rows", _LargeBatches, kinds=frozenset({"batch"})),
        of_reader("wrong for a single token", _OneToken),
        of_reader("tail of 16 left out", _Tail),
        of_reader("not a number at the largest states", _Overflows),
        of_reader("logits rounded to bfloat16", _BadHead),
    ]


class _EncoderWithoutMask(ModelReader):
    def forward(self, ids: Ids, mask: Ids) -> Floats:
        return super().forward(ids, np.ones_like(mask))


class _EncoderRowsMix(ModelReader):
    def forward(self, ids: Ids, mask: Ids) -> Floats:
        found = super().forward(ids, mask)
        return found[::-1].copy() if len(ids) > 1 else found


def of_encoder_bugs(model: Encoder) -> list[Bug]:
    """Return the bugs that can be planted into an encoder."""

    def shifted(wrong: Encoder) -> None:
        table = wrong.embeddings.position_embeddings.weight
        table.copy_(table.roll(1, 0))

    def another_type(wrong: Encoder) -> None:
        table = wrong.embeddings.token_type_embeddings.weight
        table[0] = table[1]

    def approximate(wrong: Encoder) -> None:
        layers: Any = wrong.encoder.layer
        for layer in layers:
            layer.activation = lambda states: F.gelu(states, approximate="tanh")

    def eps(wrong: Encoder) -> None:
        for module in wrong.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5

    def swapped_labels(wrong: Encoder) -> None:
        assert wrong.classifier is not None
        wrong.classifier.weight.copy_(wrong.classifier.weight.roll(1, 0))

    changes: dict[str, Callable[[Encoder], None]] = {
        "positions off by one": shifted,
        "another token type": another_type,
        "gelu by tanh": approximate,
        "eps too large": eps,
    }
    if model.classifier is not None:
        changes["labels swapped"] = swapped_labels
    padded, batches = frozenset({"padding"}), frozenset({"batch", "padding"})
    return [
        *(_of_encoder(name, change) for name, change in changes.items()),
        of_reader("mask ignored", _EncoderWithoutMask, kinds=padded),
        of_reader("rows of a batch mix", _EncoderRowsMix, kinds=batches),
    ]


def _of_encoder(name: str, change: Callable[[Encoder], None]) -> Bug:
    def plant(model: Decoder | Encoder) -> ModelReader:
        wrong = copy.deepcopy(model)
        assert isinstance(wrong, Encoder)
        with torch.no_grad():
            change(wrong)
        return ModelReader(wrong)

    return Bug(name, plant)
