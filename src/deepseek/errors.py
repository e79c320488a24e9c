"""Every error this package raises on purpose, and the one form a user error is written in.

    DeepseekError
    ├── ConfigError (ValueError)       a setting, argument or name is not one that can be used
    ├── ShapeError (ValueError)        a tensor has the wrong shape, dtype or device
    ├── FormatError (ValueError)       a file is not what its name says: truncated, corrupt, unknown
    ├── BackendError (RuntimeError)    an execution that was asked for by name cannot run here
    ├── MissingExtra (ImportError)     an optional package is not installed
    ├── CapacityError (RuntimeError)   no room: memory, disk, pages, context length
    └── VerifyError (AssertionError)   something that was checked is not equal

Each is also a builtin, so a caller who does not know us can still catch it by its kind.
"""

from __future__ import annotations

from typing import Any


class DeepseekError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(DeepseekError, ValueError):
    """A setting, argument or name is not one that can be used."""


class ShapeError(DeepseekError, ValueError):
    """A tensor has the wrong shape, dtype or device."""


class FormatError(DeepseekError, ValueError):
    """A file is not what its name says: truncated, corrupt, or of an unknown kind."""


class BackendError(DeepseekError, RuntimeError):
    """An execution that was asked for by name cannot run here."""


class MissingExtra(DeepseekError, ImportError):
    """An optional package is not installed."""


class CapacityError(DeepseekError, RuntimeError):
    """There is no room: memory, disk, cache pages or context length."""


class VerifyError(DeepseekError, AssertionError):
    """Something that was checked is not equal."""


def describe(name: str, owner: str, must: str, got: Any, next_step: str = "") -> str:
    """Return the one form of a user error: what, of whom, must be, got, next step.

    Args:
        name: the argument, field or file that is wrong.
        owner: who asked for it: a function, a config, a file.
        must: the constraint, continuing "must be".
        got: the value received; shown by `repr`, cut at 120 characters.
        next_step: what the user can do about it, without the final stop.
    """
    shown = repr(got)
    if len(shown) > 120:
        shown = shown[:117] + "..."
    message = f"{name} of {owner} must be {must}; got {shown}."
    return f"{message} {next_step}." if next_step else message


_OUT_OF_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "std::bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out: Python's own, or one of PyTorch's, which are
    known by their words."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(part in words for part in _OUT_OF_MEMORY)
    )


def missing_extra(package: str, extra: str, purpose: str) -> MissingExtra:
    """Return the error for an optional package that is not installed, with the pip line that cures
    it."""
    return MissingExtra(
        f"{package} is needed {purpose} and is not installed. "
        f'Install it with: pip install "deepseek-stack[{extra}]".'
    )
