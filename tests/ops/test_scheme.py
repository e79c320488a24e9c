"""Schemes by name, and the table of kernels that can be asked."""

from __future__ import annotations

import dataclasses

import pytest

from deepseek.errors import BackendError, ConfigError
from deepseek.ops import choice, cpu
from deepseek.ops.choice import Case, Kernel, choose
from deepseek.ops.scheme import SCHEMES, Scheme
from tests.ops.native import ISAS, NEEDS_KERNELS


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_has_the_name_it_was_made_by(name: str) -> None:
    scheme = Scheme.named(name)
    assert scheme.name == name
    assert Scheme.from_dict(scheme.to_dict()) == scheme


def test_a_scheme_without_a_name_says_what_it_is_made_of() -> None:
    assert Scheme(weights="int8", head="bfloat16").name == "int8-g32-head-bfloat16-kv-bfloat16"


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
    case = Case(operation="attention", storage="bfloat16", rows=512, has_gradients=True)
    assert choose(case).name == "torch"
    assert "gradients" in choose(case).why


def test_without_kernels_torch_runs_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "why_missing", lambda: "no compiler was there")
    found = choose(Case(operation="linear", storage="bfloat16"))
    assert (found.name, found.why) == ("torch", "no compiler was there")
    with pytest.raises(BackendError, match="compiler"):
        choose(Case(operation="linear", storage="int4"))


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
