"""The contract of a backend: ours hold it, and every planted fault is caught, by one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepseek.errors import BackendError, VerifyError
from deepseek.ops import cpu
from deepseek.ops.choice import Case, CompiledBackend, Kernel, Product, TorchBackend
from deepseek.ops.linear.reference import linear_reference
from deepseek.testing import Proof, check_backend
from deepseek.testing.attention import reference
from tests.ops.native import ISAS, NEEDS_KERNELS

Change = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class Stranger:
    """A backend made of the references, with places for one fault each."""

    operation: str = "linear"
    storage: str = "float32"
    has_gradients: bool = False
    answer: dict[str, object] = dataclasses.field(default_factory=dict)
    """Fields of its kernels."""
    linear: Change | None = None
    """Of (product, inputs, weight, bias), in place of the product."""
    attention: Change | None = None
    """Of (case, queries, keys, values), in place of attention."""
    pack: Callable[[Tensor], None] | None = None
    """Done to the weight when it is packed."""

    def kernel(self, case: Case) -> Kernel | None:
        """Return the kernel of the one kind of case it serves."""
        asked = (case.operation, case.storage, case.has_gradients, case.device)
        if asked != (self.operation, self.storage, self.has_gradients, "cpu"):
            return None

        def linear(weight: Tensor, bias: Tensor | None = None, /) -> Product:
            if self.pack is not None:
                self.pack(weight)

            def product(inputs: Tensor) -> Tensor:
                return linear_reference(inputs, weight, case.storage, group=case.group, bias=bias)

            if self.linear is None:
                return product
            change = self.linear
            return lambda inputs: change(product, inputs, weight, bias)

        def attention(queries: Tensor, keys: Tensor, values: Tensor, /) -> Tensor:
            run = self.attention or (lambda case, *tensors: reference(case, tensors))
            return run(case, queries, keys, values)

        fields = {"name": "stranger", "why": "for tests", "linear": linear, "attention": attention}
        return Kernel(**(fields | self.answer))


@NEEDS_KERNELS
@pytest.mark.parametrize("isa", ISAS)
def test_the_compiled_kernels_hold_it(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.ISA_VARIABLE, isa)
    proofs = check_backend(CompiledBackend())
    served = {(proof.case.operation, proof.case.storage, proof.case.group) for proof in proofs}
    assert served == {
        *(("linear", storage, 32) for storage in ("float32", "bfloat16", "int8", "int4")),
        *(("linear", "int4", group) for group in (64, 128)),
        ("linear", "int8", None),
        *(("attention", storage, 32) for storage in ("float32", "bfloat16", "int8")),
    }
    assert all(proof.is_batch_invariant and proof.case.is_causal for proof in proofs)
    assert {proof.kernels for proof in proofs} == {(f"deepseek {isa}",)}


def test_torch_holds_it_with_gradients() -> None:
    proofs = check_backend(TorchBackend())
    served = {(proof.case.operation, proof.case.storage) for proof in proofs}
    assert served == {
        (operation, storage)
        for operation in ("linear", "attention")
        for storage in ("float32", "bfloat16")
    }
    assert {proof.case.has_gradients for proof in proofs} == {False, True}
    assert all(0 < proof.largest_share <= 1 for proof in proofs)


@pytest.mark.parametrize("operation", ["linear", "attention"])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("has_gradients", [False, True])
def test_the_references_hold_it(operation: str, storage: str, has_gradients: bool) -> None:
    proofs = check_backend(Stranger(operation, storage, has_gradients))
    assert {proof.case.operation for proof in proofs} == {operation}
    assert len(proofs) == (1 if operation == "linear" and storage != "int8" else 2)
    assert "stranger" in proofs[0].text and storage in proofs[0].text


def test_int4_is_tried_in_every_group() -> None:
    proofs = check_backend(Stranger(storage="int4"))
    assert [proof.case.group for proof in proofs] == [32, 64, 128]


def test_int8_is_tried_by_rows_too() -> None:
    proofs = check_backend(Stranger(storage="int8"))
    assert [proof.case.group for proof in proofs] == [32, None]


def wrong_scale(product: Product, inputs: Tensor, *_: object) -> Tensor:
    return product(inputs) * 1.02


def wrong_column(product: Product, inputs: Tensor, *_: object) -> Tensor:
    return product(inputs).roll(1, dims=1)


def companions(product: Product, inputs: Tensor, *_: object) -> Tensor:
    """As a scale of the whole batch would: a little, and only in company."""
    return product(inputs) * (1 + 1e-7 * min(len(inputs) - 1, 1))


def modified(product: Product, inputs: Tensor, *_: object) -> Tensor:
    found = product(inputs)
    inputs += 1
    return found


def raised(product: Product, inputs: Tensor, *_: object) -> Tensor:
    if len(inputs) == 17:
        raise RuntimeError("17 rows")
    return product(inputs)


def without_bias(_: Product, inputs: Tensor, weight: Tensor, __: object) -> Tensor:
    return linear_reference(inputs, weight, "float32")


def not_a_number(product: Product, inputs: Tensor, *_: object) -> Tensor:
    found = product(inputs)
    return found / (found != 0)


def narrow(product: Product, inputs: Tensor, *_: object) -> Tensor:
    return product(inputs).half()


def cut(product: Product, inputs: Tensor, *_: object) -> Tensor:
    return product(inputs)[:, :128]


def as_list(product: Product, inputs: Tensor, *_: object) -> object:
    return product(inputs).tolist()


def unclear(product: Product, inputs: Tensor, *_: object) -> Tensor:
    if len(inputs) == 0:
        raise ZeroDivisionError("no rows")
    return product(inputs)


def one_for_none(product: Product, inputs: Tensor, *_: object) -> Tensor:
    return product(inputs) if len(inputs) else product(torch.zeros(1, inputs.shape[1]))


def overwritten(product: Product, inputs: Tensor, weight: Tensor, _: object) -> Tensor:
    """Every call writes its result into the same memory."""
    found = product(inputs)
    shared = _MEMORY.setdefault(id(weight), torch.zeros(64, 400))
    shared[: found.shape[0], : found.shape[1]] = found
    return shared[: found.shape[0], : found.shape[1]]


_MEMORY: dict[int, Tensor] = {}


def detached(product: Product, inputs: Tensor, *_: object) -> Tensor:
    return product(inputs).detach()


def wrong_gradient(product: Product, inputs: Tensor, *_: object) -> Tensor:
    found = product(inputs)
    return 2 * found - found.detach()


def unrotated(_: Product, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """int8 with one scale a row, which is another scheme."""
    scales = [each.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127 for each in (inputs, weight)]
    pairs = zip((inputs, weight), scales, strict=True)
    held = [(each / scale).round() * scale for each, scale in pairs]
    found = held[0] @ held[1].T
    return found if bias is None else found + bias


FAULTS: dict[str, tuple[Stranger, str]] = {
    "wrong scale": (Stranger(linear=wrong_scale), "output at .* within .* of the reference"),
    "wrong scale, bfloat16": (Stranger(storage="bfloat16", linear=wrong_scale), "bfloat16"),
    "wrong scale, int8": (Stranger(storage="int8", linear=wrong_scale), "int8"),
    "wrong scale, int4": (Stranger(storage="int4", linear=wrong_scale), "int4"),
    "off by one column": (Stranger(linear=wrong_column), "within .* of the reference"),
    "off by one column, int4": (Stranger(storage="int4", linear=wrong_column), "within"),
    "another int8": (Stranger(storage="int8", linear=unrotated), "within .* of the reference"),
    "depends on companions": (
        Stranger(linear=companions, answer={"is_batch_invariant": True}),
        "the same bits alone and in company, as declared",
    ),
    "modifies its inputs": (Stranger(linear=modified), "argument 0 .* left as it was"),
    "modifies the weight": (Stranger(pack=lambda weight: weight.mul_(2)), "argument 0 .* left"),
    "raises": (Stranger(linear=raised), "17 rows .*without an error.*RuntimeError: 17 rows"),
    "no bias": (Stranger(linear=without_bias), "within .* of the reference"),
    "NaN": (Stranger(linear=not_a_number), "of the reference .*got nan"),
    "half precision": (Stranger(linear=narrow), "result .* be float32 .* got 'float16"),
    "a column too few": (Stranger(linear=cut), r"result .* be 'float32 \[1, 130\]|result .*130"),
    "no tensor": (Stranger(linear=as_list), "result .* a tensor; got 'list'"),
    "unclear about no rows": (Stranger(linear=unclear), "no rows .* refused by a ValueError"),
    "a row for none": (Stranger(linear=one_for_none), "result of no rows"),
    "overwrites": (Stranger(linear=overwritten), "left alone by the next call"),
    "no gradients": (Stranger(has_gradients=True, linear=detached), "gradients .* there"),
    "wrong gradients": (Stranger(has_gradients=True, linear=wrong_gradient), "gradient of inputs"),
    "cannot be called": (Stranger(answer={"linear": None}), "linear .* given"),
    "no name": (Stranger(answer={"name": ""}), "name of Stranger .* words"),
    "costs nothing": (Stranger(answer={"weight_bits": 0}), "weight_bits .* above 0"),
    "costs less": (Stranger(answer={"products_per_cycle": -1}), "products_per_cycle .* above 0"),
    "serves nothing": (Stranger(operation="fft"), "a kernel for some case on cpu"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_product_is_caught(name: str) -> None:
    backend, said = FAULTS[name]
    with pytest.raises(VerifyError, match=said) as raised:
        check_backend(backend)
    assert "\n" not in str(raised.value)


def not_causal(case: Case, *tensors: Tensor) -> Tensor:
    return reference(case.replace(is_causal=False), tensors)


def one_slot_late(case: Case, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return reference(case, (queries, keys, values.roll(1, dims=2)))


def other_heads(case: Case, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Query head h reads KV head h % KV heads."""
    kv_heads = keys.shape[1]
    order = torch.arange(queries.shape[1]).view(-1, kv_heads).T.flatten()
    return reference(case, (queries[:, order], keys, values))[:, order.argsort()]


