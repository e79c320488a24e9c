"""The engine against the modules it is made from, and when it steps aside."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import deepseek
from deepseek.errors import ConfigError
from deepseek.face import load_engine
from deepseek.generate import Engine, build_engine, generate
from deepseek.generate.modules import engine_of, why_no_engine
from deepseek.models import Decoder, WindowPlanner
from deepseek.models.config import DecoderConfig, ExpertsConfig
from deepseek.models.families import build_model
from deepseek.ops.cpu import why_missing
from deepseek.ops.scheme import Scheme
from tests.models.test_planners import EveryBlock
from tests.models.zoo import CASES, ours, randomize, reference
from tests.ops.native import ISAS
from tests.tolerances import assert_logits_equal

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))

SKIPPED = ("deepseek", "dynamic")
FLAT = [case for case in CASES if not any(word in case for word in SKIPPED)]
VOCABULARY = 97


def engine(model: Decoder, **settings: object) -> Engine:
    found = engine_of(model)
    assert found is not None
    if not settings:
        return found
    from deepseek.generate.modules import weights_of

    scheme = settings.pop("scheme", found.scheme)
    return build_engine(model.config, weights_of(model), scheme, **settings)


def draw(lengths: list[int]) -> list[list[int]]:
    return [torch.randint(0, VOCABULARY, (length,)).tolist() for length in lengths]


def expected(model: Decoder, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


def scrambled_table(rows: int, per_row: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(rows * per_row).reshape(rows, per_row)


def whole(engine: Engine, sequences: list[list[int]], splits: list[int]) -> list[np.ndarray]:
    """Return the logits of all tokens of sequences that are read together, `splits` tokens of each
    at a time."""
    longest = max(len(tokens) for tokens in sequences)
    table = scrambled_table(len(sequences), -(-longest // 64))
    pages = engine.new_pages(table.size)
    done, found = [0] * len(sequences), [[] for _ in sequences]
    for number in range(1000):
        tokens, positions, rows = [], [], []
        for row, sequence in enumerate(sequences):
            part = sequence[done[row] : done[row] + splits[number % len(splits)]]
            tokens += part
            positions += range(done[row], done[row] + len(part))
            rows += [row] * len(part)
            done[row] += len(part)
        if not tokens:
            break
        logits = engine.step(pages, tokens, positions, rows, table, range(len(tokens)))
        for place, row in enumerate(rows):
            found[row].append(logits[place])
    return [np.array(each) for each in found]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", FLAT)
def test_logits_equal_the_modules(case: str, isa: str) -> None:
    model = ours(reference(case))
    sequences = draw([3, 90, 130])
    found = whole(engine(model, instruction_set=isa), sequences, [70, 1, 200])
    for tokens, logits in zip(sequences, found, strict=True):
        assert_logits_equal(torch.from_numpy(logits), expected(model, tokens))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "scheme", ["float32", "bfloat16", "int8", "int8-g192", "int8-row", "int4-g64", "int8-kv8"]
)
def test_a_row_does_not_depend_on_its_companions(scheme: str, isa: str) -> None:
    """Bit by bit: alone or in a batch, whole or in chunks, on one thread or three."""
    model = ours(reference("qwen3"))
    sequences = draw([5, 61, 300])
    settings = {"scheme": Scheme.named(scheme), "instruction_set": isa}
    one = engine(model, threads=1, **settings)
    three = engine(model, threads=3, **settings)
    together = whole(three, sequences, [64, 1, 1, 130, 7])
    for tokens, logits in zip(sequences, together, strict=True):
        for alone in (whole(one, [tokens], [200]), whole(one, [tokens], [1])):
            assert np.array_equal(alone[0], logits)


@pytest.mark.parametrize("case", ["qwen2", "qwen3-moe"])
def test_rows_are_picked_out_of_a_step(case: str) -> None:
    """Some of the tokens of several rows, none at all, and more than there is room for."""
    model = ours(reference(case))
    sequences = draw([30, 1, 20])
    found, table = engine(model), np.arange(3)[:, None]
    tokens = [token for each in sequences for token in each]
    positions = [place for each in sequences for place in range(len(each))]
    rows = [row for row, each in enumerate(sequences) for _ in each]
    pages = found.new_pages(3)
    every = found.step(pages, tokens, positions, rows, table, range(51))
    some = found.step(pages, tokens, positions, rows, table, [29, 30, 3])
    assert np.array_equal(some, every[[29, 30, 3]])
    assert found.step(pages, tokens, positions, rows, table, []).shape == (0, VOCABULARY)
    with pytest.raises(ConfigError, match="selected"):
        found.step(pages, tokens, positions, rows, table, [0] * 600)


def grouped_experts() -> Decoder:
    """Sigmoid scores with a balancing bias, groups, shared experts, a dense layer, a scale."""
    experts = ExpertsConfig(
        num_experts=12,
        num_active=3,
        width=20,
        num_shared=2,
        score="sigmoid",
        scale=1.7,
        num_groups=4,
        num_active_groups=2,
        dense_layers=(0,),
    )
    config = DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=100,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        experts=experts,
    )
    model = build_model(config).eval()
    randomize(model)
    assert isinstance(model, Decoder)
    return model


@pytest.mark.parametrize("isa", ISAS)
def test_experts_in_groups_with_shared_ones(isa: str) -> None:
    model = grouped_experts()
    sequences = draw([3, 90, 130])
    found = whole(engine(model, instruction_set=isa), sequences, [70, 1, 200])
    for tokens, logits in zip(sequences, found, strict=True):
        assert_logits_equal(torch.from_numpy(logits), expected(model, tokens))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scheme", ["bfloat16", "int8", "int4"])
def test_experts_of_a_row_do_not_depend_on_its_companions(scheme: str, isa: str) -> None:
    model = ours(reference("qwen3-moe"))
    sequences = draw([5, 61, 300])
    settings = {"scheme": Scheme.named(scheme), "instruction_set": isa}
    together = whole(engine(model, threads=3, **settings), sequences, [64, 1, 1, 130, 7])
    one = engine(model, threads=1, **settings)
    for tokens, logits in zip(sequences, together, strict=True):
        assert np.array_equal(whole(one, [tokens], [1])[0], logits)


def test_a_change_of_the_balancing_bias_packs_anew() -> None:
    model = grouped_experts()
    first = engine_of(model)
    model.model.layers[1].mlp.gate.e_score_correction_bias.add_(1.0)
    assert engine_of(model) is not first


def test_experts_are_read_from_a_folder_without_modules(tmp_path: Path) -> None:
    model = ours(reference("qwen3-moe"))
    deepseek.save(model, tmp_path / "moe")
    found = load_engine(tmp_path / "moe")
    assert found is not None
    tokens = draw([40])
    assert np.array_equal(whole(found, tokens, [40])[0], whole(engine(model), tokens, [40])[0])


def test_it_is_packed_once_and_anew_when_weights_change() -> None:
    model = ours(reference("llama"))
    first = engine_of(model)
    assert engine_of(model) is first
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    second = engine_of(model)
    assert second is not first and second is not None
    tokens = draw([20])
    assert_logits_equal(
        torch.from_numpy(whole(second, tokens, [20])[0]), expected(model, tokens[0])
    )


def test_a_model_with_an_engine_can_be_copied_and_pickled() -> None:
    model = ours(reference("llama"))
    assert engine_of(model) is not None
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert generate(same, [1, 2, 3], max_tokens=4) is not None
        assert engine_of(same) is not engine_of(model)


def test_training_goes_on_after_generation() -> None:
    model = ours(reference("qwen2")).train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    generate(model, [1, 2, 3], max_tokens=3)
    tokens = torch.randint(0, VOCABULARY, (1, 8))
    loss = model(tokens, labels=tokens).loss
    assert loss is not None
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_is_not_known_runs_through_the_modules_and_says_so() -> None:
    model = ours(reference("llama"))
    model.planner = EveryBlock()
    assert "EveryBlock" in str(why_no_engine(model))
    model.planner = WindowPlanner(4, (0,))
    assert "windows" in str(why_no_engine(model))
    model.planner = None
    model.model.layers[0].register_forward_hook(lambda *_: None)
    assert "hooks" in str(why_no_engine(model))
    assert "latent" in str(why_no_engine(ours(reference("deepseek-v3"))))
    assert "float16" in str(why_no_engine(ours(reference("llama")).half()))


def test_a_scheme_is_never_dropped_in_silence() -> None:
    model = ours(reference("llama"))
    vars(model)["scheme"] = Scheme.named("int8")
    assert generate(model, [1, 2, 3], max_tokens=4) is not None
    model.impl = "reference"
    with pytest.raises(ConfigError, match="int8"):
        generate(model, [1, 2, 3], max_tokens=4)


def test_a_step_that_does_not_fit_is_refused_before_it_runs() -> None:
    made = engine(ours(reference("llama")))
    pages, table = made.new_pages(2), np.array([[0, 1]])
    good = {"tokens": [1, 2], "positions": [0, 1], "rows": [0, 0], "selected": [1]}
    for wrong in (
        {"tokens": [1, VOCABULARY]},
        {"tokens": [1, -1]},
        {"positions": [0, 2]},
        {"positions": [127, 128]},
        {"positions": [-1, 0]},
        {"rows": [0, 1]},
        {"rows": [-1, -1]},
        {"selected": [2]},
        {"tokens": []},
    ):
        with pytest.raises(ConfigError):
            made.step(pages, page_table=table, **(good | wrong))
    with pytest.raises(ConfigError):
        made.step(pages, page_table=np.array([[0, 2]]), **(good | {"positions": [64, 65]}))
    assert made.step(pages, page_table=table, **good).shape == (1, VOCABULARY)
