"""Weights that keep their own grid against the specification: odd shapes, all instruction sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard

from deepseek.errors import ConfigError, ShapeError
from deepseek.ops.grid import Grid, form_of, halves_of, why_not_exact
from deepseek.ops.linear.reference import grid_linear_reference
from deepseek.ops.quantized import QuantizedWeight, short_scale
from deepseek.ops.quantized import rotate as rotate_tensor
from deepseek.ops.rotation import rotate
from deepseek.ops.scheme import Form, grid_form
from tests.ops.native import ISAS, NEEDS_KERNELS, Native

PLAIN = [(4, 32), (4, 64), (4, 128), (4, 192), (8, 32), (8, 64), (8, 128), (8, None), (4, None)]
"""Bits and group; None for one scale a row."""
KINDS = [*((*kind, False) for kind in PLAIN), (8, 64, True), (8, 128, True), (8, 192, True)]
"""And whether it is rotated."""


def draw(
    bits: int,
    rows: int,
    width: int,
    group: int,
    seed: int,
    *,
    rotated: bool = False,
    input_scale: float | None = None,
) -> QuantizedWeight:
    """Return a weight of random codes; a scale may be 0, a zero point at either end."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, width), generator=rng, dtype=torch.uint8)
    scale = short_scale(torch.rand((rows, width // group), generator=rng) ** 4)
    scale[0, 0] = 0
    zero = torch.full(scale.shape, 128, dtype=torch.uint8)
    if bits == 4:
        zero = torch.randint(0, 16, scale.shape, generator=rng, dtype=torch.uint8)
    return QuantizedWeight(bits, codes, scale, zero, rotated, input_scale)


def product(isa: str, inputs: np.ndarray, weight: QuantizedWeight, bias: np.ndarray) -> np.ndarray:
    instructions = [
        {"op": "embed", "output": 0, "weights": [0]},
        {"op": "linear", "input": 0, "output": -1, "weights": [1], "selected": 1},
    ]
    rows, columns = len(inputs), len(weight.codes)
    native = Native(isa, [inputs.shape[1]], instructions, vocab=max(rows, columns))
    native.weight(inputs)
    add_codes(native, weight, bias)
    native.program.start()
    found = native.run(list(range(rows)))
    assert np.isnan(found[:, columns:]).all(), "wrote past its columns"
    return found[:, :columns]


def add_codes(native: Native, weight: QuantizedWeight, bias: np.ndarray | None = None) -> None:
    form = form_of(weight.grid())
    assert form is not None
    scale, least = (part.view(np.uint16) for part in halves_of(weight.grid(), form))
    native.program.add_codes(
        form.storage,
        form.group or 0,
        form.is_rotated,
        weight.codes.numpy(),
        scale,
        least,
        bias,
        input_scale=weight.input_scale or 0.0,
    )


@NEEDS_KERNELS
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("bits", "group", "rotated"), KINDS)
@settings(max_examples=8, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 3, 5, 8, 16, 17, 33, 70]),
    columns=st.integers(1, 150),
    groups=st.integers(1, 4),
    odd=st.integers(1, 200),
    seed=st.integers(0, 2**16),
    input_scale=st.sampled_from([None, 0.005, 0.02, 0.1]),
)
def test_products_are_the_specification(
    isa: str,
    bits: int,
    group: int | None,
    rotated: bool,
    rows: int,
    columns: int,
    groups: int,
    odd: int,
    seed: int,
    input_scale: float | None,
) -> None:
    """With a static scale of inputs too, of which 0.005 cuts off what is beyond 0.635."""
    width = odd if group is None else group * groups
    weight = draw(
        bits, columns, width, group or width, seed, rotated=rotated, input_scale=input_scale
    )
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((rows, width)).astype(np.float32)
    bias = rng.standard_normal(columns).astype(np.float32)
    found = product(isa, inputs, weight, bias)
    expected = grid_linear_reference(torch.from_numpy(inputs), weight, torch.from_numpy(bias))
    # a level of an input in the middle between two may be rounded either way
    size = (input_scale or np.abs(inputs).max() / 127) * weight.values().abs().amax(1).numpy()
    off = np.abs(found - expected.numpy())
    assert (off <= 1e-4 * (1 + np.abs(expected.numpy())) + 1.01 * size).all()
    assert np.median(off) <= 1e-4 * (1 + np.abs(expected.numpy()).max())


@NEEDS_KERNELS
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("bits", "group", "rotated"), KINDS)
def test_the_numbers_are_those_of_the_grid(
    isa: str, bits: int, group: int | None, rotated: bool
) -> None:
    """Inputs of one channel each, which int8 holds exactly, read the weight back to the bit of a
    float32 sum."""
    width = 100 if group is None else 2 * group
    weight = draw(bits, 50, width, group or width, 5, rotated=rotated)
    inputs = np.eye(width, dtype=np.float32) * 127
    inputs = rotate(inputs) if rotated else inputs
    found = product(isa, inputs, weight, np.zeros(50, np.float32))
    values = weight.numbers().numpy().T
    np.testing.assert_allclose(found / 127, values, rtol=1e-6, atol=1e-6 * np.abs(values).max())


@NEEDS_KERNELS
@pytest.mark.parametrize(("bits", "group", "rotated"), KINDS)
def test_an_embedding_is_read_back_to_the_bit(bits: int, group: int | None, rotated: bool) -> None:
    width = 100 if group is None else 2 * group
    weight = draw(bits, 70, width, group or width, 7, rotated=rotated)
    instructions = [
        {"op": "embed", "output": 0, "weights": [0]},
        {"op": "linear", "input": 0, "output": -1, "weights": [1], "selected": 1},
    ]
    native = Native(ISAS[-1], [width], instructions, vocab=max(70, width))
    add_codes(native, weight)
    native.weight(np.eye(width, dtype=np.float32))
    native.program.start()
    found = native.run(list(range(70)))[:, :width]
    assert np.array_equal(found, weight.values().numpy())


