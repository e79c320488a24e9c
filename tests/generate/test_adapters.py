"""An engine with adapters against the model that they are merged into, and PEFT's own files."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.errors import ConfigError
from deepseek.generate import Engine, build_engine
from deepseek.generate.adapters import NO_ADAPTER
from deepseek.generate.modules import weights_of
from deepseek.hub.adapter import read_adapter
from deepseek.models import Decoder
from deepseek.ops.linear.reference import round_int4
from deepseek.ops.low_rank import LowRankUpdate
from deepseek.ops.scheme import Scheme
from deepseek.train.adapter import insert_adapter, merge_adapter, save_adapter
from deepseek.train.config import LowRank
from tests.generate.conftest import TINY
from tests.models.zoo import ours, reference
from tests.ops.native import BEST, ISAS, NEEDS_KERNELS
from tests.tolerances import assert_logits_equal

pytestmark = NEEDS_KERNELS

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MB = 1 << 20
FAR_OFF = {"bfloat16": 0.05, "int8": 0.12, "int4": 0.12, "int8-kv8": 0.12}
"""Norm of the difference of logits from the model's, over that of these: tiny and random, it
exaggerates what is rounded."""


def tiny() -> Decoder:
    torch.manual_seed(1)
    return Decoder(TINY).eval()


def on_grid(model: Decoder) -> Decoder:
    """Round a model's layers to what int4 keeps."""
    with torch.no_grad():
        for name, weight in model.model.layers.named_parameters():
            if name.endswith("proj.weight"):
                whole = weight.shape[1] // 32 * 32
                weight[:, :whole] = round_int4(weight[:, :whole], 32)
                weight[:, whole:] = 0
    return model


def engine(model: Decoder, scheme: str = "float32", isa: str = BEST, *, threads: int = 2) -> Engine:
    weights = weights_of(model)
    return build_engine(
        model.config, weights, Scheme.named(scheme), threads=threads, instruction_set=isa
    )


def draw_adapter(
    model: Decoder, folder: Path, seed: int, targets: tuple[str, ...] = SEVEN, rank: int = 5
) -> Decoder:
    """Write random matrices beside some of a model's as training does, and return the model that
    they are merged into."""
    adapted = copy.deepcopy(model)
    config = LowRank(rank=rank, alpha=2.0 * rank, targets=targets)
    insert_adapter(adapted, config, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.12)
    save_adapter(adapted, config, folder)
    merge_adapter(adapted)
    return adapted


def updates_of(folder: Path) -> Mapping[str, LowRankUpdate]:
    return read_adapter(folder, max_bytes=MB).updates


def expected(model: Decoder, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


def read_alone(
    made: Engine, tokens: list[int], number: int = NO_ADAPTER, split: int = 200
) -> np.ndarray:
    """Return the logits of all tokens of one sequence, `split` of them in a step."""
    pages, found = made.new_pages(8), []
    table = np.arange(8)[None]
    for start in range(0, len(tokens), split):
        part = tokens[start : start + split]
        count = len(part)
        places, rows = range(start, start + count), [0] * count
        adapters = [number] * count
        found.append(made.step(pages, part, places, rows, table, range(count), adapters))
    return np.concatenate(found)


def text(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, count).tolist()


@pytest.mark.parametrize("isa", ISAS)
def test_logits_equal_the_merged_model(isa: str, tmp_path: Path) -> None:
    model = tiny()
    merged = draw_adapter(model, tmp_path, 2)
    made = engine(model, isa=isa)
    number = made.add_adapter("a", updates_of(tmp_path)).number
    tokens = text(150)
    far = (expected(merged, tokens) - expected(model, tokens)).abs().max()
    assert far > 1
    for count, split in ((150, 150), (150, 70), (20, 1)):
        found = read_alone(made, tokens[:count], number, split)
        assert_logits_equal(torch.from_numpy(found), expected(merged, tokens[:count]))
    assert_logits_equal(torch.from_numpy(read_alone(made, tokens)), expected(model, tokens))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scheme", FAR_OFF)
def test_a_rounded_base_is_as_far_off_as_without_an_adapter(
    scheme: str, isa: str, tmp_path: Path
) -> None:
    """What the base loses is all that is lost."""
    model = on_grid(tiny())
    merged = draw_adapter(model, tmp_path, 2)
    made = engine(model, scheme, isa)
    number = made.add_adapter("a", updates_of(tmp_path)).number
    tokens = text(150)

    def distance(found: np.ndarray, model: Decoder) -> float:
        exact = expected(model, tokens).numpy()
        return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))

    assert distance(read_alone(made, tokens), model) < FAR_OFF[scheme]
    adapted = read_alone(made, tokens, number)
    assert distance(adapted, merged) < FAR_OFF[scheme]
    assert distance(adapted, model) > 0.8


