"""Sums in few bits: by the definition, with nothing lost, whoever sends when."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek.errors import ConfigError, FormatError, ShapeError
from deepseek.parallel import Exact, Sparse24, TransportConfig, World, open_transport, run_workers
from deepseek.parallel.base import BUCKET_BYTES, divide
from deepseek.parallel.compress import Values, read_back
from deepseek.parallel.overlap import EarlySum
from deepseek.parallel.payoff import wire_bytes
from deepseek.parallel.sparse import own_errors, owned
from deepseek.parallel.tree import TreeSum
from tests.parallel.summing import CONFIGS, STEPS, gradients

SCRIPT = Path(__file__).with_name("summing.py")
MATRICES = (2, 0)
"""In the order in which they are sent."""


def test_matrices_go_in_reverse_and_all_else_last() -> None:
    tensors = [torch.zeros(size) for size in ((4, 4), (4,), (3, 3), (1,), (2, 2, 2))]
    assert divide(tensors) == [[4, 2, 0], [3, 1]]
    assert divide([torch.zeros(3), torch.zeros(2, dtype=torch.float64)]) == [[1], [0]]
    large = [torch.zeros(BUCKET_BYTES // 8, 1) for _ in range(5)]
    assert divide(large) == [[4, 3], [2, 1], [0]]
    assert divide([]) == []


@pytest.mark.parametrize("config", CONFIGS.values())
def test_one_worker_sends_and_loses_nothing(config: TransportConfig) -> None:
    total = open_transport(config, World())
    tensors = gradients(0, 0)
    total(tensors)
    assert all(map(torch.equal, tensors, gradients(0, 0)))
    assert total.num_bytes == 0 and total.state_dict() == {}


def test_one_worker_goes_on_with_what_two_had_not_sent() -> None:
    count = 37 * 21 + 3 * 5 * 7
    state = {f"bucket-0.worker-{rank}-of-2": torch.full((count,), rank + 1.0) for rank in (0, 1)}
    total = open_transport(Sparse24(), World())
    total.load_state_dict(state)
    tensors = gradients(0, 0)
    total(tensors)
    for number, (found, before) in enumerate(zip(tensors, gradients(0, 0), strict=True)):
        assert torch.equal(found, before + 3 if number in MATRICES else before)
    assert total.state_dict() == {}


def errors_of(sizes: list[int], count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of two workers' errors, and what is left of them after some resizes."""
    torch.manual_seed(count)
    # whole numbers, whose sums are exact
    state = {
        f"bucket-{number}.worker-{rank}-of-2": torch.randint(-99, 99, (count,)).float()
        for number in range(2)
        for rank in range(2)
    }
    total = torch.stack([*state.values()]).view(2, 2, count).sum(1)
    for size in sizes:
        parts = [own_errors(state, World(rank, size)) for rank in range(size)]
        state = {
            f"bucket-{number}.worker-{rank}-of-{size}": error
            for rank, part in enumerate(parts)
            for number, error in part.items()
        }
    return total, state


@given(
    sizes=st.lists(st.integers(1, 9), max_size=4),
    count=st.sampled_from([1, 255, 256, 257, 1000, 5000]),
)
def test_the_sum_of_errors_outlives_every_resize(sizes: list[int], count: int) -> None:
    total, state = errors_of(sizes, count)
    found = torch.zeros(2, count)
    for name, error in state.items():
        found[int(name[7])] += error
    assert torch.equal(found, total)


def test_as_many_workers_go_on_with_their_own() -> None:
    _, state = errors_of([], 300)
    for rank in range(2):
        own = own_errors(state, World(rank, 2))
        assert torch.equal(own[1], state[f"bucket-1.worker-{rank}-of-2"])


def test_errors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FormatError, match="all 2 workers"):
        own_errors({"bucket-0.worker-1-of-2": torch.zeros(3)}, World())
    with pytest.raises(FormatError, match=r"bucket-N\.worker-N-of-N"):
        own_errors({"bucket-0": torch.zeros(3)}, World())
    total = open_transport(Sparse24(), World())
    total.load_state_dict({"bucket-0.worker-0-of-1": torch.zeros(3)})
    with pytest.raises(FormatError, match="15 values in bucket 0"):
        total([torch.zeros(3, 5)])
    with pytest.raises(ShapeError, match="float32"):
        total([torch.zeros(3, 5, dtype=torch.float64)])


def test_settings_are_read_back() -> None:
    assert Sparse24.from_dict(Sparse24(values="bfloat16").to_dict()).values == "bfloat16"
    with pytest.raises(ConfigError, match="values of Sparse24"):
        Sparse24.from_dict({"values": "int4"})
    with pytest.raises(ConfigError, match="from 0 to 1"):
        Sparse24(feedback=1.5)
    assert Exact.from_dict({}).kind == "exact"


