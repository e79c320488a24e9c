"""The contract of an execution of attention: ours hold it, and every planted fault is caught."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.attention.flex_attention as flex_module
from torch import Tensor

from deepseek.errors import ConfigError, VerifyError
from deepseek.ops.attention import ATTENTION_IMPLS, DenseKV, PagedKV, attention, choose, merge
from deepseek.ops.attention.reference import attention_reference
from deepseek.ops.cpu import why_missing
from deepseek.testing import AttentionProof, check_attention
from deepseek.testing.executions import BLOCKS, HEADS, questions

SERVED = {"blocked": 2, "flex": 40, "gathered": 36, "reference": 48, "sdpa": 48, "tiled": 48}
"""Of 48 questions: dense causal ones, tables without means, those without ALiBi either, all."""


def test_questions_cover_blocks_groups_and_kinds() -> None:
    asked = list(questions())
    tables = [each.table for each in asked if each.table is not None]
    assert len(asked) == max(SERVED.values())
    assert {table.block_size for table in tables} == set(BLOCKS) == {16, 32, 64, 128}
    assert {each.heads[0] // each.heads[1] for each in asked} == {1, 3, 4}
    for kind in {each.name.split(",")[0] for each in asked}:
        found = [each for each in asked if each.name.startswith(f"{kind},")]
        assert {each.heads for each in found} == set(HEADS), kind


@pytest.mark.parametrize("name", [name for name in ATTENTION_IMPLS if name != "flex"])
def test_our_executions_hold_it(name: str) -> None:
    if name == "tiled" and (why := why_missing()):
        pytest.skip(why)
    proof = check_attention(ATTENTION_IMPLS[name])
    assert len(proof.served) == SERVED[name] and len(proof.refused) == 48 - SERVED[name]
    assert proof.has_lse == (name != "sdpa") and proof.largest_error < 0.5
    assert f"{SERVED[name]} questions served" in proof.text


@pytest.mark.slow
def test_flex_holds_it_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients, which PyTorch refuses on a CPU; `test_gpu_attention.py` has them."""
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    proof = check_attention(ATTENTION_IMPLS["flex"], has_gradients=False)
    assert len(proof.served) == SERVED["flex"] and proof.has_lse


def test_auto_holds_it() -> None:
    chosen = set()

    def auto(queries, kv, layout, /, *, table, slopes, scale, return_lse=False):
        given = {"table": table, "slopes": slopes, "return_lse": return_lse}
        chosen.add(choose(queries, kv, layout, **given))
        found = attention(queries, kv, layout, scale=scale, **given)
        return found if return_lse else (found, None)

    proof = check_attention(auto)
    assert len(proof.served) == 48 and proof.has_lse
    without = {"blocked", "gathered", "reference", "sdpa"}
    assert chosen == (without if why_missing() else {*without, "tiled"})


@pytest.mark.parametrize("name", ["gathered", "sdpa"])
def test_bfloat16_has_a_bound_of_its_own(name: str) -> None:
    assert check_attention(ATTENTION_IMPLS[name], dtype=torch.bfloat16).largest_error > 0.01


Answer = tuple[Tensor, Tensor | None]


def the_diagonal_hidden(queries, kv, layout, *, table, **asked) -> Answer:
    """Off by one: a query does not see its own slot, in dense attention alone."""
    earlier = tuple(start - 1 for start in layout.query_start)
    other = dataclasses.replace(layout, query_start=earlier, memo={})
    return attention_reference(
        queries, kv, other if table is None else layout, table=table, **asked
    )


def the_next_key_seen(queries, kv, layout, *, table, **asked) -> Answer:
    """A future key: causality off by one, in dense attention alone."""
    later = tuple(start + 1 for start in layout.query_start)
    other = dataclasses.replace(layout, query_start=later, memo={})
    return attention_reference(
        queries, kv, other if table is None else layout, table=table, **asked
    )


