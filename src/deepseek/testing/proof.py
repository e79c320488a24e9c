"""A kernel on trial, and what is found of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from deepseek.errors import VerifyError, describe
from deepseek.ops.choice import Case, Kernel

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proof:
    """What was found of the kernels of one kind of case; everything that must hold held."""

    case: Case
    """With the most rows that were asked for."""
    kernels: tuple[str, ...]
    """Names of the kernels that answered."""
    num_shapes: int
    """Shapes that were computed."""
    largest_share: float
    """Of the error that the storage allows: the largest that was seen, from 0 to 1."""
    is_batch_invariant: bool
    """Every row had the same bits alone and in company, declared or not."""

    @property
    def text(self) -> str:
        """The proof as a person reads it."""
        alone = "the same bits" if self.is_batch_invariant else "other bits"
        return (
            f"{self.case.operation}, {self.case.text}: {', '.join(self.kernels)}; "
            f"{self.num_shapes} shapes, at most {self.largest_share:.0%} of the error allowed, "
            f"{alone} alone and in company"
        )


@dataclasses.dataclass(frozen=True)
class Trial:
    """A kernel with the case it was named for, and the shapes it is tried with."""

    case: Case
    kernel: Kernel
    shapes: str = ""

    def of(self, shapes: str) -> Trial:
        """Return the trial with other shapes."""
        return dataclasses.replace(self, shapes=shapes)

    def fail(self, name: str, must: str, got: object, cause: Exception | None = None) -> NoReturn:
        """Say what is wrong.

        Raises:
            VerifyError: always.
        """
        where = f"{self.kernel.name!r} for {self.case.operation}, {self.case.text}"
        owner = f"{where} ({self.shapes})" if self.shapes else where
        raise VerifyError(describe(name, owner, must, got)) from cause

    def call(self, function: Callable[..., T], *tensors: Tensor | None) -> T:
        """Return what a function of the kernel gives.

        Raises:
            VerifyError: it raised, or changed a tensor it was given.
        """
        before = [None if each is None else each.detach().clone() for each in tensors]
        try:
            found = function(*tensors)
        except Exception as error:
            self.fail("call", "without an error", f"{type(error).__name__}: {error}", error)
        for place, (old, new) in enumerate(zip(before, tensors, strict=True)):
            if old is not None and new is not None and not torch.equal(old, new):
                self.fail(f"argument {place}", "left as it was", "changed values")
        return found

    def result(
        self, function: Callable[..., object], *tensors: Tensor, shape: torch.Size
    ) -> Tensor:
        """Return the result of a call.

        Raises:
            VerifyError: as `call`, or it is no float32 tensor of this shape on the case's device.
        """
        found = self.call(function, *tensors)
        if not isinstance(found, Tensor):
            self.fail("result", "a tensor", type(found).__name__)
        made = (found.dtype, tuple(found.shape), found.device.type)
        wanted = (torch.float32, tuple(shape), torch.device(self.case.device).type)
        if made != wanted:
            self.fail("result", _kind(*wanted), _kind(*made))
        return found

    def of_nothing(self, function: Callable[..., object], *tensors: Tensor) -> None:
        """Call with no rows.

        Args:
            function: gives a result of the shape of the first tensor, but for the last dimension.
            tensors: the first of them is empty.

        Raises:
            VerifyError: the result has rows, or the refusal is no ValueError.
        """
        try:
            found = function(*tensors)
        except ValueError:
            return
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
            self.fail("call with no rows", "done, or refused by a ValueError", got, error)
        rows = tensors[0].shape[:-1]
        if not isinstance(found, Tensor) or found.shape[:-1] != rows:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            self.fail("result of no rows", f"[{', '.join(map(str, rows))}, N]", got)

    def gradients(
        self, result: Tensor, leaves: Sequence[Tensor], direction: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the gradients of `(result * direction).sum()`.

        Raises:
            VerifyError: there are none.
        """
        try:
            return torch.autograd.grad(result, leaves, direction.to(result.device))
        except RuntimeError as error:
            self.fail("gradients", "there, as the case asks", str(error).splitlines()[0], error)

    def share(self, name: str, found: Tensor, expected: Tensor, bound: Tensor) -> float:
        """Return the largest error as a share of its bound.

        Args:
            name: of what was computed.
            found: by the kernel, on any device.
            expected: by the reference, of the same shape.
            bound: largest error allowed, for each value or for all.

        Raises:
            VerifyError: an error is larger, or a value is NaN; says which is the worst.
        """
        error = (found.detach().cpu().double() - expected.double()).abs()
        shares = error / bound.double().clamp_min(torch.finfo(torch.float32).tiny)
        shares = shares.nan_to_num(nan=float("inf"))
        worst = int(shares.argmax())
        largest = float(shares.flatten()[worst])
        if largest > 1:
            places = torch.unravel_index(torch.tensor(worst), shares.shape)
            allowed = float(bound.double().expand_as(error).flatten()[worst])
            must = f"within {allowed:.3g} of the reference {float(expected.flatten()[worst]):.6g}"
            at = f"{name} at {[int(place) for place in places]}"
            self.fail(at, must, float(found.detach().flatten()[worst]))
        return largest


def _kind(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)} on {device}"
