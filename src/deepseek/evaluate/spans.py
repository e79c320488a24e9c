"""How far back each head of a model looks: the spans that hold a share of its attention."""

from __future__ import annotations

import dataclasses
import statistics

import torch
from torch import Tensor

from deepseek.errors import ConfigError, describe
from deepseek.evaluate.base import (
    CausalModel,
    Condition,
    Progress,
    TextTokenizer,
    measuring,
    model_conditions,
    tokenizer_of,
)
from deepseek.evaluate.corpus import Corpus, as_corpus
from deepseek.models import Decoder, Planner, Spans
from deepseek.ops.attention import BlockTable, DenseKV, Layout, PagedKV
from deepseek.records import Measurement, Spread

_CHUNK = 128
"""Queries whose attention is formed at a time."""


@dataclasses.dataclass(frozen=True)
class SpansResult:
    """What `attention_spans` found."""

    measurements: list[Measurement]
    spans: Spans


def attention_spans(
    model: CausalModel,
    *,
    text: str | Corpus | None = None,
    length: int = 2048,
    num_texts: int = 2,
    share: float = 0.98,
    quantile: float | None = None,
    first: int = 64,
    tokenizer: TextTokenizer | None = None,
    progress: Progress | None = None,
) -> SpansResult:
    """Measure how far back each head of each layer has to see, to keep a share of its attention.

    Attention to a token counts times the norm of its value, which is what it adds to the output:
    the first tokens of a text draw much attention and add next to nothing. The tokens of the second
    half of each piece of text are asked, so that no span is longer than `length`, and one of more
    than half of it is rather too short.

    Args:
        model: a `Decoder` with rotary positions, without latent attention. What its planner hides
            has no attention to be kept.
        text: what is read; None = the default corpus.
        length: tokens of a piece.
        num_texts: pieces, spread evenly over the text.
        share: of attention, that lies on the first tokens and within the span.
        quantile: the share of tokens for which that holds; None = it holds for all attention of the
            head together.
        first: tokens at the start that every head sees besides its span.
        tokenizer: None = the model's own.
        progress: called after each piece.

    Returns:
        The spans, for `deepseek.models.SpanPlanner`, and `mean_span` (p10 to p90 over heads).

    Raises:
        ConfigError: a model, share or length that cannot be measured, or a text that is too short.

    Source: norms as Kobayashi et al. 2020 (2004.10102), here of the values alone, before the output
    projection.
    """
    if (
        not isinstance(model, Decoder)
        or model.config.latent is not None
        or model.config.positions != "rope"
    ):
        must = "a Decoder with rotary positions and without latent attention"
        raise ConfigError(describe("model", "attention_spans", must, type(model).__name__))
    _check(length, num_texts, share, quantile, first)
    corpus = as_corpus(text)
    ids = tokenizer_of(model, tokenizer, "attention_spans").encode(corpus.text)
    spare = len(ids) - length
    if spare < 0:
        must = f"at least {length} tokens long"
        got = f"{corpus.name} with {len(ids)} tokens"
        raise ConfigError(describe("text", "attention_spans", must, got))
    planner = model.planner
    meter = _Meter(planner, length, share, first)
    model.planner = meter
    try:
        with measuring(model):
            for number in range(num_texts):
                start = spare * number // max(1, num_texts - 1)
                model.final_states(torch.tensor([ids[start : start + length]], device=model.device))
                if progress is not None:
                    progress("spans", (number + 1) / num_texts)
    finally:
        model.planner = planner
    spans = meter.spans(quantile)
    conditions: dict[str, Condition] = {**model_conditions(model), **corpus.conditions()}
    conditions |= {"length": length, "texts": num_texts, "share": share, "quantile": quantile}
    conditions |= {"first": first, "interval": "over heads"}
    deciles = statistics.quantiles([each for heads in spans.reach for each in heads], n=10)
    mean = Measurement(
        name="mean_span",
        value=spans.mean,
        unit="tokens",
        spread=Spread("p10-p90", deciles[0], deciles[-1]),
        conditions=conditions,
    )
    return SpansResult([mean], spans)


