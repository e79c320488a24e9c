"""Schemes by name, and the table of kernels that can be asked."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from deepseek.errors import BackendError, ConfigError, ShapeError
from deepseek.ops import choice, cpu
from deepseek.ops.choice import Case, CompiledBackend, Kernel, choose
from deepseek.ops.scheme import SCHEMES, Scheme, stored_bits, stored_width
from tests.ops.native import ISAS, NEEDS_KERNELS


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_has_the_name_it_was_made_by(name: str) -> None:
    scheme = Scheme.named(name)
    assert scheme.name == name
    assert Scheme.from_dict(scheme.to_dict()) == scheme


def test_a_scheme_without_a_name_says_what_it_is_made_of() -> None:
    assert Scheme(weights="int8", head="bfloat16").name == "int8-g32-head-bfloat16-kv-bfloat16"


@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_width_is_padded_to_whole_groups(group: int) -> None:
    """SmolLM2's 576 channels are 640 in groups of 128."""
    padded = {32: 576, 64: 576, 128: 640}[group]
    assert stored_width("int4", 576, group) == padded
    assert stored_bits("int4", group) == {32: 5, 64: 4.5, 128: 4.25}[group]
    assert stored_width("int8", 100) == 128
    assert stored_bits("int8") == stored_bits("int8", 64) == 8.25
    assert stored_width("int8", 576, 192) == 576 and stored_bits("int8", 192) == 8 + 16 / 192
    assert stored_width("int8", 100, None) == 128 and stored_bits("int8", None) == 8
    assert stored_width("bfloat16", 33) == 34 and stored_width("float32", 33) == 33


def test_the_head_keeps_the_smallest_groups() -> None:
    scheme = Scheme.named("int4-g128")
    assert scheme.group_of("int4") == 128 and scheme.group_of(scheme.head_storage) == 32
    assert Scheme.named("int8-g192").group_of("int8") == 192


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="int4-g64"):
        Scheme.named("int3")


@NEEDS_KERNELS
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "int4"])
def test_every_product_has_a_compiled_kernel(
    isa: str, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cpu.ISA_VARIABLE, isa)
    found = choose(Case(operation="linear", storage=storage))
    assert found.name == f"deepseek {isa}"
    assert found.weight_bits is not None and found.products_per_cycle is not None
    assert "bits a weight" in found.cost_text


@NEEDS_KERNELS
def test_an_instruction_set_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.ISA_VARIABLE, "sse")
    with pytest.raises(ConfigError, match="plain"):
        cpu.chosen_instruction_set()


def test_gradients_run_through_torch() -> None:
    case = Case(operation="linear", storage="bfloat16", rows=512, has_gradients=True)
    assert choose(case).name == "torch"
    assert "gradients" in choose(case).why


def test_without_kernels_torch_runs_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "why_missing", lambda: "no compiler was there")
    found = choose(Case(operation="linear", storage="bfloat16"))
    assert (found.name, found.why) == ("torch", "no compiler was there")
    with pytest.raises(BackendError, match="compiler"):
        choose(Case(operation="linear", storage="int4"))


@NEEDS_KERNELS
def test_the_cost_of_int4_depends_on_its_group() -> None:
    case = Case(operation="linear", storage="int4")
    wide = choose(case.replace(group=128))
    assert (choose(case).weight_bits, wide.weight_bits) == (5, 4.25)
    assert "in groups of 128" in wide.why and "groups of 128" in case.replace(group=128).text


def test_attention_that_is_not_causal_runs_through_torch() -> None:
    case = Case(operation="attention", storage="float32", is_causal=False)
    assert choose(case).name == "torch"
    if cpu.why_missing() is None:
        assert choose(case).why == "the compiled kernels are causal"
    assert case.text == "float32, one row, not causal"


@pytest.mark.parametrize("has_gradients", [False, True])
def test_block_tables_are_executed_by_device(has_gradients: bool) -> None:
    case = Case(
        operation="attention", storage="bfloat16", has_table=True, has_gradients=has_gradients
    )
    assert choice.TorchBackend().kernel(case).name == "torch gathered"
    if cpu.why_missing() is None:
        assert choose(case).name == f"deepseek {cpu.chosen_instruction_set()}"
        assert choose(case).why.startswith("listed blocks alone")
    there = case.replace(device="cuda")
    assert choose(there).name == "torch flex" and "never run" in choose(there).why
    assert there.text.endswith("on cuda") and "with a block table" in there.text


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_torch_has_no_integer_keys(storage: str) -> None:
    case = Case(operation="attention", storage=storage)
    assert choice.TorchBackend().kernel(case) is None


def test_nobody_keeps_keys_in_int4() -> None:
    with pytest.raises(BackendError, match="int4"):
        choose(Case(operation="attention", storage="int4"))


@NEEDS_KERNELS
def test_the_compiled_kernels_refuse_shapes_before_they_read() -> None:
    product = CompiledBackend().kernel(Case(operation="linear", storage="float32"))
    attend = CompiledBackend().kernel(Case(operation="attention", storage="float32"))
    assert product is not None and product.linear is not None
    assert attend is not None and attend.attention is not None
    with pytest.raises(ShapeError, match=r"inputs of PackedLinear must be \[M, 7\]"):
        product.linear(torch.ones(5, 7))(torch.ones(2, 6))
    with pytest.raises(ShapeError, match=r"its bias \[N\]; got \[\[5, 7\], \[6\]\]"):
        product.linear(torch.ones(5, 7), torch.ones(6))
    good, late = torch.ones(1, 2, 3, 8), torch.ones(1, 2, 4, 8)
    for tensors in ((late, good, good), (good, good, late), (good[..., :7],) * 3, (good[0],) * 3):
        with pytest.raises(ShapeError, match="T at most S"):
            attend.attention(*tensors)


def test_a_strangers_backend_comes_first_and_only_where_it_has_a_kernel() -> None:
    @dataclasses.dataclass
    class Accelerator:
        def kernel(self, case: Case) -> Kernel | None:
            return Kernel(name="npu", why="it is one") if case.device == "npu" else None

    case = Case(operation="linear", storage="bfloat16", device="npu")
    assert choose(case, [Accelerator()]).name == "npu"
    assert choose(case.replace(device="cpu"), [Accelerator()]).name != "npu"


def test_threads_stay_within_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "cgroup_cores", lambda: 0.5)
    assert cpu.default_threads() == 1
    monkeypatch.setattr(cpu, "cgroup_cores", lambda: 1000.0)
    assert cpu.default_threads() >= 1


def test_a_group_that_no_kernel_has_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="group of Scheme must be one of 32, 64, 128, 192; got 48"
    ):
        Scheme(weights="int4", group=48)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no int8"):
        Scheme(weights="int4", group=None)


def test_a_scale_for_a_whole_row_has_a_name() -> None:
    scheme = Scheme.named("int8-row")
    assert (scheme.group, scheme.name, scheme.head_storage) == (None, "int8-row", "int8")
    assert Scheme.from_dict(scheme.to_dict()) == scheme
    assert scheme.form_of("int8").text == "int8 by rows, rotated"
