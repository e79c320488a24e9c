"""Configurations from files: YAML, or Python with a function that returns one."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any, TypeVar

from deepseek.config import Config
from deepseek.errors import ConfigError, FormatError, describe

Kind = TypeVar("Kind", bound=Config)


def read_config(path: str | Path, kind: type[Kind], *, function: str, owner: str) -> Kind:
    """Return the configuration in a file.

    Args:
        path: of a `.yaml`, or of a `.py` with a function that returns a `kind`.
        kind: what it must be.
        function: the function's name, and what the file is called in errors.
        owner: who asks, for errors.

    Raises:
        ConfigError: there is no such file, or what is in it is none.
        FormatError: it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        step = f"Give a .yaml file, or a .py file with a function `{function}`"
        raise ConfigError(describe(function, owner, "a file", str(path), step))
    if path.suffix == ".py":
        return _from_python(path, kind, function)
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(path, kind, function)
    raise ConfigError(describe(function, owner, "a .yaml or .py file", path.name))


def _from_yaml(path: Path, kind: type[Kind], function: str) -> Kind:
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads 1e-3 as a number, which YAML 1.1 takes for a word."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )
    try:
        values: Any = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        words = " ".join(str(error).split())
        raise FormatError(describe(function, str(path), "YAML", words)) from error
    if not isinstance(values, dict):
        raise FormatError(describe(function, str(path), f"the fields of a {kind.__name__}", values))
    return kind.from_dict(values)


def _from_python(path: Path, kind: type[Kind], function: str) -> Kind:
    spec = importlib.util.spec_from_file_location(f"deepseek_{function}_file", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        made = getattr(module, function)()
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        must = f"a file whose `{function}()` works"
        raise ConfigError(describe(function, str(path), must, got)) from error
    if not isinstance(made, kind):
        must = f"a {kind.__module__.rpartition('.')[0]}.{kind.__name__}"
        raise ConfigError(describe(f"{function}()", str(path), must, made))
    return made
