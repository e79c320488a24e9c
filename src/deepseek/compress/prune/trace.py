"""Which channels of a model's parameters are tied, found by running it once and watching."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek.compress.prune.channels import FIXED, Channels, Labels

Args = Sequence[Any]
Dims = list[Labels | None]
"""For each dimension its channels; None for one that is no matter of channels, or whose channels
all stand or fall with another dimension's."""


@dataclasses.dataclass(frozen=True)
class Traced:
    """What is known of a tensor."""

    dims: Dims
    tags: frozenset[int] = frozenset()
    """Channels with which the whole tensor stands or falls: of an expert's weights, its place."""
    elements: Tensor | None = None
    """The channel that each value was picked from, where values were picked by place."""
    is_parameter: bool = False
    """It is one, or a view of one."""


class Tracer(TorchDispatchMode):
    """Watches the operations that a model is made of, as ATen knows them, and joins channels.

    What moves values (views, slices, concatenations, indexing) is run on the numbers of channels in
    their place, so it needs no rule of its own. What computes value by value joins what meets; a
    product joins the dimensions that it sums over, and lets the others be. A dimension that is
    divided in several (heads and their channels) keeps the first as its unit: the channels inside
    stay together. What an unknown operation touches is fixed.

    Source: the dependency graph of DepGraph (2301.12900), section 3. Deviations: from dispatched
    operations and not from autograd's nodes, so that views, splits and experts are seen as they
    are, and no gradient is needed.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        """Give channels to every dimension of the parameters and buffers; a tied one has one name.

        Args:
            parameters: by name; the same tensor under two names is one, under the first.
        """
        super().__init__()
        self.channels = Channels()
        self.read: set[tuple[str, int]] = set()
        """Dimensions of parameters that a product sums over: the inputs of what is computed."""
        self._known: dict[int, Traced] = {}
        self._alive: list[Tensor] = []  # an identity stays one tensor's
        for name, tensor in parameters.items():
            if id(tensor) not in self._known:
                dims: Dims = [
                    self.channels.add(name, dim, size) for dim, size in enumerate(tensor.shape)
                ]
                self._set(tensor, Traced(dims, is_parameter=True))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and note what it did to channels."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        known = [self._of(each) for each in _tensors((args, kwargs))]
        if any(_says_something(each) for each in known):
            self._note(func, args, kwargs, out)
        return out

    def dims(self, tensor: Tensor) -> Dims:
        """Return what is known of the dimensions of a tensor that the model made."""
        return self._of(tensor).dims

    def _note(self, func: Any, args: Args, kwargs: dict[str, Any], out: Any) -> None:
        name = func.overloadpacket.__name__
        if name in _MOVES:
            self._move(func, args, kwargs, out)
        elif name in _RULES:
            getattr(self, f"_{_RULES[name]}")(args, kwargs, out)
        elif torch.Tag.pointwise in func.tags or name in _POINTWISE:
            self._by_value(_tensors((args, kwargs)), out)
        else:
            self._fix((args, kwargs))

    def _of(self, tensor: Tensor) -> Traced:
        found = self._known.get(id(tensor))
        return Traced([None] * tensor.dim()) if found is None else found

    def _set(self, tensor: Tensor, traced: Traced) -> None:
        self._known[id(tensor)] = traced
        self._alive.append(tensor)

    def _fix(self, given: Any) -> None:
        for tensor in _tensors(given):
            for labels in self._of(tensor).dims:
                if labels is not None:
                    self.channels.fix(labels)

    def _by_value(self, tensors: Sequence[Tensor], out: Tensor) -> None:
        known = [self._of(each) for each in tensors]
        dims: Dims = [
            self._met(
                [
                    _aligned(each, tensor, out, dim)
                    for each, tensor in zip(known, tensors, strict=True)
                ]
            )
            for dim in range(out.dim())
        ]
        picked = [each.elements for each in known if each.elements is not None]
        tags = frozenset[int]().union(*(each.tags for each in known))
        if tags:
            alike = [part.unique() for part in picked]
            tags |= {int(part) for part in alike if part.numel() == 1}
        elements = picked[0].expand(out.shape) if len(picked) == 1 and not tags else None
        self._set(out, Traced(dims, self._tied(tags), elements))

    def _met(self, sides: list[tuple[bool, Labels | None]]) -> Labels | None:
        """Return the channels of a dimension where several tensors met, joined; a tensor that is
        stretched over the dimension has no part in it."""
        present = [labels for has_part, labels in sides if has_part]
        found = [labels for labels in present if labels is not None]
        if not found:
            return None
        for labels in found[1:]:
            self.channels.join(found[0], labels)
        if len(found) < len(present):
            self.channels.fix(found[0])
        return found[0]

    def _tied(self, tags: frozenset[int]) -> frozenset[int]:
        first, *others = sorted(tags) or [FIXED]
        for other in others:
            self.channels.join_banks(first, other)
        return tags

    def _product(self, args: Args, kwargs: Any, out: Tensor) -> None:
        """[..., M, K] by [..., K, N], with or without something added."""
        *added, left, right = args
        one, other = self._of(left), self._of(right)
        self._summed(one, -1, other, -2)
        batch = [
            self._met([(True, a), (True, b)])
            for a, b in zip(one.dims[:-2], other.dims[:-2], strict=True)
        ]
        tags = self._tied(one.tags | other.tags)
        self._set(out, Traced([*batch, one.dims[-2], other.dims[-1]], tags))
        if added:
            known = self._of(out)
            dims: Dims = [
                self._met(
                    [(True, known.dims[dim]), _aligned(self._of(added[0]), added[0], out, dim)]
                )
                for dim in range(out.dim())
            ]
            self._set(out, Traced(dims, tags))

    def _summed(self, one: Traced, dim: int, other: Traced, other_dim: int) -> None:
        self._met([(True, one.dims[dim]), (True, other.dims[other_dim])])
        for side, labels in ((one, one.dims[dim]), (other, other.dims[other_dim])):
            if labels is not None and side.is_parameter:
                self.read.add(self.channels.owner(int(labels[0])))

    def _reduced(self, args: Args, kwargs: dict[str, Any], out: Tensor) -> None:
        known = self._of(args[0])
        over = args[1] if len(args) > 1 else kwargs.get("dim")
        count = args[0].dim()
        over = list(range(count)) if over is None else over if isinstance(over, list) else [over]
        gone = {dim % count for dim in over}
        keeps = out.dim() == count
        dims = [
            None if dim in gone else labels
            for dim, labels in enumerate(known.dims)
            if keeps or dim not in gone
        ]
        self._set(out, Traced(dims, known.tags))

    def _along(self, args: Args, kwargs: Any, out: Any) -> None:
        """A softmax, or a norm: values of a dimension are computed together, and keep its
        channels."""
        tensors = [each for each in args if isinstance(each, Tensor)]
        self._by_value(tensors, out[0] if isinstance(out, tuple) else out)

    def _chosen(self, args: Args, kwargs: Any, out: tuple[Tensor, Tensor]) -> None:
        """The best places of a dimension are no channels."""
        dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
        known = self._of(args[0])
        dims = list(known.dims)
        dims[dim] = None
        for tensor in out:
            self._set(tensor, Traced(list(dims), known.tags))

    def _gathered(self, args: Args, kwargs: Any, out: Tensor) -> None:
        source, dim, index = args[:3]
        known = self._of(source)
        dims = list(known.dims)
        labels, dims[dim] = dims[dim], None
        elements = None if labels is None else torch.from_numpy(labels)[index]
        self._set(out, Traced(dims, known.tags, elements))

    def _embedded(self, args: Args, kwargs: Any, out: Tensor) -> None:
        weight, places = args[:2]
        self._set(out, Traced([None] * places.dim() + self._of(weight).dims[1:]))

    def _added_at(self, args: Args, kwargs: Any, out: Tensor) -> None:
        """Rows are added to some of another's: whose they were is forgotten."""
        target, dim, _, source = args[:4]
        dims: Dims = []
        for place, (one, other) in enumerate(
            zip(self._of(target).dims, self._of(source).dims, strict=True)
        ):
            is_made = id(target) not in self._known  # zeros, as wide as the rows
            sides = [(not is_made, one), (True, other)]
            dims.append(None if place == dim else self._met(sides))
        self._set(out, Traced(dims))

    def _made(self, args: Args, kwargs: Any, out: Tensor) -> None:
        """A fresh tensor of a size that was asked for."""

    def _like(self, args: Args, kwargs: Any, out: Tensor) -> None:
        self._set(out, Traced(list(self._of(args[0]).dims)))

    def _changed(self, args: Args, kwargs: Any, out: Tensor) -> None:
        """Values are written at places: the dimensions stay what they were."""
        self._set(out, self._of(args[0]))

    def _concatenated(self, args: Args, kwargs: dict[str, Any], out: Tensor) -> None:
        tensors = args[0]
        along = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
        known = [self._of(each) for each in tensors]
        dims: Dims = [
            None
            if dim == along
            else self._met(
                [_aligned(each, t, out, dim) for each, t in zip(known, tensors, strict=True)]
            )
            for dim in range(out.dim())
        ]
        parts = [each.dims[along] for each in known]
        if any(labels is not None for labels in parts):
            dims[along] = np.concatenate(
                [
                    np.full(tensor.shape[along], FIXED) if labels is None else labels
                    for tensor, labels in zip(tensors, parts, strict=True)
                ]
            )
        self._set(out, Traced(dims, self._tied(frozenset().union(*(k.tags for k in known)))))

    def _attended(self, args: Args, kwargs: Any, out: Any) -> None:
        """Query heads stand or fall with the KV head that they read."""
        queries, keys, values = (self._of(each) for each in args[:3])
        heads, kv_heads = args[0].shape[1], args[1].shape[1]

        def spread(labels: Labels | None) -> Labels | None:
            return None if labels is None else labels.repeat(heads // kv_heads)

        self._summed(queries, 3, keys, 3)
        sides = [queries.dims[1], spread(keys.dims[1]), spread(values.dims[1])]
        parts = [(True, labels) for labels in sides]
        mask = kwargs.get("attn_mask")
        if mask is not None:
            parts.append(_aligned(self._of(mask), mask, args[0], 1))
        units = self._met(parts)
        self._set(out[0], Traced([queries.dims[0], units, queries.dims[2], values.dims[3]]))

    def _move(self, func: Any, args: Args, kwargs: dict[str, Any], out: Any) -> None:
        source, *rest = args
        known = self._of(source)
        outs: list[Tensor] = list(out) if isinstance(out, list | tuple) else [out]
        moved: list[Dims] = [[None] * each.dim() for each in outs]
        tags: list[set[int]] = [set(known.tags) for _ in outs]
        run = _reshape if func.overloadpacket.__name__ in ("view", "_unsafe_view") else func
        for dim, labels in enumerate(known.dims):
            if labels is None:
                continue
            shape = [1] * source.dim()
            shape[dim] = -1
            numbers = torch.from_numpy(labels).reshape(shape).expand(source.shape)
            result = run(numbers, *rest, **kwargs)
            results = list(result) if isinstance(result, list | tuple) else [result]
            for place, each in enumerate(results):
                self._place(each, moved[place], tags[place], known.is_parameter)
        elements: list[Tensor | None] = [None] * len(outs)
        if known.elements is not None:
            result = run(known.elements, *rest, **kwargs)
            elements = list(result) if isinstance(result, list | tuple) else [result]
        for tensor, dims, marks, picked in zip(outs, moved, tags, elements, strict=True):
            self._set(tensor, Traced(dims, frozenset(marks), picked, known.is_parameter))

    def _place(self, numbers: Tensor, dims: Dims, tags: set[int], is_parameter: bool) -> None:
        """Note where the channels of one dimension went."""
        varying = [dim for dim in range(numbers.dim()) if _varies(numbers, dim)]
        if not varying:
            label = numbers.reshape(-1)[:1].numpy()
            if is_parameter:
                tags.update(label.tolist())
            else:  # a place that is named by its number must stay where it is
                self.channels.fix(label)
            return
        others = tuple(slice(None) if dim in varying else 0 for dim in range(numbers.dim()))
        grid = numbers[others].numpy()
        for unit in grid if len(varying) > 1 else ():
            self.channels.join_all(unit)
        labels = grid.reshape(grid.shape[0], -1)[:, 0].copy()
        before = dims[varying[0]]
        if before is not None:  # two dimensions with channels became one
            self.channels.fix(before)
            self.channels.fix(labels)
        dims[varying[0]] = labels


def _aligned(traced: Traced, tensor: Tensor, out: Tensor, dim: int) -> tuple[bool, Labels | None]:
    """Return whether a tensor has a part in a dimension of what it is broadcast to, and its
    channels there."""
    own = dim - (out.dim() - tensor.dim())
    if own < 0 or tensor.shape[own] != out.shape[dim]:
        return False, None
    labels = traced.dims[own]
    is_stretched = tensor.shape[own] == 1 or tensor.stride(own) == 0
    return labels is not None or not is_stretched, labels


def _says_something(traced: Traced) -> bool:
    has_dims = any(labels is not None for labels in traced.dims)
    return has_dims or bool(traced.tags) or traced.elements is not None


def _varies(numbers: Tensor, dim: int) -> bool:
    if numbers.shape[dim] < 2:
        return False
    line = numbers[tuple(slice(None) if each == dim else 0 for each in range(numbers.dim()))]
    return bool((line != line[0]).any())


def _tensors(given: Any) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, dict):
        given = list(given.values())
    return [each for part in given for each in _tensors(part)] if _is_list(given) else []


def _is_list(given: Any) -> bool:
    return isinstance(given, list | tuple)


def _reshape(numbers: Tensor, shape: Sequence[int]) -> Tensor:
    return numbers.reshape(*shape)


_MOVES = frozenset(
    (
        "_unsafe_view",
        "alias",
        "clone",
        "detach",
        "expand",
        "flip",
        "index",
        "index_select",
        "permute",
        "repeat",
        "roll",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unsqueeze",
        "view",
    )
)
_POINTWISE = frozenset(("_to_copy", "copy_", "masked_fill", "where"))
_RULES = {
    "_fused_rms_norm": "along",
    "_log_softmax": "along",
    "_safe_softmax": "along",
    "_scaled_dot_product_flash_attention_for_cpu": "attended",
    "_softmax": "along",
    "addmm": "product",
    "amax": "reduced",
    "baddbmm": "product",
    "bmm": "product",
    "cat": "concatenated",
    "embedding": "embedded",
    "empty_like": "like",
    "gather": "gathered",
    "index_add": "added_at",
    "mean": "reduced",
    "mm": "product",
    "native_layer_norm": "along",
    "new_zeros": "made",
    "scatter_": "changed",
    "sum": "reduced",
    "topk": "chosen",
    "zeros_like": "like",
}
