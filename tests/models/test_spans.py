"""Spans: what each head sees, that a text is seen the same way in any parts, and how a model gets
them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek import hub
from deepseek.errors import ConfigError
from deepseek.face import load, load_engine
from deepseek.generate import generate
from deepseek.models import Decoder, SpanPlanner, Spans, WindowPlanner
from deepseek.models.spans import span_table
from deepseek.ops.attention import DenseKV, Layout
from tests.generate.conftest import byte_tokenizer
from tests.models.zoo import TINY, randomize
from tests.tolerances import assert_logits_equal

SPANS = Spans(reach=((1, 70, 20, 33), (150, 9, 2, 2)), first=5)
REACHES = st.lists(st.integers(1, 90), min_size=4, max_size=4)


def small(spans: Spans = SPANS, block_size: int = 16) -> Decoder:
    torch.manual_seed(0)
    planner = SpanPlanner(spans, block_size=block_size)
    model = Decoder(TINY, planner=planner, impl="reference").eval()
    randomize(model)
    return model


def tokens_of(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(1))


@settings(deadline=None)
@given(
    reach=REACHES,
    first=st.integers(0, 40),
    starts=st.lists(st.integers(0, 90), min_size=1, max_size=3),
    block_size=st.sampled_from([1, 4, 16, 64]),
)
def test_a_head_sees_its_span_and_the_first_tokens(
    reach: list[int], first: int, starts: list[int], block_size: int
) -> None:
    ends = tuple(start + 33 - 4 * row for row, start in enumerate(starts))
    layout = Layout(tuple(starts), ends, 33)
    table = span_table(layout, torch.tensor(reach).int(), first, 2, block_size)
    table.check(layout, 4, 2)
    queries = layout.query_slots(torch.device("cpu"))[:, None, :, None]
    slots = torch.arange(layout.num_slots)
    near = slots > queries - torch.tensor(reach)[:, None, None]
    wanted = (near | (slots < first)) & layout.visible(torch.device("cpu"))[:, None]
    tokens = queries < torch.tensor(ends)[:, None, None, None]
    assert torch.equal(table.visible(layout, 4, 2) & tokens, wanted & tokens)


@settings(deadline=None)
@given(reach=REACHES, first=st.integers(0, 20), start=st.integers(0, 200))
def test_no_block_is_listed_that_no_head_reaches(reach: list[int], first: int, start: int) -> None:
    layout = Layout((start,), (start + 40,), 40)
    table = span_table(layout, torch.tensor(reach).int(), first, 2, 8)
    seen = table.visible(layout, 4, 2)[0].unflatten(0, (2, 2)).any(1)
    own = (start + torch.arange(40)) // 8 - start // 8
    for kv_head in range(2):
        for block in range(table.counts.shape[-1]):
            count = int(table.counts[0, kv_head, block])
            for listed in table.indices[0, kv_head, block, :count].tolist():
                slots = slice(listed * 8, listed * 8 + 8)
                asked = seen[kv_head, own == block, slots]
                # the first query of a block may lie before this pass
                assert bool(asked.any()) or (block == 0 and start % 8)


@settings(deadline=None)
@given(reach=REACHES, first=st.integers(0, 40), length=st.integers(1, 130))
def test_what_is_seen_on_average_is_what_the_table_shows(
    reach: list[int], first: int, length: int
) -> None:
    spans = Spans(reach=(tuple(reach),), first=first)
    table = span_table(Layout.dense(1, length), torch.tensor(reach).int(), first, 2, 16)
    shown = table.visible(Layout.dense(1, length), 4, 2).sum(-1).double().mean()
    assert spans.mean_seen(length) == pytest.approx(float(shown))
    assert spans.mean == pytest.approx(sum(reach) / 4)


def test_spans_that_reach_everything_are_dense_with_gradients() -> None:
    layout, everything = Layout.dense(2, 110), Spans(reach=((110,) * 4, (110,) * 4), first=0)
    states = torch.zeros(2, 4, 110, 6)
    kv = DenseKV(states[:, :2], states[:, :2])
    assert SpanPlanner(everything).plan(0, states, kv, layout) is None
    model = small(Spans(reach=((109, 110, 110, 110), (110, 110, 109, 110)), first=0))
    dense = Decoder(TINY).eval()
    dense.load_state_dict(model.state_dict())
    tokens = tokens_of(2, 110)
    for each in (model, dense):
        each.loss(tokens, tokens).backward()  # in which the last token has no part
    with torch.no_grad():
        found, expected = model(tokens).logits, dense(tokens).logits
        assert_logits_equal(found[:, :109], expected[:, :109])
        assert float((found - expected)[:, 109].abs().max()) > 1e-6
    for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["auto", "gathered", "reference", "sdpa"])
def test_steps_and_chunks_are_as_whole_texts(impl: str) -> None:
    model, tokens = small(), tokens_of(2, 170)
    with torch.no_grad():
        expected = model(tokens).logits
        planner, model.planner = model.planner, None
        assert float((model(tokens).logits - expected).abs().max()) > 1e-3
        model.planner, model.impl = planner, impl  # type: ignore[assignment]
        cache = model.new_cache(2, 170)
        parts = [model(tokens[:, a:b], cache=cache).logits for a, b in ((0, 50), (50, 121))]
        parts += [model(tokens[:, at : at + 1], cache=cache).logits for at in range(121, 170)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", ["gathered", "sdpa"])
def test_gradients_are_those_of_the_reference(impl: str) -> None:
    model, other, tokens = small(), small(), tokens_of(1, 120)
    other.impl = impl  # type: ignore[assignment]
    for each in (model, other):
        each.loss(tokens, tokens).backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_windows_stay_windows() -> None:
    model, tokens = small(), tokens_of(1, 100)
    windows = WindowPlanner(17, (0, 1))
    with torch.no_grad():
        model.planner = windows
        expected = model(tokens).logits
        model.planner = SpanPlanner(SPANS, windows)
        assert_logits_equal(model(tokens).logits, expected)


def test_spans_are_data() -> None:
    assert Spans.from_dict(json.loads(json.dumps(SPANS.to_dict()))) == SPANS
    with pytest.raises(ConfigError, match="reach of Spans must be a list"):
        Spans.from_dict({"reach": 3})


@pytest.mark.parametrize("reach", [(), ((),), ((1, 2), (1,)), ((1, 0),)])
def test_spans_that_cannot_be_are_refused(reach: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ConfigError, match="reach of Spans must be"):
        Spans(reach=reach)
    with pytest.raises(ConfigError, match=r"spans of SpanPlanner must be a Spans; got \["):
        SpanPlanner([1, 2])  # type: ignore[arg-type]


def test_spans_of_another_model_are_told() -> None:
    for reach in (((9,) * 4,), ((9,) * 3, (9,) * 3)):
        model = small(Spans(reach=reach, first=0))
        with pytest.raises(ConfigError, match="spans of SpanPlanner must be those of 4 heads"):
            model(tokens_of(1, 40))


def test_a_model_is_loaded_with_a_planner_and_no_engine_passes_it_over(tmp_path: Path) -> None:
    model = small(block_size=64)
    model.tokenizer, model.impl = byte_tokenizer(), "auto"
    path = hub.save(model, tmp_path / "bundle", name="tiny").path
    planner = SpanPlanner(SPANS)
    loaded = load(path, attention=planner)
    assert isinstance(loaded, Decoder) and loaded.planner is planner
    prompt = tokens_of(1, 120)[0].tolist()
    found = generate(loaded, prompt, max_tokens=6, ignore_eos=True).token_ids
    with torch.no_grad():
        whole = model(torch.tensor([[*prompt, *found[:-1]]])).logits[0, -6:].argmax(-1)
    assert list(found) == whole.tolist()
    with pytest.raises(ConfigError, match=r"scheme 'int8' must be .*the planner SpanPlanner"):
        load(path, attention=planner, scheme="int8")
    with pytest.raises(ConfigError, match="attention of load_engine must be 'auto'"):
        load_engine(path, attention=planner)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="attention of load must be one of auto, dense, routed"):
        load(path, attention="spans")  # type: ignore[arg-type]


def test_a_model_with_windows_of_its_own_is_loaded_without(tmp_path: Path) -> None:
    config = TINY.replace(family="mistral", window=8, window_layers=(0, 1))
    path = hub.save(Decoder(config), tmp_path / "bundle", name="tiny").path
    with pytest.raises(ConfigError, match="only a decoder that sees all takes a planner"):
        load(path, attention=SpanPlanner(SPANS))