def all_keys_seen(queries, kv, layout, **asked) -> Answer:
    return attention_reference(
        queries, kv, dataclasses.replace(layout, causal=False, memo={}), **asked
    )


def a_block_twice(queries, kv, layout, *, table, return_lse=False, **asked) -> Answer:
    """The first listed block counts a second time."""
    asked = {"return_lse": True, **asked}
    found = attention_reference(queries, kv, layout, table=table, **asked)
    if table is not None and not table.means:
        first = dataclasses.replace(table, counts=table.counts.clamp(max=1), memo={})
        found = merge([found, attention_reference(queries, kv, layout, table=first, **asked)])
    return found[0], found[1] if return_lse else None


def a_block_missed(queries, kv, layout, *, table, **asked) -> Answer:
    if table is not None:
        fewer = table.counts.where(table.counts == 1, table.counts - 1)
        table = dataclasses.replace(table, counts=fewer, memo={})
    return attention_reference(queries, kv, layout, table=table, **asked)


def without(name: str) -> Callable[..., Answer]:
    """Return an execution that ignores a field of the table."""

    def run(queries, kv, layout, *, table, **asked) -> Answer:
        if table is not None:
            table = dataclasses.replace(table, **{name: None}, memo={})
        return attention_reference(queries, kv, layout, table=table, **asked)

    return run


def a_reach_too_far(queries, kv, layout, *, table, **asked) -> Answer:
    if table is not None and table.reach is not None:
        table = dataclasses.replace(table, reach=table.reach + 1, memo={})
    return attention_reference(queries, kv, layout, table=table, **asked)


def padding_seen(queries, kv, layout, **asked) -> Answer:
    return attention_reference(
        queries, kv, dataclasses.replace(layout, key_mask=None, memo={}), **asked
    )


def ends_ignored(queries, kv, layout, **asked) -> Answer:
    longest = (layout.num_slots,) * layout.num_rows
    return attention_reference(
        queries, kv, dataclasses.replace(layout, key_length=longest, memo={}), **asked
    )


def heads_interleaved(queries, kv, layout, **asked) -> Answer:
    """Query head h reads KV head h % KV heads; only where no list differs by head."""
    states = kv.dense(layout.num_slots)
    group = queries.shape[1] // states[0].shape[1]
    keys, values = (each.repeat(1, group, 1, 1) for each in states)
    if asked["table"] is None:
        return attention_reference(queries, DenseKV(keys, values), layout, **asked)
    return attention_reference(queries, kv, layout, **asked)


def pages_in_order(queries, kv, layout, **asked) -> Answer:
    """The page table is not read."""
    if isinstance(kv, PagedKV):
        table = torch.arange(kv.page_table.numel()).view_as(kv.page_table)
        kv = dataclasses.replace(kv, page_table=table)
    return attention_reference(queries, kv, layout, **asked)


def no_slopes(queries, kv, layout, **asked) -> Answer:
    return attention_reference(queries, kv, layout, **(asked | {"slopes": None}))


def its_own_scale(queries, kv, layout, **asked) -> Answer:
    return attention_reference(queries, kv, layout, **(asked | {"scale": 0.26}))


def powers_of_two(queries, kv, layout, **asked) -> Answer:
    out, lse = attention_reference(queries, kv, layout, **asked)
    return out, None if lse is None else lse / math.log(2)


def finite_where_blind(queries, kv, layout, **asked) -> Answer:
    out, lse = attention_reference(queries, kv, layout, **asked)
    return out, None if lse is None else lse.clamp(min=-1e4)


def no_number_where_blind(queries, kv, layout, **asked) -> Answer:
    out, lse = attention_reference(queries, kv, layout, **asked)
    return torch.where((out == 0).all(-1, keepdim=True), math.nan, out), lse


def lse_of_no_gradient(queries, kv, layout, **asked) -> Answer:
    out, lse = attention_reference(queries, kv, layout, **asked)
    return out, None if lse is None else lse.detach()