def test_early_sums_wait_for_their_turn() -> None:
    sent: list[int] = []

    class Recorder(TreeSum):
        def sum_bucket(self, number: int, tensors: Any) -> None:
            sent.append(number)
            if number == 1:
                raise ValueError("no link")

    shapes = [torch.zeros(BUCKET_BYTES // 4, 1), torch.zeros(2), torch.zeros(BUCKET_BYTES // 4, 1)]
    sums = EarlySum(Recorder(World()), shapes, in_background=True)
    sums.give(0, shapes[0])
    sums.give(1, shapes[1])
    assert sent == []
    sums.give(2, shapes[2])
    with pytest.raises(ValueError, match="no link"):
        sums.finish()
    sums.close()
    assert sent == [0, 1, 2]


@pytest.mark.dist
def test_without_feedback_nothing_is_remembered(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["forgetting.state"] == {}
        none, all_, half = (each[f"{name}.1"][0] for name in ("forgetting", "float8", "halving"))
        assert not torch.equal(none, all_) and not torch.equal(half, all_)
    whole, halved = (
        [each[f"{name}.first"]["bucket-0.worker-0-of-" + str(len(found))] for each in found[:1]]
        for name in ("float8", "halving")
    )
    assert torch.equal(whole[0] / 2, halved[0])


def plain(parts: list[Tensor], errors: list[Tensor], kind: Values) -> Tensor:
    """Return the sum of each worker's values by the definition; the errors are renewed.

    Args:
        parts: of each worker [count].
        errors: likewise.
        kind: of kept values.
    """
    size, count = len(parts), parts[0].numel()
    each, total = owned(count, size), torch.zeros(count)
    for owner in range(size):
        mine = slice(owner * each, (owner + 1) * each)
        owns = parts[owner][mine] + errors[owner][mine]
        for rank in range(size):
            if rank != owner:
                value = parts[rank][mine] + errors[rank][mine]
                read = read_back(value, kind)
                errors[rank][mine] = value - read
                owns += read
        total[mine] = read_back(owns, kind)
        errors[owner][mine] = owns - total[mine]
    return total


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensors[number].flatten() for number in MATRICES])


@pytest.fixture(scope="module", params=[2, 3, 4])
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Return what each of several workers found."""
    folder = tmp_path_factory.mktemp("sums")
    assert run_workers([sys.executable, str(SCRIPT), str(folder)], request.param) == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["float8", "bfloat16"])
def test_workers_sum_by_the_definition(found: list[dict[str, Any]], kind: Values) -> None:
    size = len(found)
    errors = [torch.zeros(37 * 21 + 3 * 5 * 7) for _ in range(size)]
    for step in range(STEPS):
        expected = plain([flat(gradients(rank, step)) for rank in range(size)], errors, kind)
        for rank in range(size):
            assert torch.equal(flat(found[rank][f"{kind}.{step}"]), expected)
            for number in (1, 3):
                exact = found[rank][f"exact.{step}"][number]
                assert torch.equal(found[rank][f"{kind}.{step}"][number], exact)
    for rank in range(size):
        assert torch.equal(
            found[rank][f"{kind}.state"][f"bucket-0.worker-{rank}-of-{size}"], errors[rank]
        )


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["float8", "bfloat16"])
def test_over_the_steps_nothing_is_lost(found: list[dict[str, Any]], kind: Values) -> None:
    exact = sum(flat(found[0][f"exact.{step}"]).double() for step in range(STEPS))
    sent = sum(flat(found[0][f"{kind}.{step}"]).double() for step in range(STEPS))
    left = sum(next(iter(each[f"{kind}.state"].values())).double() for each in found)
    assert torch.allclose(torch.as_tensor(sent + left), torch.as_tensor(exact), atol=1e-5, rtol=0)


@pytest.mark.dist
@pytest.mark.parametrize("name", CONFIGS)
def test_when_a_bucket_is_sent_does_not_show(found: list[dict[str, Any]], name: str) -> None:
    for each in found:
        for step in range(STEPS):
            assert all(map(torch.equal, each[f"{name}.{step}"], each[f"{name}.{step}.early"]))


@pytest.mark.dist
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_not_finite_reaches_all_and_does_not_stay(
    found: list[dict[str, Any]], name: str
) -> None:
    for each in found:
        assert not each[f"{name}.bad"][0].isfinite().all()
        assert all(error.isfinite().all() for error in each[f"{name}.after"].values())


@pytest.mark.dist
@pytest.mark.parametrize("name", ["exact", "float8", "bfloat16"])
def test_bytes_are_counted_as_predicted(found: list[dict[str, Any]], name: str) -> None:
    size, few, many = len(found), 33 + 1, 37 * 21 + 3 * 5 * 7
    exact = "ring" if size == 3 else "tree"
    ways = {"float8": "sparse24-float8", "bfloat16": "sparse24-bfloat16", "exact": exact}
    expected = wire_bytes(many, size, ways[name]) + wire_bytes(few, size, exact)  # type: ignore[arg-type]
    assert {each[f"{name}.bytes"] for each in found} == {STEPS * expected}