def tilted(case: Case, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return reference(case, (queries, keys, values)) * (1 + 1e-7 * (queries.shape[2] - 1))


def scaled_keys(case: Case, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    keys *= 2
    return reference(case, (queries, keys / 2, values))


def detached_keys(case: Case, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return reference(case, (queries, 2 * keys - keys.detach(), values))


def overwritten_attention(case: Case, *tensors: Tensor) -> Tensor:
    """Every call writes its result into the same memory."""
    found = reference(case, tensors)
    shared = _MEMORY.setdefault(0, torch.zeros(1 << 20))[: found.numel()].view(found.shape)
    return shared.copy_(found)


def attends(run: Change, **settings: object) -> Stranger:
    return Stranger(operation="attention", attention=run, **settings)


ATTENTION_FAULTS: dict[str, tuple[Stranger, str]] = {
    "sees what comes later": (attends(not_causal), "within .* of the reference"),
    "one slot late": (attends(one_slot_late, storage="int8"), "within .* of the reference"),
    "other heads": (attends(other_heads), "within .* of the reference"),
    "depends on companions": (
        attends(tilted, answer={"is_batch_invariant": True}),
        "the same bits alone and in company, as declared",
    ),
    "modifies the keys": (attends(scaled_keys), "argument 1 .* left as it was"),
    "overwrites": (attends(overwritten_attention), "left alone by the next call"),
    "wrong gradients": (attends(detached_keys, has_gradients=True), "gradient of keys"),
    "cannot be called": (attends(one_slot_late, answer={"attention": None}), "attention .* given"),
}


@pytest.mark.parametrize("name", ATTENTION_FAULTS)
def test_a_fault_in_attention_is_caught(name: str) -> None:
    backend, said = ATTENTION_FAULTS[name]
    with pytest.raises(VerifyError, match=said) as raised:
        check_backend(backend)
    assert "\n" not in str(raised.value)


def test_what_is_not_declared_is_reported() -> None:
    (proof,) = check_backend(Stranger(linear=companions))
    assert isinstance(proof, Proof)
    assert not proof.is_batch_invariant and "other bits" in proof.text


class Raising:
    """A backend that raises in place of answering None."""

    def kernel(self, case: Case) -> Kernel | None:
        raise BackendError(f"no {case.operation}")


class Talking:
    """A backend whose answer is a name."""

    def kernel(self, case: Case) -> object:
        return "npu"


class Fickle:
    """A backend that changes its mind."""

    asked = 0

    def kernel(self, case: Case) -> Kernel | None:
        self.asked += 1
        return Kernel(name=f"kernel {self.asked}", why="for tests")


class OnlySampling:
    """A backend that serves what is named and not called."""

    def kernel(self, case: Case) -> Kernel | None:
        is_served = case.operation == "sampling"
        return Kernel(name="sampler", why="for tests") if is_served else None


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        (Raising(), "answer of Raising .* a kernel or None; got 'BackendError: no linear'"),
        (Talking(), "a kernel or None; got 'npu'"),
        (Fickle(), "the same when asked again"),
    ],
)
def test_a_fault_in_an_answer_is_caught(backend: object, said: str) -> None:
    with pytest.raises(VerifyError, match=said):
        check_backend(backend)


def test_sampling_is_named_only() -> None:
    assert check_backend(OnlySampling()) == ()


def test_a_backend_of_another_device_is_asked_about_it() -> None:
    with pytest.raises(VerifyError, match=r"on cuda:0; got .* Name its device"):
        check_backend(Stranger(), devices=["cuda:0"])
