"""The choice of routed attention in plain PyTorch: the blocks whose keys a query scores best.

The specification of what `cpu/choice.h` does for the engine's pages.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deepseek.ops.attention.cache import DenseKV, PagedKV
from deepseek.ops.attention.clusters import guess_scores, summarize
from deepseek.ops.attention.layout import Layout
from deepseek.ops.attention.table import BlockTable
from deepseek.ops.routing import BLOCK, Routing

_MOST_SCORES = 1 << 24
"""Scores that are held at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """What the queries of a group of tokens see."""

    group: int
    """The group's first slot is `group * refresh`."""
    blocks: list[list[int]]
    """Of each KV head, ascending."""


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
    queries = queries.float() * scale
    most = max(layout.key_length[row] for row in range(layout.num_rows)) - 1
    budget = routing.budget(most // BLOCK + 1)
    rows: list[list[list[list[int]]]] = []
    for row in range(layout.num_rows):
        found = _choose_row(queries[row], keys[row], layout, row, routing, budget, _kept(kv, row))
        rows.append([choice.blocks for choice in found])
        _keep(kv, row, found, routing.refresh)
    return _as_table(rows, layout, routing, queries.device)


def _choose_row(
    queries: Tensor,
    keys: Tensor,
    layout: Layout,
    row: int,
    routing: Routing,
    budget: list[int],
    kept: Mapping[int, Choice],
) -> list[Choice]:
    start, stop, refresh = layout.query_start[row], layout.key_length[row], routing.refresh
    groups = list(range(start // refresh, (stop - 1) // refresh + 1))
    if not groups:
        return []
    before = kept.get(start // BLOCK)
    goes_on = start % refresh > 0 and before is not None and before.group == groups[0]
    found = [before] if goes_on and before is not None else []
    anchors = [max(group * refresh, start) for group in groups[len(found) :]]
    heads, kv_heads = queries.shape[0], keys.shape[0]
    mask = None if layout.key_mask is None else layout.key_mask[row]
    per_chunk = max(1, _MOST_SCORES // (stop * heads))
    for first in range(0, len(anchors), per_chunk):
        some = anchors[first : first + per_chunk]
        places = torch.tensor(some, device=queries.device)
        asked = queries[:, places - start].unflatten(0, (kv_heads, heads // kv_heads))
        largest = _largest_scores(asked, keys[:, :stop], places, mask)
        if routing.summaries:
            largest = _of_the_best(largest, asked, keys[:, :stop], places, routing, budget)
        importance = _importance(largest)
        for at, anchor in enumerate(some):
            blocks = [_best(each, anchor, routing, budget) for each in importance[:, at].tolist()]
            found.append(Choice(anchor // refresh, blocks))
    return found


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
        places: slots of the queries.
        mask: bool [slots], which of them hold a token.
    """
    slots = keys.shape[1]
    scores = queries @ keys[:, None].float().transpose(-1, -2)
    seen = torch.arange(slots, device=keys.device) <= places[:, None]
    if mask is not None:
        seen = seen & mask[:slots]
    scores = scores.masked_fill(~seen, -torch.inf)
    blocks = -(-slots // BLOCK)
    padded = torch.nn.functional.pad(scores, (0, blocks * BLOCK - slots), value=-torch.inf)
    return padded.unflatten(-1, (blocks, BLOCK)).amax(-1)


def _of_the_best(
    largest: Tensor,
    queries: Tensor,
    keys: Tensor,
    places: Tensor,
    routing: Routing,
    budget: list[int],
) -> Tensor:
    """Return the largest scores of those blocks alone that are the best by their summaries, as many
    as may be seen, and minus infinity for the others. Arguments as in `_largest_scores`."""
    full = keys.shape[1] // BLOCK
    guesses = largest.clone()
    if full:
        means, radii = summarize(keys[:, : full * BLOCK].float().unflatten(1, (full, BLOCK)))
        guessed = guess_scores(queries, means[:, None], radii[:, None])
        own = places // BLOCK
        is_old = torch.arange(full, device=keys.device) <= own[:, None] - routing.recent
        guesses[..., :full] = torch.where(is_old, guessed, guesses[..., :full])
    everything = routing.replace(threshold=0.0)
    kept = torch.zeros_like(largest, dtype=torch.bool)
    for head, rows in enumerate(_importance(guesses).tolist()):
        for at, row in enumerate(rows):
            kept[head, :, at, _best(row, int(places[at]), everything, budget)] = True
    return largest.masked_fill(~kept, -torch.inf)


def _best(importance: list[float], anchor: int, routing: Routing, budget: list[int]) -> list[int]:
    count = anchor // BLOCK + 1
    first = min(routing.first, count)
    recent = max(first, count - routing.recent)
    wanted = max(0, budget[count - 1] - first - (count - recent))
    between = sorted(range(first, recent), key=lambda block: -importance[block])[:wanted]
    if wanted < recent - first and routing.threshold > 0:
        least = math.log(routing.threshold)
        between = [block for block in between if importance[block] > least]
    return [*range(first), *sorted(between), *range(recent, count)]


def _kept(kv: DenseKV | PagedKV, row: int) -> Mapping[int, Choice]:
    """Return the choices that the pages of a row hold, by block."""
    if isinstance(kv, DenseKV):
        return {}
    pages = kv.page_table[row].tolist()
    return {block: kv.choices[page] for block, page in enumerate(pages) if page in kv.choices}


def _keep(kv: DenseKV | PagedKV, row: int, found: list[Choice], refresh: int) -> None:
    if isinstance(kv, DenseKV):
        return
    pages = kv.page_table[row].tolist()
    for choice in found:
        kv.choices[pages[choice.group * refresh // BLOCK]] = choice


def _as_table(
    rows: list[list[list[list[int]]]], layout: Layout, routing: Routing, device: torch.device
) -> BlockTable:
    query_blocks = BlockTable.num_query_blocks(layout, routing.refresh)
    kv_heads = max(len(row[0]) for row in rows if row)
    width = max(len(blocks) for row in rows for heads in row for blocks in heads)
    indices = torch.zeros(len(rows), kv_heads, query_blocks, width, dtype=torch.int32)
    counts = torch.zeros(len(rows), kv_heads, query_blocks, dtype=torch.int32)
    for at, row in enumerate(rows):
        for group, heads in enumerate(row):
            for head, blocks in enumerate(heads):
                indices[at, head, group, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
                counts[at, head, group] = len(blocks)
    return BlockTable(
        indices.to(device),
        counts.to(device),
        BLOCK,
        query_block=routing.refresh,
        means=routing.means,
    )
