"""Static patterns: what they list, that a text is seen the same way in any parts, and that a bundle
keeps them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek import hub
from deepseek.errors import ConfigError, FormatError
from deepseek.face import load, load_engine
from deepseek.generate import generate
from deepseek.generate.modules import why_no_engine
from deepseek.models import Decoder, Pattern, StaticPlanner
from deepseek.models.static import pattern_table, seen_blocks
from deepseek.ops.attention import BlockTable, DenseKV, Layout
from tests.models.zoo import TINY, randomize
from tests.tolerances import assert_logits_equal

SPARSE = Pattern(recent=2, every=4, sparsity=0.7, block_size=16)
PATTERNS = st.builds(
    Pattern,
    first=st.integers(0, 3),
    recent=st.integers(1, 5),
    every=st.none() | st.integers(1, 6),
    sparsity=st.floats(0, 1),
    seed=st.integers(0, 3),
    block_size=st.sampled_from([4, 16, 64]),
)


@settings(deadline=None)
@given(pattern=PATTERNS, layer=st.integers(0, 40), own=st.integers(0, 60))
def test_a_pattern_lists_what_its_settings_say(pattern: Pattern, layer: int, own: int) -> None:
    seen = seen_blocks(pattern, layer, own)
    assert list(seen) == sorted(set(seen)) and seen[-1] == own and seen[0] >= 0
    always = {
        block
        for block in range(own + 1)
        if block < pattern.first
        or own - block < pattern.recent
        or (pattern.every and (own - block) % pattern.every == 0)
    }
    assert always <= set(seen)
    assert len(seen) - len(always) == round((own + 1 - len(always)) * (1 - pattern.sparsity))


@settings(deadline=None)
@given(pattern=PATTERNS, starts=st.lists(st.integers(0, 90), min_size=1, max_size=3))
def test_a_pattern_is_a_table_that_fits_any_rows(pattern: Pattern, starts: list[int]) -> None:
    layout = Layout(tuple(starts), tuple(start + 33 for start in starts), 33)
    table = pattern_table(layout, pattern, 0, torch.device("cpu"))
    table.check(layout, 4, 2)
    dense = pattern_table(layout, pattern.replace(sparsity=0.0), 0, torch.device("cpu"))
    whole = layout.visible(torch.device("cpu")).expand(len(starts), -1, -1)
    assert torch.equal(dense.visible(layout, 4, 2)[:, 0], whole)


@pytest.mark.parametrize("impl", ["auto", "gathered", "reference", "sdpa"])
def test_a_pattern_decodes_as_it_prefills(impl: str) -> None:
    model = Decoder(TINY, planner=StaticPlanner(SPARSE), impl="reference").eval()
    randomize(model)
    tokens = torch.randint(0, 50, (2, 170))
    with torch.no_grad():
        expected = model(tokens).logits
        model.planner = None
        assert float((model(tokens).logits - expected).abs().max()) > 1e-3
        model.planner = StaticPlanner(SPARSE)
        model.impl = impl
        cache = model.new_cache(2, 170)
        parts = [model(tokens[:, :50], cache=cache).logits]
        parts.append(model(tokens[:, 50:165], cache=cache).logits)
        parts += [model(tokens[:, at : at + 1], cache=cache).logits for at in range(165, 170)]
        assert_logits_equal(torch.cat(parts, 1), expected)


def test_random_blocks_differ_by_layer_place_and_seed_alone() -> None:
    pattern = Pattern(sparsity=0.5)
    drawn = seen_blocks(pattern, 0, 40)
    assert seen_blocks(pattern.replace(seed=0), 0, 40) == drawn
    assert seen_blocks(pattern, 1, 40) != drawn
    assert seen_blocks(pattern.replace(seed=1), 0, 40) != drawn


def test_layers_of_a_pass_share_a_table_where_nothing_is_random() -> None:
    layout, states = Layout.dense(1, 300), torch.zeros(1, 4, 300, 6)
    kv = DenseKV(states[:, :2], states[:, :2])

    def tables(pattern: Pattern) -> list[BlockTable]:
        found = [StaticPlanner(pattern).plan(layer, states, kv, layout) for layer in (0, 1)]
        return [table for table in found if table is not None]

    first, second = tables(SPARSE)
    assert not torch.equal(first.indices, second.indices)
    first, second = tables(SPARSE.replace(sparsity=1.0))
    assert first is second


@pytest.mark.parametrize(
    "wrong",
    [{"recent": 0}, {"first": -1}, {"every": 0}, {"sparsity": 1.1}, {"seed": -1}],
)
def test_a_pattern_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}.* of Pattern must be from 0"):
        Pattern(**wrong)


def test_a_config_and_its_bundle_keep_a_pattern(tmp_path: Path) -> None:
    """The model learns by it, is saved and loaded with it, and generates through its modules."""
    config = TINY.replace(family="deepseek_stack", pattern=SPARSE)
    model = Decoder(config)
    randomize(model)
    assert isinstance(model.planner, StaticPlanner) and model.planner.pattern == SPARSE
    tokens = torch.randint(0, 50, (1, 150))
    model(tokens, labels=tokens).loss.backward()
    assert all(bool(value.grad.isfinite().all()) for value in model.parameters())
    assert "pattern" in str(why_no_engine(model))
    path = hub.save(model, tmp_path / "bundle", name="tiny").path
    loaded = load(path)
    assert loaded.config.pattern == SPARSE
    with torch.no_grad():
        assert_logits_equal(loaded(tokens).logits, model.eval()(tokens).logits)
    assert load_engine(path, keep=False) is None
    prompt = tokens[0].tolist()
    found = generate(loaded, prompt, max_tokens=3, ignore_eos=True).token_ids
    assert len(found) == 3
    with pytest.raises(ConfigError, match="made for a static pattern"):
        load(path, attention="routed")


def test_a_pattern_has_no_place_in_other_families_or_beside_a_window(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"deepseek_stack.* or another value of pattern"):
        hub.save(Decoder(TINY.replace(pattern=SPARSE)), tmp_path / "bundle", name="tiny")
    with pytest.raises(ConfigError, match="pattern of DecoderConfig must be None where there is"):
        TINY.replace(pattern=SPARSE, window=8, window_layers=(0,))
