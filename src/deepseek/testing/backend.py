"""`check_backend`: what a backend says it has, it has, and what it has computes the right thing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from deepseek.errors import VerifyError, describe
from deepseek.ops.choice import Backend, Case, Kernel
from deepseek.testing import attention, linear
from deepseek.testing.proof import Proof, Trial

_ROWS = (1, 2, 33, 512)
"""Rows that a backend is asked about, besides those that are computed."""


def check_backend(backend: Backend, *, devices: Sequence[str] = ("cpu",)) -> tuple[Proof, ...]:
    """Hold a backend to its contract, and return what was found of each kind of case it serves.

    It is asked about every operation, storage, group and number of rows, with and without
    gradients: it answers with a kernel or None, the same when it is asked again. What it names is
    called at odd shapes: results and gradients are the reference's within the error of the storage,
    arguments stay as they were, no rows are served or refused clearly, and where a kernel declares
    itself batch invariant, a row's bits do not depend on its companions. Sampling is named only.

    Args:
        backend: to be judged.
        devices: the cases' devices, as PyTorch names them: `("cuda",)`.

    Raises:
        VerifyError: names the first case in which something does not hold, and what was got.
    """
    proofs: list[Proof] = []
    has_any = False
    for kind in itertools.chain.from_iterable(map(kinds, devices)):
        answers = [ask(backend, kind.replace(rows=rows)) for rows in _ROWS]
        has_any = has_any or any(answers)
        if kind.operation == "linear":
            proofs += _prove(backend, kind, linear.prove_linear, linear.SHAPES, 0)
        elif kind.operation == "attention":
            proofs += _prove(backend, kind, attention.prove_attention, attention.SHAPES, 3)
    if not has_any:
        must = f"a kernel for some case on {', '.join(devices)}"
        step = "Name its device: check_backend(backend, devices=(...))"
        raise VerifyError(describe("answers", type(backend).__name__, must, "None to all", step))
    return tuple(proofs)


def kinds(device: str) -> Iterator[Case]:
    """Yield a case of one row for each kind that a backend is asked about."""
    for has_gradients in (False, True):
        about = Case(
            operation="linear", storage="float32", device=device, has_gradients=has_gradients
        )
        yield from (about.replace(storage=each) for each in ("float32", "bfloat16", "int8"))
        yield from (about.replace(storage="int4", group=group) for group in (32, 64, 128))
        yield about.replace(storage="int8", group=None)
        about = about.replace(operation="attention")
        for storage, is_causal in itertools.product(("float32", "bfloat16", "int8"), (True, False)):
            yield about.replace(storage=storage, is_causal=is_causal)
    yield Case(operation="sampling", storage="float32", device=device)


def ask(backend: Backend, case: Case) -> Kernel | None:
    """Return a backend's answer for a case.

    Raises:
        VerifyError: it raised, is no kernel, has no name, reason or positive cost, or is another
            when it is asked again.
    """

    where = f"{type(backend).__name__} for {case.operation}, {case.text}"
    try:
        kernel, again = backend.kernel(case), backend.kernel(case)
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise VerifyError(describe("answer", where, "a kernel or None", got)) from error
    if kernel is not None and not isinstance(kernel, Kernel):
        raise VerifyError(describe("answer", where, "a kernel or None", kernel))
    if kernel != again:
        must = f"the same when asked again, {kernel}"
        raise VerifyError(describe("answer", where, must, again))
    if kernel is None:
        return None
    for name in ("name", "why"):
        if not getattr(kernel, name):
            raise VerifyError(describe(name, where, "words", getattr(kernel, name)))
    for name in ("weight_bits", "products_per_cycle"):
        cost = getattr(kernel, name)
        if cost is not None and not (cost > 0 and math.isfinite(cost)):
            raise VerifyError(describe(name, where, "above 0, or None", cost))
    return kernel


def _prove(
    backend: Backend,
    kind: Case,
    prove: Callable[[Trial, tuple, int], tuple[float, bool]],
    shapes: Sequence[tuple[int, ...]],
    rows_at: int,
) -> list[Proof]:
    """Return the proof of a kind of case, or none where the backend has no kernel.

    Args:
        backend: to be judged.
        kind: the case but for its rows.
        prove: the check of the operation.
        shapes: what it is tried with.
        rows_at: where in a shape the rows of the case stand.
    """
    names: dict[str, None] = {}
    shares, found, last = [], [], kind
    for seed, shape in enumerate(shapes):
        case = kind.replace(rows=shape[rows_at])
        kernel = ask(backend, case)
        if kernel is None:
            continue
        trial = Trial(case, kernel)
        share, is_same = prove(trial, shape, seed)
        if kernel.is_batch_invariant and not is_same:
            where = "the same bits alone and in company, as declared"
            trial.fail("a row", where, f"other bits in shape {list(shape)}")
        names[kernel.name], last = None, max(last, case, key=lambda each: each.rows)
        shares.append(share)
        found.append(is_same)
    if not shares:
        return []
    proof = Proof(
        case=last,
        kernels=tuple(names),
        num_shapes=len(shares),
        largest_share=max(shares),
        is_batch_invariant=all(found),
    )
    return [proof]
