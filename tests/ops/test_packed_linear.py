"""The packed products against their specification: every storage, odd shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepseek.ops.choice import Case
from deepseek.ops.linear.reference import linear_reference, round_inputs, round_int8
from deepseek.ops.quantized import rotate
from deepseek.ops.scheme import scaled_together
from deepseek.testing import problems
from tests.ops.native import BEST, ISAS, NEEDS_KERNELS, Native

pytestmark = NEEDS_KERNELS

STORAGES = [
    ("float32", 32),
    ("bfloat16", 32),
    ("int8", 32),
    ("int8", 192),
    ("int8", None),
    ("int4", 32),
    ("int4", 64),
    ("int4", 128),
]


def product(
    isa: str,
    inputs: np.ndarray,
    weight: np.ndarray,
    storage: str,
    group: int | None,
    *,
    bias: np.ndarray | None = None,
    threads: int = 2,
    norm: np.ndarray | None = None,
) -> np.ndarray:
    """Return the product of each input row with a weight."""
    instructions = [
        {"op": "embed", "output": 0, "weights": [0]},
        {
            "op": "linear",
            "input": 0,
            "output": -1,
            "weights": [1],
            "selected": 1,
            "norm": -1 if norm is None else 0,
        },
    ]
    # the vocabulary bounds both the tokens and the width of the logits
    rows, columns = len(inputs), len(weight)
    native = Native(isa, [inputs.shape[1]], instructions, vocab=max(rows, columns), threads=threads)
    native.weight(inputs)
    native.weight(weight, storage, group=group, bias=bias)
    if norm is not None:
        native.program.add_vector(norm)
    native.program.start()
    found = native.run(list(range(rows)))
    if columns < found.shape[1]:
        assert np.isnan(found[:, columns:]).all(), "wrote past its columns"
    return found[:, :columns]


def draw(rows: int, columns: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs with outliers and weights of uneven rows."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((rows, width)).astype(np.float32)
    inputs[:, rng.integers(width)] *= 20
    weight = rng.standard_normal((columns, width)) * rng.uniform(0.1, 3, (columns, 1))
    return inputs, weight.astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("storage", "group"), STORAGES)
@settings(max_examples=12, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 97]),
    columns=st.integers(1, 150),
    width=st.integers(1, 200) | st.sampled_from([32, 64, 192, 384]),
    seed=st.integers(0, 2**16),
)
@example(rows=64, columns=141, width=97, seed=3771)  # a scale between two numbers of float16
@example(rows=33, columns=1, width=16, seed=90)  # an input in the middle of two levels, four times
def test_products_are_the_specification(
    isa: str,
    storage: str,
    group: int | None,
    rows: int,
    columns: int,
    width: int,
    seed: int,
) -> None:
    case = Case(operation="linear", storage=storage, group=group, rows=rows)
    problem = problems.draw(case, (rows, columns, width), seed)
    inputs, weight = problem.inputs.contiguous(), problem.weight.contiguous()
    bias = None if problem.bias is None else problem.bias.numpy()
    found = product(isa, inputs.numpy(), weight.numpy(), storage, group, bias=bias)
    expected = linear_reference(inputs, weight, storage, group=group, bias=problem.bias)
    off = (torch.from_numpy(found.copy()) - expected).abs()
    assert bool((off <= problems.error_bound(problem, case)).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("storage", "group"), STORAGES)
def test_integer_grids_are_met_exactly(isa: str, storage: str, group: int | None) -> None:
    """Weights and inputs that lie on the grid give the product itself: nothing is lost twice."""
    rng = np.random.default_rng(3)
    inputs = rng.integers(-127, 128, (5, 192)).astype(np.float32)
    inputs[:, ::32] = 127
    weight = rng.integers(0, 16, (50, 192)).astype(np.float32)
    weight[:, ::32], weight[:, 1::32] = 0, 15
    if storage == "int8":
        group = scaled_together(storage, group) or inputs.shape[1]
        inputs = rotate(round_inputs(torch.from_numpy(inputs), group)).numpy()
        weight = rotate(round_int8(torch.from_numpy(weight * 127 / 15), group)).numpy()
    exact = inputs.astype(np.float64) @ weight.astype(np.float64).T
    found = product(isa, inputs, weight, storage, group)
    np.testing.assert_allclose(found, exact, rtol=3e-6, atol=1e-6 * np.abs(exact).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("storage", "group"), STORAGES)
@pytest.mark.parametrize("width", [130, 192])
def test_a_row_is_the_same_in_every_batch_and_on_every_thread(
    isa: str, storage: str, group: int, width: int
) -> None:
    inputs, weight = draw(69, 100, width, 1)
    whole = product(isa, inputs, weight, storage, group, threads=3)
    for row in (0, 5, 36, 68):
        alone = product(isa, inputs[row : row + 1], weight, storage, group, threads=1)
        assert np.array_equal(alone[0], whole[row])


@pytest.mark.parametrize("isa", ISAS)
def test_weights_may_be_strided_and_unaligned(isa: str) -> None:
    inputs, weight = draw(3, 70, 90, 2)
    store = np.zeros((70, 101), np.float32)
    view = store[:, 7:97]
    view[:] = weight
    for storage, group in STORAGES:
        expected = product(isa, inputs, weight, storage, group)
        assert np.array_equal(product(isa, inputs, view, storage, group), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("storage", ["float32", "int8", "int4"])
def test_constant_and_zero_rows(isa: str, storage: str) -> None:
    inputs = np.zeros((3, 64), np.float32)
    inputs[1] = 1
    weight = np.zeros((20, 64), np.float32)
    weight[3], weight[4] = 0.5, -2
    found = product(isa, inputs, weight, storage, 32)
    expected = inputs @ weight.T
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [16, 40, 100])
def test_the_norm_of_the_inputs(isa: str, width: int) -> None:
    inputs, weight = draw(4, 30, width, 5)
    norm = np.random.default_rng(0).uniform(0.5, 2, width).astype(np.float32)
    found = product(isa, inputs, weight, "float32", 32, norm=norm)
    normed = inputs / np.sqrt((inputs**2).mean(1, keepdims=True) + 1e-5) * norm
    np.testing.assert_allclose(found, normed @ weight.T, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("width", [30, 48, 100])
def test_swiglu_and_residual(isa: str, rows: int, width: int) -> None:
    """states + down(silu(gate(states)) * up(states)), read back through an identity."""
    hidden = 36
    rng = np.random.default_rng(rows + width)
    table = rng.standard_normal((rows, hidden)).astype(np.float32)
    gate, up = (rng.standard_normal((width, hidden)).astype(np.float32) for _ in range(2))
    down = (rng.standard_normal((hidden, width)) * 0.1).astype(np.float32)
    instructions = [
        {"op": "embed", "output": 0, "weights": [0]},
        {"op": "swiglu", "input": 0, "output": 1, "weights": [1, 2]},
        {"op": "linear", "input": 1, "output": 0, "weights": [3], "adds": 1},
        {"op": "linear", "input": 0, "output": -1, "weights": [4], "selected": 1},
    ]
    native = Native(isa, [hidden, width], instructions, vocab=max(rows, hidden))
    for values in (table, gate, up, down, np.eye(hidden, dtype=np.float32)):
        native.weight(values)
    native.program.start()
    found = native.run(list(range(rows)))[:, :hidden]
    g = table @ gate.T
    expected = table + (g / (1 + np.exp(-g)) * (table @ up.T)) @ down.T
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("rows", [32, 67, 140])
@pytest.mark.parametrize("width", [16, 48, 124])
def test_swiglu_of_many_rows(isa: str, kind: str, rows: int, width: int) -> None:
    """Blocks of rows, panels of every width: a row is what it is alone, and near the reference."""
    hidden = 128
    rng = np.random.default_rng(rows + width)
    table = rng.standard_normal((rows, hidden)).astype(np.float32)
    gate, up = (rng.standard_normal((width, hidden)).astype(np.float32) for _ in range(2))
    instructions = [
        {"op": "embed", "output": 0, "weights": [0]},
        {"op": "swiglu", "input": 0, "output": 1, "weights": [1, 2]},
        {"op": "linear", "input": 1, "output": -1, "weights": [3], "selected": 1},
    ]
    native = Native(isa, [hidden, width], instructions, vocab=max(rows, width))
    native.weight(table)
    group = None if kind == "int8" else 32
    native.weight(gate, kind, group=group)
    native.weight(up, kind, group=group)
    native.weight(np.eye(width, dtype=np.float32))
    native.program.start()
    found = native.run(list(range(rows)))[:, :width]
    g = table @ gate.T
    expected = g / (1 + np.exp(-g)) * (table @ up.T)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < (0.02 if kind == "bfloat16" else 0.05)
    for row in {0, 31, rows // 2, rows - 1}:
        alone = native.run([row])[:, :width]
        if kind == "int8":
            assert np.array_equal(alone[0], found[row])
        else:
            np.testing.assert_allclose(alone[0], found[row], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_an_embedding_is_read_back_as_it_was_stored(kind: str) -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((70, 96)).astype(np.float32)
    instructions = [
        {"op": "embed", "output": 0, "weights": [0]},
        {"op": "linear", "input": 0, "output": -1, "weights": [1], "selected": 1},
    ]
    native = Native(BEST, [96], instructions, vocab=96)
    native.weight(table, kind)
    native.weight(np.eye(96, dtype=np.float32))
    native.program.start()
    found = native.run(list(range(70)))
    bound = {"bfloat16": 0.01, "int8": 0.06, "int4": 0.35}[kind]
    np.testing.assert_allclose(found, table, rtol=0, atol=bound)
    assert np.abs(found - table).max() > 0