@NEEDS_KERNELS
def test_what_does_not_fit_is_refused() -> None:
    native = Native(ISAS[-1], [64], [], vocab=8)
    codes, halves = np.zeros((8, 64), np.uint8), np.zeros((8, 2), np.uint16)
    for settings_ in (("int8", 64), ("int4", 31)):
        with pytest.raises(ValueError, match="must be"):
            native.program.add_codes(*settings_, False, codes, halves, halves, None)
    with pytest.raises(ValueError, match="int8 or int4"):
        native.program.add_codes("float32", 32, False, codes, halves, halves, None)
    for kind, group, width in (("int4", 64, 64), ("int8", 32, 64), ("int8", 64, 96)):
        with pytest.raises(ValueError, match="rotated"):
            given = np.zeros((8, width), np.uint8)
            native.program.add_codes(kind, group, True, given, halves, halves, None)


@pytest.mark.parametrize(
    ("bits", "group", "width", "form"),
    [
        (4, 32, 64, Form("int4", 32)),
        (8, 32, 64, Form("int8", 32)),
        (8, 576, 576, Form("int8", 64)),
        (8, 100, 100, Form("int8", 64)),
        (4, 96, 192, Form("int4", 32)),
        (4, 256, 512, Form("int4", 64)),
        (4, 16, 64, None),
        (4, 48, 96, None),
    ],
)
def test_forms_of_grids(bits: int, group: int, width: int, form: Form | None) -> None:
    assert grid_form(bits, group, width) == form


@pytest.mark.parametrize("rotated", [False, True])
def test_one_scale_for_weights_and_inputs_is_held_by_rows(rotated: bool) -> None:
    form = grid_form(8, 576, 576, is_rotated=rotated, input_scale=0.5)
    assert form is not None
    assert form == Form("int8", None, rotated, 0.5)
    assert form.text == f"int8 by rows{', rotated' * rotated}, inputs static"
    grouped = grid_form(8, 64, 576, is_rotated=rotated, input_scale=0.5)
    assert grouped == Form("int8", 64, rotated, 0.5)
    assert grid_form(8, 100, 100, input_scale=0.5) == Form("int8", 64, False, 0.5)


@pytest.mark.parametrize(
    ("bits", "group", "width", "form"),
    [
        (8, 64, 128, Form("int8", 64, True)),
        (8, 192, 384, Form("int8", 192, True)),
        (8, 576, 576, Form("int8", 64, True)),
        (8, 32, 64, None),
        (8, 96, 192, None),
        (8, 100, 100, None),
        (4, 64, 64, None),
    ],
)
def test_forms_of_rotated_grids(bits: int, group: int, width: int, form: Form | None) -> None:
    assert grid_form(bits, group, width, is_rotated=True) == form


def test_both_rotations_are_one() -> None:
    values = torch.randn(3, 192, generator=torch.Generator().manual_seed(0))
    turned = rotate(values.numpy())
    assert np.array_equal(turned, rotate_tensor(values).numpy())
    blocks = values.double().unflatten(-1, (-1, 64)) @ torch.from_numpy(hadamard(64) / 8)
    np.testing.assert_allclose(turned, blocks.flatten(-2).numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(rotate(turned), values.numpy(), rtol=0, atol=1e-6)
    weight = draw(8, 5, 128, 64, 3, rotated=True)
    assert np.array_equal(weight.grid().values(), weight.values().numpy())
    assert torch.equal(QuantizedWeight.of_grid(weight.grid()).values(), weight.values())


@pytest.mark.parametrize(("bits", "width", "groups"), [(4, 64, 1), (8, 64, 2), (8, 96, 1)])
def test_what_cannot_be_rotated_is_refused(bits: int, width: int, groups: int) -> None:
    with pytest.raises(ShapeError, match="multiple of 64"):
        draw(bits, 3, width, width // groups, 0, rotated=True)


def test_the_reference_refuses_groups_that_nothing_holds() -> None:
    with pytest.raises(ShapeError, match="group"):
        grid_linear_reference(torch.zeros(1, 64), draw(4, 3, 64, 16, 0))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**16), size=st.floats(1e-3, 100))
def test_short_scales_are_held_exactly(seed: int, size: float) -> None:
    weight = draw(4, 4, 64, 32, seed)
    scale = short_scale(weight.scale * size)
    kept = scale.abs() * (weight.zero > 0) >= 2**-14  # above float16's smallest normal number
    kept &= scale * 15 < 2**15
    scale = torch.where(kept, scale, torch.zeros_like(scale))
    assert why_not_exact(4, scale.numpy(), weight.zero.numpy()) is None


@pytest.mark.parametrize(
    ("bits", "scale", "zero", "word"),
    [(4, 0.1, 8, "scales"), (8, 0.5, 127, "128"), (4, 1.2001953125, 13, "product")],
)
def test_grids_that_float16_does_not_hold(bits: int, scale: float, zero: int, word: str) -> None:
    scales, zeros = np.full((1, 1), scale, np.float32), np.full((1, 1), zero, np.uint8)
    reason = why_not_exact(bits, scales, zeros)
    assert reason is not None
    assert word in reason
    with pytest.raises(ConfigError, match=word):
        halves_of(Grid(bits, np.zeros((1, 32), np.uint8), scales, zeros), Form("int4", 32))