def keys_of_no_gradient(queries, kv, layout, **asked) -> Answer:
    return attention_reference(queries, DenseKV(kv.keys.detach(), kv.values), layout, **asked)


def queries_changed(queries, kv, layout, **asked) -> Answer:
    found = attention_reference(queries, kv, layout, **asked)
    queries.data.mul_(2)
    return found


def raised(queries, kv, layout, **asked) -> Answer:
    if layout.num_queries == 1:
        raise RuntimeError("one query")
    return attention_reference(queries, kv, layout, **asked)


def only_outputs(queries, kv, layout, **asked) -> Answer:
    return attention_reference(queries, kv, layout, **asked)[0]  # type: ignore[return-value]


def lse_forgotten(queries, kv, layout, **asked) -> Answer:
    return attention_reference(queries, kv, layout, **asked)[0], None


def refused(queries, kv, layout, **asked) -> Answer:
    raise ConfigError("none of them")


def turned(queries, kv, layout, **asked) -> Answer:
    out, lse = attention_reference(queries, kv, layout, **asked)
    return out.transpose(1, 2), lse


FAULTS = {
    a_block_missed: "outputs of attention",
    a_block_twice: "outputs of attention",
    a_reach_too_far: "outputs of attention, window",
    all_keys_seen: "outputs of attention, dense",
    ends_ignored: "outputs of attention, ragged rows",
    finite_where_blind: "log-sum-exp of attention",
    heads_interleaved: "outputs of attention, dense",
    its_own_scale: "outputs of attention, dense",
    keys_of_no_gradient: "gradients of attention, dense",
    lse_forgotten: "log-sum-exp of attention, dense",
    lse_of_no_gradient: "gradient of queries of attention, dense",
    no_number_where_blind: "outputs of attention",
    no_slopes: "outputs of attention, ALiBi",
    only_outputs: "result of attention, dense",
    pages_in_order: "outputs of attention, ragged rows",
    padding_seen: "outputs of attention, padded",
    powers_of_two: "log-sum-exp of attention, dense",
    queries_changed: "queries of attention, dense",
    raised: "call of attention, one query",
    refused: "answers of execution",
    the_diagonal_hidden: "outputs of attention, dense",
    the_next_key_seen: "outputs of attention, dense",
    turned: "outputs of attention, dense",
    without("query_block"): "attention, lists of 16 queries",
    without("reach"): "outputs of attention, window",
    without("skip"): "outputs of attention, skip bits",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__qualname__)
def test_a_planted_fault_is_caught(fault: Callable[..., Answer]) -> None:
    with pytest.raises(VerifyError) as caught:
        check_attention(fault)
    message = str(caught.value)
    assert FAULTS[fault] in message and "\n" not in message and "must be" in message


def test_a_change_of_later_keys_is_seen_where_the_reference_is_blind_to_it() -> None:
    """An execution that is right only for the numbers it was compared by."""
    calls: dict[int, Answer] = {}

    def remembers(queries, kv, layout, **asked) -> Answer:
        found = attention_reference(queries, kv, layout, **asked)
        if id(layout) not in calls:
            calls[id(layout)] = (found, layout)  # type: ignore[assignment]
            return found
        return found[0] + kv.keys.sum(), found[1]

    with pytest.raises(VerifyError, match="outputs after a change of later keys of attention"):
        check_attention(remembers)


def test_a_proof_says_what_was_refused() -> None:
    def without_alibi(queries, kv, layout, *, slopes, **asked) -> Answer:
        if slopes is not None:
            raise ConfigError("no ALiBi")
        return attention_reference(queries, kv, layout, slopes=slopes, **asked)

    proof = check_attention(without_alibi)
    assert isinstance(proof, AttentionProof)
    assert len(proof.refused) == len(BLOCKS)
    assert all(name.startswith("ALiBi, blocks of") for name in proof.refused)
