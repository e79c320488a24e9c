"""The choice of routed attention in plain PyTorch: the blocks whose keys a query scores best.

The specification of what `cpu/choice.h` does for the engine's pages.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from deepseek.ops.attention import tiled
from deepseek.ops.attention.cache import DenseKV, PagedKV
from deepseek.ops.attention.clusters import guess_scores, summarize
from deepseek.ops.attention.layout import Layout
from deepseek.ops.attention.table import BlockTable
from deepseek.ops.routing import BLOCK, Routing

_MOST_SCORES = 1 << 22
"""Scores that are held at once."""
_LEAST = -1e30
"""The importance of a block that holds nothing."""


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """What the queries of a group of tokens see."""

    group: int
    """The group's first slot is `group * refresh`."""
    blocks: list[list[int]]
    """Of each KV head, ascending."""


@torch.no_grad()
def choose_blocks(
    queries: Tensor,
    kv: DenseKV | PagedKV,
    layout: Layout,
    routing: Routing,
    channels: Sequence[int] | None = None,
) -> BlockTable:
    """Return the table of routed attention.

    A group of `refresh` slots sees what the query in its first slot chooses: the first blocks, the
    recent ones, and of those between the ones that matter most to one of the KV head's queries. A
    block matters to a query by its largest score, less the logarithm of the sum of the exponentials
    of all blocks' largest scores; one that matters less than the threshold is not seen, unless all
    fit. Keys behind the first slot have no part in it, so that steps, chunks and whole texts choose
    alike; of a group that began in an earlier pass the choice is read from the cache.

    Args:
        queries: [B, heads, T, dim].
        kv: keys of this pass, or pages in which they are written; choices are kept in those.
        layout: where queries and keys sit.
        routing: what is seen.
        channels: those that are scored, of queries and keys; None for all. The scale of a score is
            that of all of them.
    """
    keys, _ = kv.dense(layout.num_slots)
    scale = keys.shape[-1] ** -0.5
    if channels is not None:
        queries, keys = queries[..., channels], keys[..., channels]
    most = max(layout.key_length[row] for row in range(layout.num_rows)) - 1
    budget = torch.tensor(routing.budget(most // BLOCK + 1), device=queries.device)
    rows = []
    for row in range(layout.num_rows):
        past = _Past(keys[row], layout, row, scale)
        found = _choose_row(queries[row], past, layout, row, routing, budget, _kept(kv, row))
        rows.append(found)
        _keep(kv, row, found, routing.refresh)
    return _as_table(rows, layout, routing)


@dataclasses.dataclass(frozen=True, eq=False)
class _Lists:
    """What the groups of a row see, from its first group on."""

    first: int
    indices: Tensor
    """int32 [KV heads, groups, K], ascending."""
    counts: Tensor
    """int32 [KV heads, groups]."""

    @classmethod
    def of(cls, first: int, seen: Tensor) -> _Lists:
        """Return the lists of what is seen, bool [KV heads, groups, blocks]."""
        counts = seen.sum(-1, dtype=torch.int32)
        width = int(counts.max()) if counts.numel() else 0
        # each is written to the place that its list has for it, the others behind the lists
        place = torch.where(seen, seen.cumsum(-1) - 1, width)
        blocks = torch.arange(seen.shape[-1], dtype=torch.int32, device=seen.device)
        indices = blocks.new_zeros(*counts.shape, width + 1)
        indices.scatter_(-1, place, blocks.expand_as(place))
        return cls(first, indices[..., :width], counts)

    def blocks(self, group: int) -> list[list[int]]:
        """Return the blocks of a group, for each KV head."""
        at = group - self.first
        counts = self.counts[:, at].tolist()
        lists = self.indices[:, at].tolist()
        return [blocks[:count] for blocks, count in zip(lists, counts, strict=True)]


@dataclasses.dataclass(frozen=True, eq=False)
class _Past:
    """The keys of a row [KV heads, slots, dim], which of them hold a token, and the scale."""

    keys: Tensor
    layout: Layout
    row: int
    scale: float

    @property
    def mask(self) -> Tensor | None:
        """bool [slots or more], which slots hold a token."""
        return None if self.layout.key_mask is None else self.layout.key_mask[self.row]

    def largest_scores(self, queries: Tensor, places: Tensor) -> Tensor:
        """Return the largest score of a query in each block, minus infinity where it sees nothing:
        [KV heads, query heads of one, places, blocks].

        Args:
            queries: [KV heads, query heads of one, places, dim].
            places: slots of the queries, ascending.
        """
        stop = int(places[-1]) + 1
        first = stop - len(places)
        is_run = int(places[0]) == first
        if is_run and len(places) >= tiled.LEAST_QUERIES and _is_native(queries):
            mask = None if self.mask is None else self.mask[None, :stop]
            layout = Layout((first,), (stop,), len(places), mask)
            keys, asked = self.keys[None, :, :stop], queries.flatten(0, 1)[None]
            peaks = tiled.block_peaks(asked, keys.to(queries.dtype), layout, self.scale)
            return peaks[0].unflatten(0, queries.shape[:2])
        return _largest_scores(queries.float() * self.scale, self.keys[:, :stop], places, self.mask)


def _choose_row(
    queries: Tensor,
    past: _Past,
    layout: Layout,
    row: int,
    routing: Routing,
    budget: Tensor,
    kept: Mapping[int, Choice],
) -> _Lists:
    start, stop, refresh = layout.query_start[row], layout.key_length[row], routing.refresh
    groups = range(start // refresh, (stop - 1) // refresh + 1)
    heads, kv_heads = queries.shape[0], past.keys.shape[0]
    before = kept.get(start // BLOCK)
    goes_on = start % refresh > 0 and before is not None and before.group == start // refresh
    parts = []
    if goes_on and before is not None and groups:
        seen = queries.new_zeros(kv_heads, 1, stop // BLOCK + 1, dtype=torch.bool)
        for head, blocks in enumerate(before.blocks):
            seen[head, 0, blocks] = True
        parts.append(_Lists.of(groups[0], seen))
    anchors = [max(group * refresh, start) for group in groups[len(parts) :]]
    per_chunk = max(1, _MOST_SCORES // (stop * heads))
    if refresh == 1 and _is_native(queries):
        per_chunk = max(tiled.LEAST_QUERIES, _MOST_SCORES // (stop // BLOCK * heads))
    for first in range(0, len(anchors), per_chunk):
        places = torch.tensor(anchors[first : first + per_chunk], device=queries.device)
        asked = queries[:, places - start].unflatten(0, (kv_heads, heads // kv_heads))
        largest = past.largest_scores(asked, places)
        if routing.summaries:
            largest = _of_the_best(largest, asked, past, places, routing, budget)
        seen = _best(_importance(largest), places, routing, budget)
        parts.append(_Lists.of(anchors[first] // refresh, seen))
    if not parts:
        return _Lists.of(0, queries.new_zeros(kv_heads, 0, 1, dtype=torch.bool))
    width = max(part.indices.shape[-1] for part in parts)
    indices = [pad(part.indices, (0, width - part.indices.shape[-1])) for part in parts]
    return _Lists(groups[0], torch.cat(indices, 1), torch.cat([part.counts for part in parts], 1))


def _is_native(queries: Tensor) -> bool:
    """Return whether our kernels score these queries."""
    return queries.dtype in tiled.DTYPES and not tiled.why_not(queries)


def _importance(largest: Tensor) -> Tensor:
    """Return how much each block matters to each place: [KV heads, places, blocks], of the largest
    scores of each query head [KV heads, query heads of one, places, blocks]."""
    share = largest - largest.logsumexp(-1, keepdim=True)
    return share.nan_to_num(-torch.inf, neginf=-torch.inf).amax(1)


def _largest_scores(queries: Tensor, keys: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:
    """Return the largest score of a query in each block, minus infinity where it sees nothing:
    [KV heads, query heads of one, places, blocks].

    Args:
        queries: [KV heads, query heads of one, places, dim], scaled.
        keys: [KV heads, slots, dim].
        places: slots of the queries, ascending.
        mask: bool [slots or more], which of them hold a token.
    """
    slots = keys.shape[1]
    spare = -slots % BLOCK
    whole = pad(keys.float(), (0, 0, 0, spare))
    scores = queries.flatten(1, 2) @ whole.transpose(-1, -2)
    scores = scores.unflatten(1, queries.shape[1:3])
    behind = int(places[0]) + 1
    later = torch.arange(behind, slots + spare, device=keys.device) > places[:, None]
    scores[..., behind:].masked_fill_(later, -torch.inf)
    if mask is not None:
        scores.masked_fill_(~pad(mask[:slots], (0, spare)), -torch.inf)
    return scores.unflatten(-1, (-1, BLOCK)).amax(-1)


def _of_the_best(
    largest: Tensor,
    queries: Tensor,
    past: _Past,
    places: Tensor,
    routing: Routing,
    budget: Tensor,
) -> Tensor:
    """Return the largest scores of those blocks alone that are the best by their summaries, as many
    as may be seen, and minus infinity for the others. Arguments as in `largest_scores`."""
    keys = past.keys[:, : int(places[-1]) + 1]
    full = keys.shape[1] // BLOCK
    guesses = largest.clone()
    if full:
        means, radii = summarize(keys[:, : full * BLOCK].float().unflatten(1, (full, BLOCK)))
        guessed = guess_scores(queries.float() * past.scale, means[:, None], radii[:, None])
        own = places // BLOCK
        is_old = torch.arange(full, device=keys.device) <= own[:, None] - routing.recent
        guesses[..., :full] = torch.where(is_old, guessed, guesses[..., :full])
    kept = _best(_importance(guesses), places, routing.replace(threshold=0.0), budget)
    return largest.masked_fill(~kept[:, None], -torch.inf)


def _best(importance: Tensor, places: Tensor, routing: Routing, budget: Tensor) -> Tensor:
    """Return the blocks that each place sees, of the importance of each: bool [KV heads, places,
    blocks]."""
    block = torch.arange(importance.shape[-1], device=places.device)
    count = (places // BLOCK + 1)[:, None]
    first = count.clamp(max=routing.first)
    recent = torch.maximum(first, count - routing.recent)
    wanted = (budget[count - 1] - first - (count - recent)).clamp(min=0)
    between = (block >= first) & (block < recent)
    # one that nobody sees still comes before those that are not asked for
    ranked = importance.clamp(min=_LEAST).masked_fill(~between, -torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    chosen = between & torch.zeros_like(order, dtype=torch.bool).scatter_(
        -1, order, (block < wanted).expand_as(order)
    )
    if routing.threshold > 0:
        all_fit = wanted >= recent - first
        chosen &= all_fit | (importance > math.log(routing.threshold))
    return chosen | (block < first) | ((block >= recent) & (block < count))


def _kept(kv: DenseKV | PagedKV, row: int) -> Mapping[int, Choice]:
    """Return the choices that the pages of a row hold, by block."""
    if isinstance(kv, DenseKV):
        return {}
    pages = kv.page_table[row].tolist()
    return {block: kv.choices[page] for block, page in enumerate(pages) if page in kv.choices}


def _keep(kv: DenseKV | PagedKV, row: int, found: _Lists, refresh: int) -> None:
    """Keep what the last group of each page sees, for a pass that begins inside it."""
    if isinstance(kv, DenseKV):
        return
    pages = kv.page_table[row].tolist()
    last = {
        (found.first + at) * refresh // BLOCK: found.first + at
        for at in range(found.counts.shape[1])
    }
    for block, group in last.items():
        kv.choices[pages[block]] = Choice(group, found.blocks(group))


def _as_table(rows: list[_Lists], layout: Layout, routing: Routing) -> BlockTable:
    groups = BlockTable.num_query_blocks(layout, routing.refresh)
    width = max(row.indices.shape[-1] for row in rows)

    indices = [
        pad(row.indices, (0, width - row.indices.shape[-1], 0, groups - row.indices.shape[1]))
        for row in rows
    ]
    counts = [pad(row.counts, (0, groups - row.counts.shape[1])) for row in rows]
    return BlockTable(
        torch.stack(indices),
        torch.stack(counts),
        BLOCK,
        query_block=routing.refresh,
        means=routing.means,
    )