class _Meter:
    """Sees to it that nothing changes, and adds up where attention goes."""

    def __init__(self, planner: Planner | None, length: int, share: float, first: int) -> None:
        self.planner, self.length, self.share, self.first = planner, length, share, first
        self.mass: dict[int, Tensor] = {}
        """By layer, float64 [heads, 1 + length]: what the first tokens add, then the others by
        distance."""
        self.needed: dict[int, Tensor] = {}
        """By layer, int64 [heads, 1 + length]: how many tokens need each reach."""

    def plan(
        self, layer: int, queries: Tensor, kv: DenseKV | PagedKV, layout: Layout
    ) -> BlockTable | None:
        table = None
        if self.planner is not None:
            table = self.planner.plan(layer, queries, kv, layout)
        keys, values = kv.dense(layout.num_slots)
        heads, kv_heads = queries.shape[1], keys.shape[1]
        keys = keys[0].float().repeat_interleave(heads // kv_heads, dim=0)
        norms = values[0].float().norm(dim=-1).repeat_interleave(heads // kv_heads, dim=0)
        seen = layout.visible(queries.device)[:, None]
        if table is not None:
            seen = table.visible(layout, heads, kv_heads)
        mass = queries.new_zeros(heads, 1 + self.length, dtype=torch.float64)
        needed = queries.new_zeros(heads, 1 + self.length, dtype=torch.int64)
        for places in torch.arange(self.length // 2, self.length).split(_CHUNK):
            scores = queries[0, :, places].float() @ keys.transpose(1, 2) * keys.shape[-1] ** -0.5
            chances = scores.masked_fill(~seen[0, :, places], -torch.inf).softmax(-1)
            held = self._by_distance(chances * norms[:, None], places.to(queries.device))
            mass += held.sum(1, dtype=torch.float64)
            held = held.cumsum(-1)
            reach = (held[..., 1:] < self.share * held[..., -1:]).sum(-1) + 1
            needed.scatter_add_(1, reach.clamp(max=self.length), torch.ones_like(reach))
        self.mass[layer] = self.mass.get(layer, 0) + mass
        self.needed[layer] = self.needed.get(layer, 0) + needed
        return table

    def _by_distance(self, added: Tensor, places: Tensor) -> Tensor:
        """Return what slots add [heads, queries, slots] as that of the first tokens, then that of
        the others by distance: [heads, queries, 1 + length]."""
        begin = added[..., : self.first].sum(-1, keepdim=True)
        others = added.clone()
        others[..., : self.first] = 0
        slots = places[:, None] - torch.arange(self.length, device=places.device)
        others = others.gather(-1, slots.clamp(min=0).expand_as(others))
        return torch.cat((begin, others.masked_fill(slots < 0, 0)), dim=-1)

    def spans(self, quantile: float | None) -> Spans:
        """Return the spans of what was read."""
        reach = []
        for layer in sorted(self.mass):
            if quantile is None:
                held = self.mass[layer].cumsum(-1) / self.mass[layer].sum(-1, keepdim=True)
                short = held[:, 1:] < self.share
            else:
                counts = self.needed[layer].cumsum(-1)
                short = counts[:, 1:] < quantile * counts[:, -1:]
            found = (short.sum(-1) + 1).clamp(max=self.length)
            reach.append(tuple(found.tolist()))
        return Spans(reach=tuple(reach), first=self.first)


def _check(length: int, num_texts: int, share: float, quantile: float | None, first: int) -> None:
    owner = "attention_spans"
    if num_texts < 1:
        raise ConfigError(describe("num_texts", owner, "at least 1", num_texts))
    if not 0 < share < 1:
        raise ConfigError(describe("share", owner, "between 0 and 1", share))
    if quantile is not None and not 0 < quantile <= 1:
        raise ConfigError(describe("quantile", owner, "above 0 and at most 1", quantile))
    if not 0 <= 2 * first <= length:
        must = f"from 0 to half of length ({length})"
        raise ConfigError(describe("first", owner, must, first))
