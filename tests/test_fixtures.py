"""The ground tests stand on: a clean environment, and models that are there or said missing."""

from __future__ import annotations

import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

import deepseek.hub
from deepseek.errors import ConfigError
from tests import conftest


def unreachable(name: str) -> None:
    """Stand in for `hub.pull` on a machine without its sources."""
    raise ConfigError(f"{name} cannot be reached")


def test_missing_model_skips_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepseek.hub, "pull", unreachable)
    monkeypatch.delenv(conftest.REQUIRE_MODELS, raising=False)
    with pytest.raises(pytest.skip.Exception, match="no-such-model cannot be reached"):
        conftest.pulled("no-such-model")


def test_missing_model_fails_where_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepseek.hub, "pull", unreachable)
    monkeypatch.setenv(conftest.REQUIRE_MODELS, "1")
    with pytest.raises(ConfigError):
        conftest.pulled("no-such-model")


def test_error_of_our_own_is_not_a_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise TypeError(name)

    monkeypatch.setattr(deepseek.hub, "pull", broken)
    with pytest.raises(TypeError):
        conftest.pulled("no-such-model")


def test_pulled_returns_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(deepseek.hub, "pull", lambda name: SimpleNamespace(path=tmp_path / name))
    assert conftest.pulled("some-model") == tmp_path / "some-model"


def test_settings_of_the_package_do_not_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert conftest.stray_settings() == []
    monkeypatch.setenv("DEEPSEEK_PLANTED", "1")
    assert conftest.stray_settings() == ["DEEPSEEK_PLANTED"]
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("turn", [1, 2])
def test_seeds_and_environment_are_fresh(turn: int) -> None:
    assert random.random() == random.Random(0).random()
    assert "DEEPSEEK_TURN" not in os.environ
    os.environ["DEEPSEEK_TURN"] = str(turn)
