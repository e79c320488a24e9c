"""What a step costs, by the count, is what an engine of the same model holds and reads."""

from __future__ import annotations

import dataclasses

import pytest

from deepseek.errors import BackendError
from deepseek.generate import Engine, build_engine
from deepseek.generate.cost import OperationCost, cost_of_step
from deepseek.generate.flat import decoder_program
from deepseek.generate.modules import weights_of
from deepseek.models import Decoder
from deepseek.ops.choice import Case, Kernel
from deepseek.ops.cpu import why_missing
from deepseek.ops.scheme import SCHEMES, Scheme
from tests.models.zoo import ours, reference

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))


def shapes_of(model: Decoder) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's weights, those of stacked experts one by one."""
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    for name, shape in list(shapes.items()):
        prefix, _, part = name.rpartition(".")
        for index in range(shape[0] if prefix.endswith(".experts") else 0):
            height = shape[1] // 2 if part == "gate_up_proj" else shape[1]
            for each in ("gate", "up") if part == "gate_up_proj" else ("down",):
                shapes[f"{prefix}.{index}.{each}_proj.weight"] = (height, shape[2])
    return shapes


def costs(model: Decoder, scheme: Scheme, **settings: object) -> dict[str, OperationCost]:
    """Return the costs of a step by name; each name stands for one kind of instruction."""
    program = decoder_program(model.config)
    found = cost_of_step(program, shapes_of(model), scheme, **settings)
    assert len({cost.name for cost in found}) == len(found)
    return {cost.name: cost for cost in found}


def engine(model: Decoder, scheme: Scheme) -> Engine:
    return build_engine(model.config, weights_of(model), scheme, threads=1)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("case", ["llama-tied-mha", "qwen3-tied"])
def test_weights_and_cache_are_those_of_the_engine(case: str, name: str) -> None:
    model, scheme = ours(reference(case)), Scheme.named(name)
    found = costs(model, scheme, rows=2, context=64)
    built = engine(model, scheme)
    counted = sum(cost.weight_bytes for cost in found.values())
    # the layout may pad scales a little further than to whole groups
    assert counted <= built.weight_bytes <= 1.04 * counted
    if scheme.weights in ("float32", "bfloat16"):
        assert counted == built.weight_bytes
    if model.config.head_dim % 16 == 0:
        # whole pages of the system's are allocated
        assert 0 <= built.new_pages(2).num_bytes - found["attention"].cache_bytes < 4096


def test_products_are_those_of_the_shapes() -> None:
    model = ours(reference("qwen3"))
    found = costs(model, Scheme.named("int8"), rows=3, context=10)
    layers, config = model.config.num_layers, model.config
    assert list(found) == ["qkv", "attention", "o", "swiglu", "down", "head"]
    assert found["qkv"].shape == ((4 + 2 * 2) * 16, 48)
    assert found["qkv"].products == 3 * layers * 8 * 16 * 48
    assert found["attention"].shape == (4, 2, 16)
    assert found["attention"].products == 3 * 10 * layers * 4 * 16 * 2
    assert found["swiglu"].shape == (2 * config.intermediate_size, 48)
    assert (found["head"].count, found["head"].shape) == (1, (97, 48))


def test_experts_are_read_as_far_as_tokens_choose_them() -> None:
    model, scheme = ours(reference("qwen3-moe")), Scheme.named("float32")
    one, many = costs(model, scheme)["experts"], costs(model, scheme, rows=100)["experts"]
    each = 3 * 32 * 48
    assert one.shape == (8, 3 * 32, 48)
    assert one.weight_bytes == one.count * 2 * each * 4
    assert many.weight_bytes == many.count * 8 * each * 4
    assert many.products == 100 * many.count * 2 * each
    router = costs(model, Scheme.named("int4"))["router"]
    assert router.storage == "float32"


def test_a_window_bounds_what_is_seen() -> None:
    model = ours(reference("mistral-window"))
    scheme = Scheme.named("bfloat16")
    near, far = (costs(model, scheme, context=each)["attention"] for each in (9, 100))
    assert near.cache_bytes == far.cache_bytes > 0
    mixed = ours(reference("qwen2-window"))
    found = cost_of_step(decoder_program(mixed.config), shapes_of(mixed), scheme, context=100)
    seen = [cost.cache_bytes // cost.count for cost in found if cost.name == "attention"]
    assert sorted(each / max(seen) for each in seen) == [0.7, 1.0]


def test_head_and_cache_have_a_storage_of_their_own() -> None:
    found = costs(ours(reference("llama")), Scheme.named("int4-kv8"))
    storages = {name: cost.storage for name, cost in found.items()}
    assert storages == {
        **dict.fromkeys(("qkv", "o", "swiglu", "down"), "int4"),
        "attention": "int8",
        "head": "int8",
    }


@dataclasses.dataclass
class Accelerator:
    """A backend of another that says, or does not say, what a weight costs."""

    weight_bits: float | None

    def kernel(self, case: Case) -> Kernel | None:
        """Return a kernel for products only."""
        is_served = case.operation == "linear" and case.rows == 7
        return (
            Kernel(name="npu", why="it is one", weight_bits=self.weight_bits) if is_served else None
        )


def test_a_backend_is_asked_and_its_costs_are_taken() -> None:
    model, scheme = ours(reference("llama")), Scheme.named("int4")
    ours_alone = costs(model, scheme, rows=7)["qkv"]
    half = costs(model, scheme, rows=7, others=[Accelerator(2.5)])
    assert half["qkv"].kernel.name == "npu" and half["attention"].kernel.name != "npu"
    assert half["qkv"].weight_bytes == ours_alone.weight_bytes / 2
    silent = costs(model, scheme, rows=7, others=[Accelerator(None)])["qkv"]
    assert silent.weight_bytes == ours_alone.weight_bytes


def test_a_missing_weight_is_named() -> None:
    model = ours(reference("llama"))
    with pytest.raises(BackendError, match=r"q_proj.weight.* must be there"):
        cost_of_step(decoder_program(model.config), {}, Scheme())
