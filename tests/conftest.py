"""What every test stands on: fixed seeds, a clean environment, and real models pulled once."""

from __future__ import annotations

import getpass
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REQUIRE_MODELS = "DEEPSEEK_REQUIRE_MODELS"
"""Continuous integration sets it: there a model that cannot be fetched is a failure, not a skip."""

TEST_POSTGRES = "DEEPSEEK_TEST_POSTGRES"
"""URL of an empty PostgreSQL database for the tests, where Debian's server is not installed."""

KEPT_SETTINGS = frozenset({"DEEPSEEK_HOME", REQUIRE_MODELS, TEST_POSTGRES})
"""The store is the user's own, so that models are not fetched again for every run."""


def pytest_configure() -> None:
    """Set what must be in place before torch or a hub client is imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for name in stray_settings():
        del os.environ[name]
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Workers share the cores, and so do the processes that tests start: with more threads each
        # would wait for the others.
        os.environ["OMP_NUM_THREADS"] = "1"


def stray_settings() -> list[str]:
    """Return the variables of this package that a test must not see."""
    return [
        name for name in os.environ if name.startswith("DEEPSEEK_") and name not in KEPT_SETTINGS
    ]


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start every test from the same random numbers."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
        if "PYTEST_XDIST_WORKER" in os.environ:
            # Workers share the cores: with more threads each would wait for the others.
            sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_environment() -> Iterator[None]:
    """Give back the environment and the working directory as they were before the test."""
    before, folder = dict(os.environ), Path.cwd()
    yield
    os.chdir(folder)
    for name in set(os.environ) - set(before):
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def packed_weights_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Keep the packed weights of tests' models out of the user's store."""
    place = tmp_path_factory.getbasetemp() / "packed"
    monkeypatch.setattr("deepseek.hub.packed.packed_folder", lambda: place)


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """Return the bundle folder of SmolLM2-135M-Instruct, pulled into the user's store once."""
    return pulled("smollm2-135m")


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """Return the bundle folder of all-MiniLM-L6-v2, pulled into the user's store once."""
    return pulled("all-minilm-l6-v2")


def pulled(name: str) -> Path:
    """Return the folder of a bundle in the store; the first worker to ask pulls it, others wait."""
    hub = pytest.importorskip("deepseek.hub", exc_type=ModuleNotFoundError)
    from filelock import FileLock

    from deepseek.errors import DeepseekError

    lock = Path(tempfile.gettempdir()) / f"deepseek-tests-{getpass.getuser()}-{name}.lock"
    with FileLock(lock):
        try:
            return Path(hub.pull(name).path)
        except DeepseekError as error:
            if os.environ.get(REQUIRE_MODELS, "0") not in ("", "0"):
                raise
            pytest.skip(f"{name} could not be fetched: {error}")
