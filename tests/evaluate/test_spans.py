"""Spans that are measured: against attention formed plainly, and where they are known."""

from __future__ import annotations

import pytest
import torch

from deepseek.errors import ConfigError
from deepseek.evaluate import attention_spans
from deepseek.evaluate.spans import _Meter
from deepseek.models import Decoder, SpanPlanner, Spans, WindowPlanner
from deepseek.ops.attention import DenseKV, Layout
from tests.models.zoo import TINY, randomize

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 9
CONFIG = TINY.replace(vocab_size=257)


def small() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(CONFIG).eval()
    randomize(model)
    return model


def plain(first: int, share: float, quantile: float | None, seed: int = 0) -> tuple[int, ...]:
    """Return the spans of random queries and keys, query by query and token by token."""
    queries, keys = states(seed)
    found = []
    for head in range(4):
        held = []
        for place in range(30, 60):
            scores = (keys[0, head // 2, : place + 1] @ queries[0, head, place]) * 6**-0.5
            added = scores.softmax(-1) * keys[0, head // 2, : place + 1].norm(dim=-1)
            chances = added.double().tolist()
            seen = [sum(chances[:first])]
            for reach in range(1, 61):
                slot = place + 1 - reach
                seen.append(seen[-1] + (chances[slot] if slot >= first else 0))
            held.append(seen)
        if quantile is None:
            sums = [sum(column) for column in zip(*held, strict=True)]
            found.append(next(at for at in range(1, 61) if sums[at] >= share * sums[-1]))
        else:
            needed = [
                next(at for at in range(1, 61) if seen[at] >= share * seen[-1]) for seen in held
            ]
            counts = [sum(each <= at for each in needed) for at in range(61)]
            found.append(next(at for at in range(1, 61) if counts[at] >= quantile * 30))
    return tuple(found)


def states(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries = 4 * torch.randn(1, 4, 60, 6, generator=generator)
    return queries, torch.randn(1, 2, 60, 6, generator=generator)


@pytest.mark.parametrize("first", [0, 1, 7])
@pytest.mark.parametrize(("share", "quantile"), [(0.9, None), (0.5, None), (0.8, 0.7), (0.6, 1.0)])
def test_spans_hold_their_share(first: int, share: float, quantile: float | None) -> None:
    meter = _Meter(None, 60, share, first)
    queries, keys = states(0)
    assert meter.plan(0, queries, DenseKV(keys, keys), Layout.dense(1, 60)) is None
    assert meter.spans(quantile).reach == (plain(first, share, quantile),)


def test_a_model_is_measured_and_left_as_it_was(tokenizer: object) -> None:
    model = small()
    model.train()
    options = {"text": TEXT, "length": 200, "num_texts": 3, "first": 8, "tokenizer": tokenizer}
    found = attention_spans(model, share=0.9, **options)
    assert model.planner is None and model.training
    (mean,) = found.measurements
    assert (mean.name, mean.unit) == ("mean_span", "tokens")
    assert mean.value == found.spans.mean and mean.spread is not None
    assert mean.spread.low <= mean.value <= mean.spread.high
    assert [len(heads) for heads in found.spans.reach] == [4, 4] and found.spans.first == 8
    wider = attention_spans(model, share=0.99, **options).spans
    for some, more in zip(found.spans.reach, wider.reach, strict=True):
        assert all(a <= b for a, b in zip(some, more, strict=True))
    assert wider.mean > found.spans.mean


def test_what_a_planner_hides_needs_no_span(tokenizer: object) -> None:
    """Spans and windows are found again as what holds nearly all."""
    model = small()
    options = {"text": TEXT, "length": 160, "tokenizer": tokenizer, "share": 0.999999}
    model.planner = WindowPlanner(13, (0,), block_size=16)
    spans = attention_spans(model, first=0, **options).spans
    assert spans.reach[0] == (13,) * 4 and min(spans.reach[1]) > 100
    known = Spans(reach=((3, 40, 20, 33), (50, 9, 2, 1)), first=5)
    model.planner = SpanPlanner(known, block_size=16)
    assert attention_spans(model, first=5, **options).spans == known


def test_what_cannot_be_measured_is_told(tokenizer: object) -> None:
    model = small()
    with pytest.raises(ConfigError, match="model of attention_spans must be a Decoder"):
        attention_spans(lambda input_ids: input_ids, text=TEXT, tokenizer=tokenizer)
    alibi = Decoder(CONFIG.replace(positions="alibi"))
    with pytest.raises(ConfigError, match="model of attention_spans must be a Decoder"):
        attention_spans(alibi, text=TEXT, tokenizer=tokenizer)
    for wrong in (
        {"share": 0.0},
        {"share": 1.0},
        {"quantile": 0.0},
        {"num_texts": 0},
        {"first": 101},
        {"length": 10_000},
    ):
        options = {"length": 200, **wrong}
        name = "text" if "length" in wrong else next(iter(wrong))
        with pytest.raises(ConfigError, match=f"{name} of attention_spans must be"):
            attention_spans(model, text=TEXT, tokenizer=tokenizer, **options)
