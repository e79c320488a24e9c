"""Texts that are longer than their memory. In a model of one layer keys and values depend on their
own token alone, so a row that forgot must equal a row that never knew."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from deepseek.errors import CapacityError, ConfigError, ShapeError
from deepseek.generate import Completion, Engine, Memory, build_engine, generate
from deepseek.generate.batch import RowPages
from deepseek.generate.modules import engine_of, weights_of
from deepseek.models import Decoder, RoutedPlanner
from deepseek.models.sliding import forget
from deepseek.ops.routing import Routing
from deepseek.ops.scheme import Scheme
from tests.models.zoo import CASES, TINY, ours, randomize, reference
from tests.ops.native import ISAS, NEEDS_KERNELS

MEMORY = Memory(max_len=512, mem_len=256, first=64)
VOCABULARY = 97
BOUNDS = {"float32": 1e-5, "bfloat16": 0.01, "int8-kv8": 0.03}
"""Of the root mean square of a difference of logits, over that of the logits."""


def one_layer(case: str, **changes: object) -> Decoder:
    if case == "alibi":
        config = TINY.replace(num_layers=1, positions="alibi", max_positions=1024, vocab_size=97)
        model = Decoder(config).eval()
        randomize(model)
        return model
    changes = {"mlp_only_layers": []} | changes if "moe" in case else changes
    return ours(reference(case, num_hidden_layers=1, max_position_embeddings=1024, **changes))


def draw(count: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,)).tolist()


def kept(tokens: list[int]) -> list[int]:
    """Return what stays of a row that has just become full."""
    return tokens[: MEMORY.first] + tokens[len(tokens) - MEMORY.mem_len :]


@pytest.mark.parametrize("case", [*CASES, "alibi"])
@torch.inference_mode()
def test_a_row_that_forgets_equals_one_that_never_knew(case: str) -> None:
    model = one_layer(case)
    rows, later = [draw(300), draw(300)], draw(20)
    cache = model.new_cache(2, 400)
    model(torch.tensor(rows), cache=cache)
    forget(model.config, cache, 1, first=64, dropped=100)
    assert cache.lengths == [300, 200]
    found = model(torch.tensor([later, later]), cache=cache).logits
    for row, tokens in enumerate([rows[0], rows[1][:64] + rows[1][164:]]):
        expected = model(torch.tensor([tokens + later])).logits[0, -20:]
        torch.testing.assert_close(found[row], expected, rtol=1e-3, atol=1e-4)


def test_no_more_is_forgotten_than_is_there() -> None:
    model = one_layer("llama")
    cache = model.new_cache(1, 64)
    model(torch.tensor([draw(20)]), cache=cache)
    with pytest.raises(ShapeError, match="at most the 20 tokens"):
        forget(model.config, cache, 0, first=10, dropped=11)


def engine(
    model: Decoder, scheme: str, isa: str | None = None, routing: Routing | None = None
) -> Engine:
    settings = {"instruction_set": isa, "routing": routing, "threads": 2}
    return build_engine(model.config, weights_of(model), Scheme.named(scheme), **settings)


def read(rows: RowPages, tokens: list[int]) -> np.ndarray:
    """Append tokens to row 0, and return their logits."""
    found = []
    while tokens:
        rows.make_room(0)
        count = min(rows.room(0), 200)
        found.append(
            rows.append(tokens[:count], [0] * len(tokens[:count]), range(len(tokens[:count])))
        )
        tokens = tokens[count:]
    return np.concatenate(found)


def assert_near(found: np.ndarray, expected: np.ndarray, bound: float) -> None:
    difference = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert difference < bound


@NEEDS_KERNELS
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scheme", list(BOUNDS))
@pytest.mark.parametrize("head_dim", [16, 20, 64])
def test_pages_that_are_turned_back_equal_new_ones(head_dim: int, scheme: str, isa: str) -> None:
    made = engine(one_layer("llama-yarn", head_dim=head_dim), scheme, isa)
    tokens, later = draw(512), draw(70)
    rows = RowPages(made, 1, 10_000, MEMORY)
    read(rows, tokens)
    found = read(rows, later)
    assert rows.lengths.tolist() == [64 + 256 + 70]
    expected = read(RowPages(made, 1, 1000), kept(tokens) + later)[-70:]
    assert_near(found, expected, BOUNDS[scheme])


@NEEDS_KERNELS
def test_routed_attention_chooses_among_what_is_kept() -> None:
    routing = Routing(recent=1, least=128, most=128, share=0.2)
    made = engine(one_layer("llama", head_dim=64), "float32", routing=routing)
    tokens, later = draw(512), draw(70)
    rows = RowPages(made, 1, 10_000, MEMORY)
    read(rows, tokens)
    found = read(rows, later)
    assert_near(found, read(RowPages(made, 1, 1000), kept(tokens) + later)[-70:], 1e-5)


@torch.inference_mode()
def test_choices_of_the_modules_are_made_anew() -> None:
    """Of groups of 16 tokens, whose choice is kept with the page."""
    model = one_layer("llama", head_dim=64)
    routing = Routing(refresh=16, recent=1, least=128, most=128, share=0.2)
    model.planner = RoutedPlanner(model.config, routing)
    tokens, later = draw(512), torch.tensor([draw(70)])
    cache, other = model.new_cache(1, 512), model.new_cache(1, 512)
    for each in torch.tensor([tokens]).split(50, dim=1):
        model(each, cache=cache)
    assert cache.layers[0].choices
    forget(model.config, cache, 0, first=64, dropped=192)
    assert not cache.layers[0].choices
    model(torch.tensor([kept(tokens)]), cache=other)
    for each in later.split(10, dim=1):
        found, expected = model(each, cache=cache).logits, model(each, cache=other).logits
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@NEEDS_KERNELS
@pytest.mark.parametrize("scheme", ["float32", "bfloat16", "int8-kv8"])
def test_prompts_chunks_and_steps_forget_alike(scheme: str) -> None:
    """Bit by bit, over several rounds of forgetting."""
    made = engine(ours(reference("qwen3", max_position_embeddings=1024)), scheme)
    tokens = draw(1700)
    whole = read(RowPages(made, 1, 10_000, MEMORY), tokens)
    rows, found = RowPages(made, 1, 10_000, MEMORY), []
    for start in range(0, len(tokens), 33):
        found.append(read(rows, tokens[start : start + 33]))
    assert np.array_equal(whole, np.concatenate(found))


@NEEDS_KERNELS
def test_the_engine_and_the_modules_write_the_same() -> None:
    model = ours(reference("llama", max_position_embeddings=1024))
    prompts = [draw(700), draw(1300), draw(30)]
    asked = {"max_tokens": 600, "ignore_eos": True, "memory": MEMORY}
    assert engine_of(model) is not None
    fast = generate(model, prompts, **asked)
    model.impl = "sdpa"
    slow = generate(model, prompts, **asked)
    assert [len(each.token_ids) for each in fast] == [600] * 3
    assert [each.token_ids for each in fast] == [each.token_ids for each in slow]


@pytest.mark.parametrize("impl", ["auto", "sdpa"])
def test_a_row_does_not_depend_on_its_companions(impl: str) -> None:
    model = ours(reference("llama", max_position_embeddings=1024))
    model.impl = impl
    prompts = [draw(700), draw(500), draw(30)]
    asked = {"max_tokens": 30, "ignore_eos": True, "memory": MEMORY}
    together = generate(model, prompts, **asked)
    for prompt, one in zip(prompts, together, strict=True):
        alone = generate(model, prompt, **asked)
        assert isinstance(alone, Completion)
        assert alone.token_ids == one.token_ids


def test_a_text_within_its_memory_is_what_it_is_without() -> None:
    model = ours(reference("llama", max_position_embeddings=1024))
    prompt = draw(100)
    asked = {"max_tokens": 50, "ignore_eos": True}
    assert isinstance(one := generate(model, prompt, **asked, memory=MEMORY), Completion)
    assert isinstance(other := generate(model, prompt, **asked), Completion)
    assert one.token_ids == other.token_ids


@NEEDS_KERNELS
def test_bytes_stay_the_same() -> None:
    made = engine(one_layer("llama"), "bfloat16")
    rows = RowPages(made, 1, 10**9, MEMORY)
    before = rows.pages.num_bytes
    read(rows, draw(3000))
    assert rows.pages.num_bytes == before
    assert rows.pages.num_pages == MEMORY.max_len // 64


def test_only_a_memory_lets_a_text_pass_the_context() -> None:
    model = ours(reference("llama", max_position_embeddings=512))
    with pytest.raises(CapacityError, match="forget old tokens"):
        generate(model, draw(600))
    with pytest.raises(ConfigError, match="at most the model's context of 512"):
        generate(model, draw(600), memory=Memory())
    with pytest.raises(ConfigError, match="must be a Memory"):
        generate(model, draw(600), memory=512)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_len": 1000},
        {"max_len": 4096.0},
        {"max_len": "4096"},
        {"first": True},
        {"max_len": 448, "mem_len": 64},
        {"mem_len": -64},
        {"first": 63},
        {"max_len": 1024, "mem_len": 960},
    ],
)
def test_numbers_that_are_no_memory(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Memory(**wrong)


def test_a_memory_of_so_many_tokens_keeps_half() -> None:
    assert Memory.of(1984) == Memory(max_len=1984, mem_len=960, first=64)
    assert dataclasses.replace(Memory.of(512), first=0).dropped == 256