@pytest.mark.parametrize("scheme", ["float32", "bfloat16", "int8", "int4-g64"])
def test_rows_of_a_mixed_batch_are_as_alone(scheme: str, tmp_path: Path) -> None:
    """Bit by bit, on any number of threads, in chunks of any size; those without an adapter as in
    an engine that has none."""
    model = tiny()
    folders = [tmp_path / "first", tmp_path / "second"]
    draw_adapter(model, folders[0], 2, rank=3)
    draw_adapter(model, folders[1], 3, ("v_proj", "o_proj", "up_proj"), rank=18)
    updates = [updates_of(folder) for folder in folders]
    engines = {threads: engine(model, scheme, threads=threads) for threads in (1, 2, 3)}
    numbers = [NO_ADAPTER]
    for made in engines.values():
        adapters = [made.add_adapter(str(place), each) for place, each in enumerate(updates)]
        numbers = [NO_ADAPTER, *(each.number for each in adapters)]
    bare, tokens = engine(model, scheme), text(40)
    alone = {number: read_alone(engines[1], tokens, number) for number in numbers}
    assert np.array_equal(alone[NO_ADAPTER], read_alone(bare, tokens))
    chunks = st.lists(st.integers(1, 40), min_size=1, max_size=6)
    row = st.tuples(st.sampled_from(numbers), chunks)

    @settings(max_examples=12, deadline=None)
    @given(st.lists(row, min_size=1, max_size=5), st.sampled_from([1, 2, 3]))
    def holds(rows: list[tuple[int, list[int]]], threads: int) -> None:
        made, table = engines[threads], np.arange(len(rows))[:, None]
        pages, done = made.new_pages(len(rows)), [0] * len(rows)
        for turn in range(6):
            step = []
            for place, (number, sizes) in enumerate(rows):
                stop = min(40, done[place] + sizes[turn % len(sizes)])
                step += [(position, place, number) for position in range(done[place], stop)]
                done[place] = stop
            if not step:
                break
            positions, places, adapters = map(list, zip(*step, strict=True))
            part = [tokens[position] for position in positions]
            found = made.step(pages, part, positions, places, table, range(len(step)), adapters)
            for logits, (position, _, number) in zip(found, step, strict=True):
                assert np.array_equal(logits, alone[number][position])

    holds()


@pytest.mark.parametrize("case", ["qwen2", "qwen3-tied", "qwen3-moe-mixed", "llama-mqa-biased"])
def test_other_families(case: str, tmp_path: Path) -> None:
    """Biases, norms of heads, a tied head, routed experts, which stay as they are."""
    model = ours(reference(case))
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    merged = draw_adapter(model, tmp_path, 2, targets)
    made = engine(model)
    number = made.add_adapter("a", updates_of(tmp_path)).number
    tokens = torch.randint(0, 97, (90,)).tolist()
    found = read_alone(made, tokens, number, 50)
    assert_logits_equal(torch.from_numpy(found), expected(merged, tokens))


def test_it_is_dropped_while_somebody_holds_it(tmp_path: Path) -> None:
    model, tokens = tiny(), text(20)
    draw_adapter(model, tmp_path, 2)
    made, updates = engine(model), updates_of(tmp_path)
    held = made.add_adapter("a", updates)
    before = read_alone(made, tokens, held.number)
    made.drop_adapter("a")
    assert not made.adapters
    again = made.add_adapter("a", updates)
    assert np.array_equal(read_alone(made, tokens, held.number), before)
    num_bytes, number = made.adapter_bytes, held.number
    del held
    assert made.adapter_bytes == num_bytes / 2
    with pytest.raises(ConfigError, match=f"no adapter of number {number}"):
        read_alone(made, tokens, number)
    assert np.array_equal(read_alone(made, tokens, again.number), before)


def test_what_an_engine_refuses(tmp_path: Path) -> None:
    model = tiny()
    draw_adapter(model, tmp_path, 2)
    made, updates = engine(model), updates_of(tmp_path)
    down, up = np.zeros((2, 32), np.float32), np.zeros((258, 2), np.float32)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "../x"):
        with pytest.raises(ConfigError, match="take no adapter"):
            made.add_adapter("a", {name: LowRankUpdate(down, up, 1.0)})
    wide = {name: LowRankUpdate(each.down, up, 1.0) for name, each in updates.items()}
    with pytest.raises(ConfigError, match="shapes of"):
        made.add_adapter("a", wide)
    with pytest.raises(ConfigError, match="at least one"):
        made.add_adapter("a", {})
    with pytest.raises(ConfigError, match="one that is loaded"):
        made.drop_adapter("a")
    assert made.adapter_bytes == 0
    made.add_adapter("a", updates)
    num_bytes = made.adapter_bytes
    with pytest.raises(ConfigError, match="new name"):
        made.add_adapter("a", updates)
    assert made.adapter_bytes == num_bytes


def test_experts_of_a_model_take_none() -> None:
    made = engine(ours(reference("qwen3-moe-mixed")))
    (name, *_) = [
        name for item in made.program.instructions if item.op == "experts" for name in item.weights
    ]
    update = LowRankUpdate(np.zeros((1, 48), np.float32), np.zeros((1, 1), np.float32), 1.0)
    with pytest.raises(ConfigError, match="routed experts take no adapter"):
        made.add_adapter("a", {name: update})
