"""Segments: where a text is cut, what is seen of them, and that a text is seen the same way in any
parts."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.errors import ConfigError
from deepseek.generate import Memory, generate
from deepseek.generate.modules import why_no_engine
from deepseek.generate.prefill import group_rows, prefill
from deepseek.models import Boundaries, Decoder, SegmentPlanner, Segments
from deepseek.models.segments import seen_blocks
from deepseek.models.sliding import forget
from deepseek.ops.attention import AttentionImpl, BlockTable, Layout
from tests.generate.conftest import byte_tokenizer
from tests.models.zoo import TINY, randomize
from tests.tolerances import assert_logits_equal

PIECES = ["a", " the", "7", ".", '."', "\n", "\n\n", "#", " ", "?"]
BOUNDARIES = Boundaries(PIECES)
FEW = Segments(least=6, most=24, links=3, block_size=4)
SETTINGS = st.integers(1, 12).flatmap(
    lambda least: st.builds(
        Segments,
        least=st.just(least),
        most=st.integers(least, 40),
        before=st.integers(0, 3),
        links=st.integers(0, 9),
        first=st.integers(0, 2),
        block_size=st.sampled_from([1, 4, 16]),
    )
)
TEXTS = st.lists(st.integers(-1, len(PIECES)), min_size=1, max_size=150)


def text_of(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, len(PIECES), (rows, length), generator=torch.Generator().manual_seed(3))


def small(segments: Segments, impl: AttentionImpl = "auto") -> Decoder:
    torch.manual_seed(0)
    model = Decoder(TINY, planner=SegmentPlanner(BOUNDARIES, segments), impl=impl).eval()
    randomize(model)
    return model


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a the.a the", [0]),
        ("aaaa.\n\naaaa", [0, 6]),
        ("aaaa.\n\n\naaaa", [0, 7]),
        ("aaaa\n#aaa", [0, 5]),
        ("aaaaaaa.aaaa", [0, 8]),
        ("aaaaaaa?aaaa", [0, 8]),
        ("aaaaaaa. aaaa", [0, 9]),
        ("aaaaaaa.7aaa", [0, 10]),
        ("aaaaaaaaaaaaaaaaaaaaaa", [0, 10, 20]),
        ("aaaaaa#aaaaa", [0, 10]),
        ("aa\n\naaaaaaa\n\naaaaa", [0, 10]),
    ],
)
def test_a_text_is_cut_where_its_thoughts_end(text: str, found: list[int]) -> None:
    tokens = []
    while text:
        piece = max((piece for piece in PIECES if text.startswith(piece)), key=len)
        tokens.append(PIECES.index(piece))
        text = text[len(piece) :]
    assert BOUNDARIES.starts(torch.tensor(tokens), least=4, most=10) == found


@settings(deadline=None)
@given(tokens=TEXTS, wanted=SETTINGS)
def test_segments_have_their_lengths_and_no_later_token_moves_them(
    tokens: list[int], wanted: Segments
) -> None:
    starts = BOUNDARIES.starts(torch.tensor(tokens), wanted.least, wanted.most)
    lengths = [after - before for before, after in itertools.pairwise(starts)]
    assert starts[0] == 0
    assert all(wanted.least <= length <= wanted.most for length in lengths)
    assert len(tokens) - starts[-1] <= wanted.most
    for stop in range(1, len(tokens), 7):
        part = BOUNDARIES.starts(torch.tensor(tokens[:stop]), wanted.least, wanted.most)
        assert part == [start for start in starts if start < stop]


@settings(deadline=None)
@given(tokens=TEXTS, wanted=SETTINGS)
def test_blocks_are_those_of_the_segments_that_are_seen(
    tokens: list[int], wanted: Segments
) -> None:
    """Slot by slot: what a block's first query may see, and nothing in a block without such a
    slot."""
    size = wanted.block_size
    starts = BOUNDARIES.starts(torch.tensor(tokens), wanted.least, wanted.most)
    for own in range(-(-len(tokens) // size)):
        known = [start for start in starts if start <= own * size]
        whole = known[-1 - min(wanted.before, len(known) - 1)]
        slots = {
            *range(whole, (own + 1) * size),
            *range(min(wanted.first * size, (own + 1) * size)),
            *(start + at for start in known for at in range(wanted.links)),
        }
        blocks = sorted({slot // size for slot in slots if slot < (own + 1) * size})
        assert seen_blocks(wanted, starts, own) == blocks


@settings(deadline=None)
@given(wanted=SETTINGS, starts=st.lists(st.integers(0, 60), min_size=1, max_size=3))
def test_the_table_fits_any_rows(wanted: Segments, starts: list[int]) -> None:
    ends = tuple(start + 33 - 3 * row for row, start in enumerate(starts))
    tokens = text_of(len(starts), 100)
    layout = Layout(tuple(starts), ends, 33, tokens=tokens)
    states = torch.zeros(len(starts), 4, 33, 6)
    table = SegmentPlanner(BOUNDARIES, wanted).plan(0, states, None, layout)  # type: ignore[arg-type]
    if table is None:
        table = BlockTable.of_lists([[[0]]], 200, states.device)
    else:
        table.check(layout, 4, 2)
    seen = table.visible(layout, 4, 2)
    causal = layout.visible(states.device)[:, None]
    assert not bool((seen & ~causal).any())
    all_before = wanted.replace(before=200)
    planner = SegmentPlanner(BOUNDARIES, all_before)
    whole = planner._table(layout, states.device).visible(layout, 4, 2)
    assert torch.equal(whole[:, 0], causal[:, 0].expand_as(whole[:, 0]))


def test_with_every_segment_seen_it_is_dense_with_gradients() -> None:
    most = FEW.replace(before=20)
    model = small(most)
    dense = Decoder(TINY).eval()
    dense.load_state_dict(model.state_dict())
    tokens = text_of(2, 150)
    assert (most.before + 1) * most.least < 150  # from there on there is a table
    for each in (model, dense):
        each.loss(tokens, tokens).backward()
    with torch.no_grad():
        assert_logits_equal(model(tokens).logits, dense(tokens).logits)
    for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["auto", "gathered", "reference", "sdpa"])
def test_steps_and_chunks_are_as_whole_texts(impl: str) -> None:
    model, tokens = small(FEW, "reference"), text_of(2, 170)
    with torch.no_grad():
        expected = model(tokens).logits
        planner, model.planner = model.planner, None
        assert float((model(tokens).logits - expected).abs().max()) > 1e-3
        model.planner, model.impl = planner, impl  # type: ignore[assignment]
        cache = model.new_cache(2, 170)
        parts = [model(tokens[:, a:b], cache=cache).logits for a, b in ((0, 50), (50, 121))]
        parts += [model(tokens[:, at : at + 1], cache=cache).logits for at in range(121, 170)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-5)


def test_ragged_rows_are_as_alone_and_go_on_when_others_leave() -> None:
    model, tokens = small(FEW), text_of(2, 120)
    mask = torch.ones(2, 120, dtype=torch.long)
    mask[1, 77:] = 0
    later = text_of(3, 20)[2:]
    with torch.no_grad():
        cache = model.new_cache(2, 160)
        found = model(tokens, mask, cache=cache).logits
        assert_logits_equal(found[1:, :77], model(tokens[1:, :77]).logits)
        assert_logits_equal(found[:1], model(tokens[:1]).logits)
        cache = cache.select([1])
        alone = model(torch.cat((tokens[1:, :77], later), 1)).logits
        assert_logits_equal(model(later, cache=cache).logits, alone[:, 77:])


def test_padding_on_the_left_is_before_the_first_segment() -> None:
    model, tokens = small(FEW), text_of(1, 60)
    padded = torch.cat((torch.full((1, 8), 6), tokens), 1)
    mask = (torch.arange(68) >= 8).long()[None]
    with torch.no_grad():
        assert_logits_equal(model(padded, mask).logits[:, 8:], model(tokens).logits)


def test_later_tokens_change_nothing_before_them() -> None:
    model, tokens = small(FEW), text_of(1, 120)
    with torch.no_grad():
        expected = model(tokens).logits
        for place in (31, 64, 119):
            other = tokens.clone()
            other[:, place:] = 6
            assert_logits_equal(model(other).logits[:, :place], expected[:, :place])


def test_it_generates_through_the_modules_with_a_memory_too() -> None:
    tokenizer = byte_tokenizer()
    config = TINY.replace(vocab_size=tokenizer.vocab_size, max_positions=2048)
    model = Decoder(config, planner=SegmentPlanner(Boundaries.of(tokenizer), FEW)).eval()
    randomize(model)
    assert "SegmentPlanner" in str(why_no_engine(model))
    prompt = tokenizer.encode("A day. " * 90)
    found = generate(model, prompt, max_tokens=4, ignore_eos=True).token_ids
    with torch.no_grad():
        whole = model(torch.tensor([[*prompt, *found[:-1]]])).logits[0, -4:].argmax(-1)
    assert whole.tolist() == list(found)
    memory = Memory(max_len=512, mem_len=256, first=64)
    remembered = generate(model, prompt, max_tokens=4, ignore_eos=True, memory=memory)
    assert len(remembered.token_ids) == 4


def test_prompts_that_are_read_apart_leave_their_tokens_in_the_cache() -> None:
    model, tokens = small(FEW), text_of(3, 90)
    prompts = [tokens[0, :20].tolist(), tokens[1, :21].tolist(), tokens[2].tolist()]
    assert len(group_rows([len(prompt) for prompt in prompts])) == 2
    with torch.no_grad():
        cache = model.new_cache(3, 90)
        prefill(model, prompts, cache)
    for row, prompt in enumerate(prompts):
        assert cache.tokens[row, : len(prompt)].tolist() == prompt


def test_the_tokens_of_a_row_leave_with_its_keys() -> None:
    model, tokens = small(FEW), text_of(1, 90)
    with torch.no_grad():
        cache = model.new_cache(1, 90)
        model(tokens, cache=cache)
    forget(model.config, cache, 0, first=16, dropped=20)
    kept = torch.cat((tokens[0, :16], tokens[0, 36:]))
    assert cache.tokens[0, :70].tolist() == kept.tolist()


def test_states_in_place_of_tokens_are_told() -> None:
    model = small(FEW)
    with pytest.raises(ConfigError, match="input_ids of SegmentPlanner must be given"):
        model(inputs_embeds=torch.zeros(1, 60, 24))
    with pytest.raises(ConfigError, match="input_ids of SegmentPlanner must be given"):
        model(inputs_embeds=torch.zeros(1, 60, 24), cache=model.new_cache(1, 60))


@pytest.mark.parametrize(
    "wrong", [{"least": 0}, {"least": 9, "most": 8}, {"before": -1}, {"links": -1}, {"first": -1}]
)
def test_segments_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} of Segments must be"):
        Segments(**wrong)
