"""The base of every configuration: frozen, keyword-only data with a version, checked when it is
read back."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, Union, cast, get_args, get_origin, get_type_hints

from deepseek.errors import ConfigError, describe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A frozen description of something that can be built or run.

    A subclass is a frozen, keyword-only dataclass whose fields are plain values (`str`, `int`,
    `float`, `bool`, `None`, tuples of these), `Literal` choices or other configs. `VERSION` is
    raised when the meaning of a field changes; a dictionary of a newer version is refused rather
    than half understood.
    """

    VERSION: ClassVar[int] = 1

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values, with the version."""
        values = {
            field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)
        }
        return {"version": self.VERSION, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the config that `to_dict` wrote.

        Raises:
            ConfigError: an unknown or missing field, a value of the wrong type, or a newer version.
        """
        given = dict(values)
        version = given.pop("version", cls.VERSION)
        if not isinstance(version, int) or version > cls.VERSION:
            must = f"at most {cls.VERSION}"
            raise ConfigError(
                describe("version", cls.__name__, must, version, "Upgrade deepseek-stack")
            )
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                step = f"Did you mean {near[0]!r}" if near else f"Known fields: {', '.join(known)}"
                raise ConfigError(describe("field", cls.__name__, "a known name", name, step))
        for name, field in known.items():
            if name not in given and _is_required(field):
                raise ConfigError(
                    describe(name, cls.__name__, "given", "nothing", f"Add the field {name!r}")
                )
        hints = get_type_hints(cls)
        return cls(
            **{name: _read(value, hints[name], name, cls.__name__) for name, value in given.items()}
        )

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in cast("Mapping[str, Any]", value).items()}
    return value


def _read(value: Any, hint: Any, name: str, owner: str) -> Any:
    """Return `value` as the type `hint` says, or raise a ConfigError with the field's name."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _read_union(value, hint, name, owner)
    if origin is Literal:
        if value not in get_args(hint):
            choices = ", ".join(repr(choice) for choice in get_args(hint))
            raise ConfigError(describe(name, owner, f"one of {choices}", value))
        return value
    if origin is tuple:
        return _read_tuple(value, get_args(hint), name, owner)
    if origin in (dict, Mapping) or hint is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(describe(name, owner, "a table of names and values", value))
        return dict(cast("Mapping[str, Any]", value))
    if isinstance(hint, type) and issubclass(hint, Config):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(describe(name, owner, f"the fields of a {hint.__name__}", value))
        return hint.from_dict(cast("Mapping[str, Any]", value))
    return _read_plain(cast("object", value), hint, name, owner)


def _read_plain(value: object, hint: Any, name: str, owner: str) -> object:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or _is_exactly(value, hint):
        return value
    raise ConfigError(describe(name, owner, f"of type {getattr(hint, '__name__', hint)}", value))


def _read_union(value: Any, hint: Any, name: str, owner: str) -> Any:
    choices = get_args(hint)
    if value is None and type(None) in choices:
        return None
    if isinstance(value, Mapping) and "kind" in value:
        return _read_kind(cast("Mapping[str, Any]", value), choices, name, owner)
    failure: ConfigError | None = None
    for choice in choices:
        if choice is type(None):
            continue
        try:
            return _read(value, choice, name, owner)
        except ConfigError as error:
            failure = error
    raise failure or ConfigError(describe(name, owner, f"of type {hint}", value))


def _read_kind(value: Mapping[str, Any], choices: Sequence[Any], name: str, owner: str) -> Any:
    """Return the config of a union whose field `kind` defaults to what is given."""
    kinds: dict[Any, Any] = {
        field.default: choice
        for choice in choices
        if isinstance(choice, type) and issubclass(choice, Config)
        for field in dataclasses.fields(choice)
        if field.name == "kind"
    }
    if value["kind"] not in kinds:
        must = f"one of {', '.join(map(repr, kinds))}"
        raise ConfigError(describe(f"kind of {name}", owner, must, value["kind"]))
    return _read(value, kinds[value["kind"]], name, owner)


def _read_tuple(value: Any, inner: tuple[Any, ...], name: str, owner: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(describe(name, owner, "a list", value))
    items = cast("Sequence[Any]", value)
    if len(inner) == 2 and inner[1] is Ellipsis:
        return tuple(_read(item, inner[0], name, owner) for item in items)
    if len(items) != len(inner):
        raise ConfigError(describe(name, owner, f"a list of {len(inner)}", items))
    return tuple(_read(item, kind, name, owner) for item, kind in zip(items, inner, strict=True))


def _is_exactly(value: Any, hint: Any) -> bool:
    if not isinstance(hint, type):
        return isinstance(hint, typing.TypeVar)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, hint)
