"""Gates in the engine: equal to the modules, closed heads not computed, rows on their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import deepseek
from deepseek.face import load_engine
from deepseek.generate import generate
from deepseek.generate.cost import cost_of_step
from deepseek.generate.flat import decoder_program
from deepseek.generate.modules import engine_of, why_no_engine
from deepseek.models import GateConfig, GateWatch, RoutedPlanner, add_gates
from deepseek.ops.cpu import why_missing
from deepseek.ops.routing import Routing
from deepseek.ops.scheme import Scheme
from tests.generate.test_flat import draw, engine, expected, whole
from tests.models.zoo import ours, reference
from tests.ops.native import ISAS
from tests.tolerances import assert_logits_equal

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))

CASES = ["llama", "llama-mqa-biased", "qwen2-window", "qwen3-tied", "qwen3-moe-mixed"]


def gated(case: str, threshold: float) -> deepseek.models.Decoder:
    """Return a model whose gates differ from token to token."""
    model = add_gates(ours(reference(case)), GateConfig(threshold=threshold))
    torch.manual_seed(5)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.head_gate.weight.normal_(0, 0.3)
            layer.self_attn.head_gate.bias.normal_(0, 0.5)
    return model


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threshold", [0.0, 0.9])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_counts_equal_the_modules(case: str, threshold: float, isa: str) -> None:
    model = gated(case, threshold)
    sequences = draw([3, 90, 260])
    made = engine(model, instruction_set=isa)
    found = whole(made, sequences, [70, 1, 200])
    with GateWatch(model) as watch:
        for tokens, logits in zip(sequences, found, strict=True):
            assert_logits_equal(torch.from_numpy(logits), expected(model, tokens))
    assert made.head_count == watch.count
    assert made.head_count.total == 353 * 4 * 3
    assert (made.head_count.share > 0.2) == (threshold > 0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "scheme", ["float32", "bfloat16", "int8", "int8-row", "int4-g64", "int8-kv8"]
)
def test_a_row_does_not_depend_on_its_companions(scheme: str, isa: str) -> None:
    """Bit by bit, as without gates; the gates' own weights are float32 in every scheme."""
    model = gated("qwen3", 0.9)
    sequences = draw([5, 61, 300])
    settings = {"scheme": Scheme.named(scheme), "instruction_set": isa}
    one, three = engine(model, threads=1, **settings), engine(model, threads=3, **settings)
    together = whole(three, sequences, [64, 1, 1, 130, 7])
    for tokens, logits in zip(sequences, together, strict=True):
        for splits in ([200], [1]):
            assert np.array_equal(whole(one, [tokens], splits)[0], logits)
    assert 0.2 < three.head_count.share < 0.9


def test_gates_keep_their_weights_exact_in_every_scheme() -> None:
    model = gated("llama", 0.9)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    costs = cost_of_step(decoder_program(model.config), shapes, Scheme.named("int4"))
    (gates,) = [cost for cost in costs if cost.name == "gates"]
    assert (gates.count, gates.shape, gates.storage) == (3, (4, 48), "float32")


@pytest.mark.parametrize("isa", ISAS)
def test_gates_that_are_1_leave_the_bits(isa: str) -> None:
    plain = ours(reference("qwen3"))
    tokens = draw([150])
    before = whole(engine(plain, instruction_set=isa), tokens, [100, 1])
    after = whole(
        engine(add_gates(plain, GateConfig(threshold=0.5)), instruction_set=isa), tokens, [100, 1]
    )
    assert np.array_equal(before[0], after[0])


@pytest.mark.parametrize("routing", [None, Routing(refresh=16, recent=1, least=128, most=128)])
@pytest.mark.parametrize("splits", [[150], [1]])
def test_values_of_closed_heads_are_not_read(splits: list[int], routing: Routing | None) -> None:
    """Those that are no numbers would show wherever they are multiplied, by zero too."""
    model = gated("llama", 0.5)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.head_gate.weight.zero_()
            layer.self_attn.head_gate.bias.copy_(torch.tensor([-9.0, -9.0, 0.0, 0.0]))
            layer.self_attn.v_proj.weight[: model.config.head_dim] = torch.inf
    found = whole(engine(model, routing=routing), draw([150]), splits)[0]
    assert bool(np.isfinite(found).all())
    with torch.no_grad():
        model.model.layers[1].self_attn.head_gate.bias[1] = 0.0
    assert not np.isfinite(whole(engine(model, routing=routing), draw([150]), splits)[0]).any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("means", [False, True])
def test_routed_attention_goes_with_gates(isa: str, means: bool) -> None:
    """A whole prompt, chunks, and single tokens; closed heads still take part in the choice."""
    routing = Routing(refresh=16, first=1, recent=2, least=256, most=256, means=means)
    model = gated("llama", 0.9)
    model.planner = RoutedPlanner(model.config, routing)
    tokens = draw([600])[0]
    made = engine(model, instruction_set=isa, routing=routing)
    found = whole(made, [tokens], [512, 1, 30])[0]
    assert_logits_equal(torch.from_numpy(found), expected(model, tokens))
    assert np.array_equal(whole(made, [tokens], [200, 1])[0], found)
    assert 0.2 < made.head_count.share < 0.9


def test_generation_counts_the_heads_it_leaves_out() -> None:
    model = gated("llama", 0.9)
    made = engine_of(model)
    assert made is not None
    before = made.head_count
    answer = generate(model, [1, 2, 3], max_tokens=4, ignore_eos=True)
    count = engine_of(model).head_count.since(before)
    assert count.total == (3 + 3) * 4 * 3 and 0 < count.closed < count.total
    with GateWatch(model) as watch:
        assert "hooks" in str(why_no_engine(model))
        again = generate(model, [1, 2, 3], max_tokens=4, ignore_eos=True)
    assert again.token_ids == answer.token_ids
    assert watch.count == count
    assert engine_of(ours(reference("llama"))).head_count.total == 0


def test_gates_are_read_from_a_folder_without_modules(tmp_path: Path) -> None:
    model = gated("qwen3-tied", 0.9)
    deepseek.save(model, tmp_path / "gated")
    found = load_engine(tmp_path / "gated")
    assert found is not None
    tokens = draw([40])
    assert np.array_equal(whole(found, tokens, [40])[0], whole(engine(model), tokens, [40])[0])


def test_a_threshold_packs_anew() -> None:
    model = gated("llama", 0.9)
    first = engine_of(model)
    add_gates(model, GateConfig(threshold=0.0))
    second = engine_of(model)
    assert second is not first
    whole(second, draw([20]), [20])
    assert second.head_count.closed == 0
