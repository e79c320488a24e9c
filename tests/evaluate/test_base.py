"""Commands name a model so that another process finds it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from deepseek.evaluate.base import address_of, repeat_command


def bundle_in(folder: Path) -> object:
    """Return a stand-in for a model that was loaded from a folder."""
    folder.mkdir(parents=True)
    for name in ("config.json", "bundle.json"):
        (folder / name).write_text("{}")
    return SimpleNamespace(bundle=SimpleNamespace(path=folder))


def test_a_stored_model_is_named_and_another_has_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "store"))
    assert address_of(bundle_in(tmp_path / "store" / "bundles" / "mine")) == "mine"
    assert address_of(bundle_in(tmp_path / "other")) == str(tmp_path / "other")
    assert (
        address_of(SimpleNamespace(config=SimpleNamespace(_name_or_path="org/name"))) == "org/name"
    )
    assert address_of(lambda ids: ids) is None


def test_commands_are_quoted_and_leave_out_what_is_unset() -> None:
    flags = {"text": "my text", "window": None, "lengths": (1, 2), "seed": 0}
    assert repeat_command(lambda ids: ids, "needle", flags) == (
        "deepseek eval MODEL --tasks needle --text 'my text' --lengths 1 2 --seed 0"
    )
