"""Tokens that leave early: against a plain reference, in chunks, in batches, in every family."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek.errors import ConfigError
from deepseek.models import Decoder, DecoderConfig, Exits, RoutedPlanner, forward_with_exits
from deepseek.models.exits import Criterion
from tests.models.zoo import CASES, ours, reference
from tests.tolerances import assert_close

CONFIG = DecoderConfig(
    vocab_size=60,
    hidden_size=32,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_positions=256,
    init_std=0.4,
)
PROMPT, LENGTH = 7, 40
THRESHOLDS: dict[Criterion, float] = {"margin": 0.3, "cosine": 0.9}
"""At which some tokens of the model below leave at each place, and some at none."""


def tiny(config: DecoderConfig = CONFIG) -> Decoder:
    torch.manual_seed(4)
    return Decoder(config).double().eval()


def draw(rows: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (rows, length))


def exits_by(criterion: Criterion, **changes: Any) -> Exits:
    return Exits(**{"layers": (2, 3, 4), "threshold": THRESHOLDS[criterion], **changes}).replace(
        criterion=criterion
    )


def run(model: Decoder, tokens: Tensor, exits: Exits, sizes: list[int]) -> tuple[Tensor, ...]:
    """Return logits and depths behind the prompt, and the keys and values of each layer, of a text
    of which the prompt is read by all layers and the rest in passes of some sizes."""
    cache = model.new_cache(len(tokens), tokens.shape[1])
    model(tokens[:, :PROMPT], cache=cache)
    found = [
        forward_with_exits(model, part, cache, exits)
        for part in tokens[:, PROMPT:].split(sizes, dim=1)
    ]
    held = [torch.cat(layer.dense(tokens.shape[1]), dim=-1) for layer in cache.layers]
    logits, depths = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return logits, depths, torch.stack(held)


def one_by_one(tokens: Tensor) -> list[int]:
    return [1] * (tokens.shape[1] - PROMPT)


def turned(heads: Tensor, position: int) -> Tensor:
    """Return heads [heads, dim] turned by rotary positions, as complex numbers."""
    half = heads.shape[-1] // 2
    angles = position * CONFIG.rope.theta ** (-torch.arange(half, dtype=torch.float64) / half)
    number = torch.complex(heads[:, :half], heads[:, half:]) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.cat((number.real, number.imag), dim=-1)


def normed(weight: Tensor, states: Tensor) -> Tensor:
    return states / (states.square().mean(-1, keepdim=True) + CONFIG.norm_eps).sqrt() * weight


def plain(model: Decoder, tokens: list[int], exits: Exits) -> tuple[Tensor, list[int], Tensor]:
    """Return what `run` does for one row, token by token, from the weights alone."""
    keys: list[list[Tensor]] = [[] for _ in range(CONFIG.num_layers)]
    values: list[list[Tensor]] = [[] for _ in range(CONFIG.num_layers)]
    logits, depths = [], []

    def head(states: Tensor) -> Tensor:
        return model.lm_head.weight @ normed(model.model.norm.weight, states)

    for position, token in enumerate(tokens):
        states, depth = model.model.embed_tokens.weight[token], CONFIG.num_layers
        for number, layer in enumerate(model.model.layers, start=1):
            attention, mlp = layer.self_attn, layer.mlp
            inputs = normed(layer.input_layernorm.weight, states)
            keys[number - 1].append(turned((attention.k_proj.weight @ inputs).view(2, 8), position))
            values[number - 1].append((attention.v_proj.weight @ inputs).view(2, 8))
            if depth < number:
                continue
            queries = turned((attention.q_proj.weight @ inputs).view(4, 8), position)
            seen = torch.stack(keys[number - 1]).repeat_interleave(2, dim=1)
            chances = (torch.einsum("hd,shd->hs", queries, seen) / 8**0.5).softmax(-1)
            held = torch.stack(values[number - 1]).repeat_interleave(2, dim=1)
            attended = torch.einsum("hs,shd->hd", chances, held).flatten()
            after = states + attention.o_proj.weight @ attended
            inner = normed(layer.post_attention_layernorm.weight, after)
            gate = torch.nn.functional.silu(mlp.gate_proj.weight @ inner)
            after = after + mlp.down_proj.weight @ (gate * (mlp.up_proj.weight @ inner))
            sure = torch.cosine_similarity(states, after, dim=0)
            if exits.criterion == "margin":
                best = head(after).softmax(-1).topk(2).values
                sure = best[0] - best[1]
            states = after
            if position >= PROMPT and number in exits.layers and sure > exits.threshold:
                depth = number
        if position >= PROMPT:
            logits.append(head(states))
            depths.append(depth)
    held = [
        torch.cat((torch.stack(some_keys), torch.stack(some_values)), dim=-1)
        for some_keys, some_values in zip(keys, values, strict=True)
    ]
    return torch.stack(logits), depths, torch.stack(held).transpose(1, 2)


@pytest.mark.parametrize("criterion", THRESHOLDS)
@pytest.mark.parametrize("sizes", ["one pass", "one by one"])
@torch.inference_mode()
def test_logits_and_cache_are_those_of_a_plain_reference(criterion: Criterion, sizes: str) -> None:
    """As close as float32: the angles of the positions are."""
    model, tokens, exits = tiny(), draw(), exits_by(criterion)
    logits, depths, cache = plain(model, tokens[0].tolist(), exits)
    assert set(depths) == {2, 3, 4, 5}
    found = run(model, tokens, exits, [33] if sizes == "one pass" else one_by_one(tokens))
    assert found[1][0].tolist() == depths
    assert_close(found[0][0], logits, torch.float32)
    assert_close(found[2][:, 0], cache, torch.float32)


@settings(max_examples=15, deadline=None)
@given(st.data())
@torch.inference_mode()
def test_rows_and_chunks_do_not_matter(data: st.DataObject) -> None:
    model = tiny()
    exits = exits_by(
        data.draw(st.sampled_from(list(THRESHOLDS))), threshold=data.draw(st.floats(0, 1))
    )
    tokens = draw(data.draw(st.integers(1, 4)))
    cuts = sorted(data.draw(st.sets(st.integers(1, LENGTH - PROMPT - 1), max_size=5)))
    sizes = [stop - start for start, stop in itertools.pairwise([0, *cuts, LENGTH - PROMPT])]
    logits, depths, cache = run(model, tokens, exits, sizes)
    for row in range(len(tokens)):
        alone = run(model, tokens[row : row + 1], exits, one_by_one(tokens))
        assert torch.equal(depths[row], alone[1][0])
        assert_close(logits[row], alone[0][0])
        assert_close(cache[:, row], alone[2][:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("criterion", THRESHOLDS)
@torch.inference_mode()
def test_where_none_leaves_the_bits_are_those_of_a_plain_pass(
    criterion: Criterion, dtype: torch.dtype
) -> None:
    model, tokens = tiny().to(dtype), draw(2)
    exits = exits_by(criterion, threshold=1.0)
    logits, depths, cache = run(model, tokens, exits, one_by_one(tokens))
    other = model.new_cache(2, LENGTH)
    expected = [model(tokens[:, :PROMPT], cache=other).logits]
    expected += [model(each, cache=other).logits for each in tokens[:, PROMPT:].split(1, dim=1)]
    assert torch.equal(logits, torch.cat(expected[1:], dim=1))
    assert torch.equal(cache, torch.stack([torch.cat(x.dense(LENGTH), -1) for x in other.layers]))
    assert depths.unique().tolist() == [CONFIG.num_layers]


@pytest.mark.parametrize("case", [*CASES, "alibi"])
@torch.inference_mode()
def test_what_is_kept_is_what_a_layer_stores(case: str) -> None:
    if case == "alibi":
        model = tiny(CONFIG.replace(positions="alibi")).float()
    else:
        model = ours(reference(case))
    states = torch.randn(2, 9, model.config.hidden_size)
    caches = []
    for keeps in (True, False):
        caches.append(model.new_cache(2, 9))
        _, context = model.begin_pass(torch.zeros(2, 9, dtype=torch.int64), caches[-1])
        for layer in model.model.layers:
            if keeps:
                layer.keep(states, context)
            else:
                layer(states, context)
        caches[-1].advance(context.layout)
    for kept, stored in zip(caches[0].layers, caches[1].layers, strict=True):
        assert_close(torch.cat(kept.dense(9), dim=-1), torch.cat(stored.dense(9), dim=-1))
        assert float(stored.dense(9)[0].abs().min()) > 0


@pytest.mark.parametrize("case", ["mistral-window", "qwen3-moe", "deepseek-v3", "alibi"])
@torch.inference_mode()
def test_every_family_gives_in_one_pass_what_it_gives_one_by_one(case: str) -> None:
    if case == "alibi":
        model = tiny(CONFIG.replace(positions="alibi"))
    else:
        model = ours(reference(case)).double()
    exits = Exits(layers=(1, 2), criterion="cosine", threshold=0.7)
    tokens = draw(3)
    together = run(model, tokens, exits, [LENGTH - PROMPT])
    apart = run(model, tokens, exits, one_by_one(tokens))
    assert len(together[1].unique()) > 1
    for one, other in zip(together, apart, strict=True):
        assert_close(one.double(), other.double(), torch.float32)


@torch.inference_mode()
def test_the_layers_above_the_last_token_inside_are_not_run() -> None:
    model, tokens = tiny(), draw()
    calls: list[int] = []
    for number, layer in enumerate(model.model.layers, start=1):
        layer.mlp.register_forward_hook(lambda *_, number=number: calls.append(number))
    cache = model.new_cache(1, LENGTH)
    exits = Exits(layers=(2,), threshold=0.0)
    assert forward_with_exits(model, tokens[:, :1], cache, exits).depths.tolist() == [[2]]
    assert calls == [1, 2]


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": ()},
        {"layers": (0, 2)},
        {"layers": (2, 2)},
        {"layers": (3, 2)},
        {"threshold": 1.5},
        {"threshold": -0.1},
        {"threshold": float("nan")},
        {"threshold": True},
        {"criterion": "entropy"},
        {"layers": ("1", "2")},
    ],
)
def test_settings_that_are_no_exits(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Exits(**{"layers": (2,), "threshold": 0.5, **wrong})


def test_exits_are_read_back() -> None:
    exits = exits_by("cosine")
    assert Exits.from_dict(exits.to_dict()) == exits


def test_exits_of_a_threshold_ask_behind_a_half_and_three_quarters() -> None:
    assert Exits.of(30, 0.5) == Exits(layers=(15, 22), threshold=0.5)
    assert Exits.of(2, 0.5).layers == (1,)
    with pytest.raises(ConfigError, match="from 1 on"):
        Exits.of(1, 0.5)


def test_models_that_cannot_have_exits() -> None:
    model, tokens = tiny(), draw()
    with pytest.raises(ConfigError, match="below the model's 5 layers"):
        forward_with_exits(model, tokens, model.new_cache(1, 64), Exits(layers=(5,), threshold=0.5))
    model.planner = RoutedPlanner(CONFIG)
    with pytest.raises(ConfigError, match="by place alone; got 'RoutedPlanner'"):
        forward_with_exits(model, tokens, model.new_cache(1, 64), exits_by("margin"))
