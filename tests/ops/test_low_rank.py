"""Adapters beside single products: what they add, to which rows, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.native import BEST, ISAS, NEEDS_KERNELS, PAGE, Native

pytestmark = NEEDS_KERNELS

KINDS = ["float32", "bfloat16", "int8", "int4"]
VOCAB, WIDTH = 140, 72
NORM_EPS = 1e-5
TOKENS = 20
NONE = -1

Matrix = tuple[int, np.ndarray, np.ndarray, float]


class Product:
    """out = linear or swiglu of norm(table[token]); a head of ones and zeros makes it the logits.

    Weight 0 is the table, weight 1 the head, those of the product follow.
    """

    def __init__(
        self,
        op: str,
        sizes: list[int],
        isa: str = BEST,
        *,
        kind: str = "float32",
        threads: int = 2,
        bias: bool = False,
    ) -> None:
        draw = np.random.default_rng(3)
        self.sizes, self.op = sizes, op
        self.width = sizes[0] if op == "swiglu" else sum(sizes)
        weights = list(range(2, 2 + len(sizes)))
        instructions: list[dict[str, Any]] = [
            {"op": "embed", "output": 0, "weights": [0]},
            {"op": op, "input": 0, "output": 1, "weights": weights, "norm": 0},
            {"op": "linear", "input": 1, "output": -1, "weights": [1], "selected": 1},
        ]
        self.native = Native(isa, [WIDTH, self.width], instructions, vocab=VOCAB, threads=threads)
        self.table = draw.normal(size=(VOCAB, WIDTH)).astype(np.float32)
        self.norm = draw.normal(1, 0.3, WIDTH).astype(np.float32)
        head = np.zeros((VOCAB, self.width), np.float32)
        np.fill_diagonal(head, 1)
        self.native.weight(self.table)
        self.native.weight(head)
        for n in sizes:
            values = draw.normal(size=(n, WIDTH)).astype(np.float32) / 8
            offset = draw.normal(size=n).astype(np.float32) if bias else None
            self.native.weight(values, kind, bias=offset)
        self.program = self.native.program
        self.program.add_vector(self.norm)
        self.program.start()

    def matrices(self, seed: int, ranks: dict[int, int]) -> list[Matrix]:
        """Return random matrices of the given rank beside the weights at some places."""
        draw = np.random.default_rng(seed)
        found = []
        for place, rank in ranks.items():
            down = draw.normal(size=(rank, WIDTH)).astype(np.float32)
            up = draw.normal(size=(self.sizes[place], rank)).astype(np.float32)
            found.append((2 + place, down, up, 0.5 / (place + 1) / rank))
        return found

    def run(self, tokens: list[int], adapters: list[int] | None = None) -> np.ndarray:
        """Return the products [tokens, width]."""
        count = len(tokens)
        out = np.full((count, self.native.vocab), np.nan, np.float32)
        arrays = [np.array(each, np.int32) for each in (tokens, [0] * count, range(count))]
        table, every = np.zeros((count, 1), np.int32), np.arange(count, dtype=np.int32)
        numbers = None if adapters is None else np.array(adapters, np.int32)
        self.program.run(self.native.pages("float32", 1), *arrays, table, every, out, numbers)
        return out[:, : self.width]

    def gain(self, tokens: list[int], matrices: list[Matrix]) -> np.ndarray:
        """Return scale * up (down x) of all weights, side by side, in float64."""
        x = self.table[tokens].astype(np.float64)
        x = x / np.sqrt((x**2).mean(1, keepdims=True) + NORM_EPS) * self.norm
        gains = [np.zeros((len(tokens), n)) for n in self.sizes]
        for weight, down, up, scale in matrices:
            gains[weight - 2] = scale * (x @ down.T.astype(float)) @ up.T.astype(float)
        return np.concatenate(gains, 1)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def some_tokens(count: int) -> list[int]:
    return np.random.default_rng(count).integers(0, VOCAB, count).tolist()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3, 70])
def test_products_side_by_side_gain_theirs_in_every_storage(
    count: int, kind: str, isa: str
) -> None:
    """The inputs of an adapter are not quantized, whatever those of its weight are."""
    product = Product("linear", [64, 20, 50], isa, kind=kind, bias=True)
    matrices = product.matrices(1, {0: 5, 2: 16})
    number = product.program.add_adapter(matrices)
    tokens = some_tokens(count)
    plain = product.run(tokens)
    gained = product.run(tokens, [number] * count) - plain
    np.testing.assert_allclose(gained, product.gain(tokens, matrices), rtol=1e-5, atol=3e-6)
    assert np.array_equal(product.run(tokens, [number] * count)[:, 64:84], plain[:, 64:84])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("places", [{0: 4, 1: 9}, {0: 3}, {1: 1}])
@pytest.mark.parametrize("count", [1, 40])
def test_gate_and_up_gain_theirs_before_they_are_joined(
    count: int, places: dict[int, int], isa: str
) -> None:
    product = Product("swiglu", [50, 50], isa)
    parts = Product("linear", [50, 50], isa)
    matrices = product.matrices(2, places)
    number = product.program.add_adapter(matrices)
    tokens = some_tokens(count)
    sums = parts.run(tokens).astype(float) + product.gain(tokens, matrices)
    expected = silu(sums[:, :50]) * sums[:, 50:]
    found = product.run(tokens, [number] * count)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rank", [1, 4, 7, 64, 256])
def test_every_rank(rank: int, isa: str) -> None:
    product = Product("linear", [33], isa)
    matrices = product.matrices(rank, {0: rank})
    number = product.program.add_adapter(matrices)
    tokens = some_tokens(9)
    gained = product.run(tokens, [number] * 9) - product.run(tokens)
    np.testing.assert_allclose(gained, product.gain(tokens, matrices), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", ["linear", "swiglu"])
def test_a_step_of_as_many_tokens_as_there_is_room_for(op: str, isa: str) -> None:
    """The last columns of the last row are the end of the memory."""
    product = Product(op, [33] if op == "linear" else [33, 33], isa)
    number = product.program.add_adapter(product.matrices(1, {0: 3}))
    tokens = [place % TOKENS for place in range(product.program.max_tokens)]
    found = product.run(tokens, [number] * len(tokens))
    assert np.array_equal(found[-TOKENS:], product.run(tokens[-TOKENS:], [number] * TOKENS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", ISAS)
def test_rows_of_a_mixed_step_are_as_alone(isa: str, kind: str) -> None:
    """Bit by bit, on any number of threads; rows without an adapter as in a step without any."""
    made = {
        threads: Product("linear", [64, 20], isa, kind=kind, threads=threads)
        for threads in (1, 2, 3)
    }
    numbers = [NONE]
    for product in made.values():
        adapters = [product.matrices(5, {0: 3, 1: 8}), product.matrices(6, {1: 21})]
        numbers = [NONE, *map(product.program.add_adapter, adapters)]
    alone = {
        (token, number): made[1].run([token], [number])[0]
        for token in range(TOKENS)
        for number in numbers
    }

    @settings(max_examples=25, deadline=None)
    @given(
        st.lists(
            st.tuples(st.integers(0, TOKENS - 1), st.sampled_from(numbers)),
            min_size=1,
            max_size=60,
        ),
        st.sampled_from([1, 2, 3]),
    )
    def holds(rows: list[tuple[int, int]], threads: int) -> None:
        tokens, adapters = map(list, zip(*rows, strict=True))
        found = made[threads].run(tokens, adapters)
        plain = made[threads].run(tokens)
        for place, row in enumerate(rows):
            assert np.array_equal(found[place], alone[row])
            if row[1] == NONE:
                assert np.array_equal(found[place], plain[place])

    holds()


def test_a_step_of_tokens_without_an_adapter_is_one_without_adapters() -> None:
    product = Product("linear", [64])
    product.program.add_adapter(product.matrices(1, {0: 2}))
    tokens = some_tokens(20)
    assert np.array_equal(product.run(tokens, [NONE] * 20), product.run(tokens))


def test_rows_that_are_picked_have_the_adapters_of_their_tokens() -> None:
    """In a product of picked rows: some tokens, one twice, out of order."""
    draw = np.random.default_rng(0)
    instructions = [
        {"op": "embed", "output": 0, "weights": [0]},
        {"op": "linear", "input": 0, "output": 1, "weights": [2], "selected": 1},
        {"op": "linear", "input": 1, "output": -1, "weights": [1], "selected": 2},
    ]
    native = Native(BEST, [WIDTH, WIDTH], instructions, vocab=WIDTH)
    table = draw.normal(size=(WIDTH, WIDTH)).astype(np.float32)
    native.weight(table)
    native.weight(np.eye(WIDTH, dtype=np.float32))
    native.weight(np.zeros((WIDTH, WIDTH), np.float32))
    native.program.start()
    ups = [draw.normal(size=(WIDTH, 2)).astype(np.float32) for _ in range(2)]
    down = draw.normal(size=(2, WIDTH)).astype(np.float32)
    numbers = [native.program.add_adapter([(2, down, up, 1.0)]) for up in ups]
    tokens, adapters, selected = (
        [1, 2, 3, 4],
        [numbers[0], NONE, numbers[1], numbers[0]],
        [3, 1, 2, 2, 0],
    )
    out = np.full((5, WIDTH), np.nan, np.float32)
    arrays = [np.array(each, np.int32) for each in (tokens, [0] * 4, range(4))]
    places = np.array(selected, np.int32)
    native.program.run(
        native.pages("float32", 1),
        *arrays,
        np.zeros((4, 1), np.int32),
        places,
        out,
        np.array(adapters, np.int32),
    )
    for row, place in enumerate(selected):
        up = (
            np.zeros((WIDTH, 2)) if adapters[place] == NONE else ups[numbers.index(adapters[place])]
        )
        expected = up @ (down @ table[tokens[place]])
        np.testing.assert_allclose(out[row], expected, rtol=1e-4, atol=1e-4)


def test_a_product_that_adds_gains_it_too() -> None:
    instructions = [
        {"op": "embed", "output": 0, "weights": [0]},
        {"op": "linear", "input": 0, "output": 0, "weights": [2], "adds": 1},
        {"op": "linear", "input": 0, "output": -1, "weights": [1]},
    ]
    native = Native(BEST, [WIDTH], instructions, vocab=WIDTH)
    draw = np.random.default_rng(0)
    table = draw.normal(size=(WIDTH, WIDTH)).astype(np.float32)
    native.weight(table)
    native.weight(np.eye(WIDTH, dtype=np.float32))
    native.weight(np.zeros((WIDTH, WIDTH), np.float32))
    native.program.start()
    down, up = (draw.normal(size=shape).astype(np.float32) for shape in ((3, WIDTH), (WIDTH, 3)))
    number = native.program.add_adapter([(2, down, up, 0.25)])
    out = np.empty((1, WIDTH), np.float32)
    one = np.zeros(1, np.int32)
    native.program.run(
        native.pages("float32", 1),
        one,
        one,
        one,
        np.zeros((1, 1), np.int32),
        one,
        out,
        np.array([number], np.int32),
    )
    expected = table[0] + 0.25 * up @ (down @ table[0])
    np.testing.assert_allclose(out[0], expected, rtol=1e-4, atol=1e-4)


def test_numbers_come_and_go_and_are_never_given_twice() -> None:
    product = Product("linear", [64])
    first = product.program.add_adapter(product.matrices(1, {0: 2}))
    held = product.program.adapter_bytes
    assert held >= (2 * WIDTH + 64 * 2) * 4
    product.program.drop_adapter(first)
    assert product.program.adapter_bytes == 0
    second = product.program.add_adapter(product.matrices(2, {0: 300 // 2}))
    assert second != first
    with pytest.raises(ValueError, match=f"no adapter of number {first}"):
        product.run([1, 2], [second, first])
    with pytest.raises(ValueError, match="no adapter"):
        product.program.drop_adapter(first)
    with pytest.raises(ValueError, match="no adapter of number -2"):
        product.run([1], [-2])
    with pytest.raises(ValueError, match="one length"):
        product.run([1, 2], [second])


@pytest.mark.parametrize(
    ("weight", "down", "up", "message"),
    [
        (0, (2, WIDTH), (VOCAB, 2), "embedding"),
        (1, (2, 64), (VOCAB, 2), "head"),
        (2, (2, WIDTH + 1), (64, 2), "must be"),
        (2, (2, WIDTH), (63, 2), "must be"),
        (2, (2, WIDTH), (64, 3), "must be"),
        (2, (2,), (64, 2), "must be"),
        (2, (0, WIDTH), (64, 0), "rank"),
        (2, (257, WIDTH), (64, 257), "rank"),
    ],
)
def test_what_does_not_fit_is_refused(
    weight: int, down: tuple[int, ...], up: tuple[int, ...], message: str
) -> None:
    product = Product("linear", [64])
    matrices = (np.zeros(down, np.float32), np.zeros(up, np.float32))
    with pytest.raises(ValueError, match=message):
        product.program.add_adapter([(weight, *matrices, 1.0)])
    assert product.program.adapter_bytes == 0


def test_two_for_one_weight_and_weights_that_are_not_there_are_refused() -> None:
    product = Product("linear", [64])
    with pytest.raises(ValueError, match="two adapters"):
        product.program.add_adapter(product.matrices(1, {0: 2}) * 2)
    for weight in (3, -1):
        matrix = (weight, *product.matrices(1, {0: 2})[0][1:])
        with pytest.raises(IndexError):
            product.program.add_adapter([matrix])


def test_experts_take_no_adapter() -> None:
    instructions = [
        {"op": "embed", "output": 0, "weights": [0]},
        {"op": "linear", "input": 0, "output": 1, "weights": [1]},
        {
            "op": "experts",
            "input": 0,
            "routes": 1,
            "output": 0,
            "adds": 1,
            "weights": [2, 3, 4, 5, 6, 7],
            "num_active": 1,
        },
        {"op": "linear", "input": 0, "output": -1, "weights": [8]},
    ]
    native = Native(BEST, [16, 2], instructions, vocab=PAGE)
    for n in (PAGE, 2, 16, 16, 16, 16, 16, 16, PAGE):
        native.weight(np.zeros((n, 16), np.float32))
    native.program.start()
    down, up = np.zeros((1, 16), np.float32), np.zeros((16, 1), np.float32)
    for weight in range(2, 8):
        with pytest.raises(ValueError, match="routed experts"):
            native.program.add_adapter([(weight, down, up, 1.0)])
    native.program.add_adapter([(1, down, np.zeros((2, 1), np.float32), 1.0)])
