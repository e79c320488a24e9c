"""Cross-modal masks: against a dense mask, whatever the kinds and wherever they sit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.errors import ConfigError, ShapeError
from deepseek.models import CrossModalPlanner, Decoder, cross_modal_table
from deepseek.ops.attention import DenseKV, Layout, attention
from tests.models.zoo import TINY, randomize
from tests.tolerances import assert_logits_equal

TEXT, IMAGE, SOUND = 0, 1, 2
SEES = {TEXT: (TEXT, IMAGE), IMAGE: (IMAGE,), SOUND: (TEXT, SOUND)}
RUNS = st.lists(st.tuples(st.sampled_from([0, 1, 2]), st.integers(1, 40)), min_size=1, max_size=5)


def kinds_of(runs: list[tuple[int, int]]) -> torch.Tensor:
    return torch.tensor([kind for kind, count in runs for _ in range(count)])


def mask_of(of_queries: torch.Tensor, of_keys: torch.Tensor) -> torch.Tensor:
    """Return which keys [B, S] the queries [B, T] may see by their kinds, one by one."""
    rows = zip(of_queries.tolist(), of_keys.tolist(), strict=True)
    return torch.tensor([[[key in SEES[query] for key in b] for query in a] for a, b in rows])


@settings(deadline=None)
@given(runs=RUNS, start=st.integers(0, 60), causal=st.booleans())
def test_the_table_is_the_mask(runs: list[tuple[int, int]], start: int, causal: bool) -> None:
    of_keys = kinds_of(runs)[None]
    length = of_keys.shape[1]
    start = min(start, length - 1)
    layout = Layout((start,), (length,), length - start, causal=causal)
    table = cross_modal_table(layout, of_keys[:, start:], of_keys, SEES)
    table.check(layout, 4, 2)
    wanted = mask_of(of_keys[:, start:], of_keys) & layout.visible(torch.device("cpu"))
    assert torch.equal(table.visible(layout, 4, 2)[:, 0], wanted)
    own = start // table.block_size + torch.arange(table.counts.shape[-1])
    later = table.held() & (table.indices > own[:, None])
    assert not (causal and bool(later.any()))


@settings(deadline=None)
@given(asked=RUNS, shown=RUNS)
def test_queries_over_the_keys_of_another_modality(
    asked: list[tuple[int, int]], shown: list[tuple[int, int]]
) -> None:
    """Keys that are not the queries' own, in a layout that is not causal."""
    of_queries, of_keys = kinds_of(asked).expand(2, -1), kinds_of(shown)[None]
    layout = Layout((0, 0), (of_keys.shape[1],) * 2, of_queries.shape[1], causal=False)
    table = cross_modal_table(layout, of_queries, of_keys, SEES)
    table.check(layout, 2, 1)
    wanted = mask_of(of_queries, of_keys.expand(2, -1))
    assert torch.equal(table.visible(layout, 2, 1)[:, 0].expand_as(wanted), wanted)


def test_attention_and_gradients_are_those_of_the_mask() -> None:
    of_keys = kinds_of([(IMAGE, 128), (TEXT, 64), (SOUND, 64), (TEXT, 50)])[None]
    length = of_keys.shape[1]
    layout = Layout.dense(1, length)
    table = cross_modal_table(layout, of_keys, of_keys, SEES)
    assert table.block_size == 64
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, length, 8, requires_grad=True) for heads in (4, 2, 2)]
    mask = mask_of(of_keys, of_keys) & layout.visible(torch.device("cpu"))
    keys, values = (each.repeat_interleave(2, 1) for each in inputs[1:])
    scores = (inputs[0] @ keys.transpose(2, 3) * 8**-0.5).masked_fill(~mask[:, None], -torch.inf)
    expected = scores.softmax(-1) @ values
    upward = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, upward)
    for impl in ("reference", "sdpa", "gathered"):
        out = attention(inputs[0], DenseKV(inputs[1], inputs[2]), layout, table=table, impl=impl)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        for found, want in zip(torch.autograd.grad(out, inputs, upward), wanted, strict=True):
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_kinds_that_see_everything_are_dense() -> None:
    everything = {kind: (TEXT, IMAGE, SOUND) for kind in SEES}
    kinds = torch.stack((kinds_of([(IMAGE, 24), (TEXT, 60)]), kinds_of([(TEXT, 5), (SOUND, 79)])))
    model = Decoder(TINY).eval()
    tokens = torch.randint(0, 50, (2, 90))
    with torch.no_grad():
        expected = model(tokens).logits
        model.planner = CrossModalPlanner(kinds, everything)
        assert_logits_equal(model(tokens).logits, expected)


def test_steps_and_chunks_are_as_whole_texts() -> None:
    kinds = kinds_of([(IMAGE, 24), (TEXT, 20), (SOUND, 12), (TEXT, 1)])[None]
    model = Decoder(TINY, planner=CrossModalPlanner(kinds, SEES)).eval()
    randomize(model)
    tokens = torch.randint(0, 50, (2, 90))
    with torch.no_grad():
        expected = model(tokens).logits
        cache = model.new_cache(2, 90)
        parts = [model(tokens[:, a:b], cache=cache).logits for a, b in ((0, 30), (30, 75))]
        parts += [model(tokens[:, at : at + 1], cache=cache).logits for at in range(75, 90)]
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-5)


def test_a_kind_hears_of_another_only_if_it_may() -> None:
    kinds = kinds_of([(IMAGE, 24), (TEXT, 20), (SOUND, 12), (TEXT, 1)])[None]
    planner = CrossModalPlanner(kinds, SEES)
    model = Decoder(TINY.replace(num_layers=1), planner=planner).eval()
    randomize(model)
    tokens = torch.randint(0, 50, (1, 60))
    other = tokens.clone()
    other[:, 3] = (other[:, 3] + 1) % 50
    with torch.no_grad():
        changed = (model(other).logits - model(tokens).logits)[0].abs().amax(-1) > 1e-5
    assert changed.nonzero()[:, 0].tolist() == [*range(3, 44), *range(56, 60)]


def test_kinds_that_do_not_fit_are_told() -> None:
    layout = Layout.dense(1, 8)
    kinds = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(ConfigError, match="kinds of cross-modal attention must be named"):
        CrossModalPlanner(kinds + 7, SEES)
    with pytest.raises(ShapeError, match="of_keys of cross_modal_table must be of 8 slots"):
        cross_modal_table(layout, kinds, kinds[:, :5], SEES)
    with pytest.raises(ShapeError, match="of_queries of cross_modal_table must be"):
        cross_modal_table(layout, kinds[0], kinds, SEES)
