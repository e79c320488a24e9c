"""Models that are held: loaded once, lent in turns, within a bound."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from deepseek import hub
from deepseek.engines import ModelCache, load_engine
from deepseek.errors import CapacityError, ConfigError
from deepseek.generate import Completion, Engine, generate
from deepseek.ops.cpu import why_missing
from tests.models.zoo import ours, reference

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))

MIB = 2**20


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    for name in "abc":
        hub.save(ours(reference("llama")), tmp_path / name)
    return [tmp_path / name for name in "abc"]


class Counted:
    """Loads, and remembers what."""

    def __init__(self) -> None:
        self.sources: list[str] = []

    def __call__(self, source: Any, **settings: Any) -> Engine | None:
        self.sources.append(Path(source).name)
        time.sleep(0.05)
        return load_engine(source, **settings)


def tokens(engine: Engine) -> tuple[int, ...]:
    found = generate(engine, [5, 7, 11], max_tokens=16, ignore_eos=True)
    assert isinstance(found, Completion)
    return found.token_ids


def test_many_threads_load_a_model_once_and_get_the_same(folders: list[Path]) -> None:
    load = Counted()
    cache = ModelCache(64 * MIB, threads=1, load=load)
    found: list[tuple[int, ...]] = []

    def work() -> None:
        for _ in range(3):
            with cache.borrow(folders[0], scheme="int8") as engine:
                found.append(tokens(engine))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert load.sources == ["a"]
    assert len(found) == 18 and len(set(found)) == 1


def test_what_was_unused_for_longest_goes(folders: list[Path]) -> None:
    load = Counted()
    cache = ModelCache(int(4.9 * MIB), threads=1, load=load)  # a load counts 2 MiB of slack
    for place in (0, 1, 0):
        with cache.borrow(folders[place], scheme="int8"):
            pass
    assert load.sources == ["a", "b"]
    cache.max_bytes = int(2.4 * MIB)
    with cache.borrow(folders[2], scheme="int8"):
        assert [name.split()[0][-1] for name in cache.names][-1] == "c"
    assert cache.num_bytes <= cache.max_bytes
    with cache.borrow(folders[0], scheme="int8"), cache.borrow(folders[2], scheme="int8"):
        pass
    assert load.sources[:3] == ["a", "b", "c"] and "b" not in load.sources[3:]


def test_what_is_in_use_stays_and_the_next_is_refused(folders: list[Path]) -> None:
    cache = ModelCache(int(2.3 * MIB), threads=1)
    with cache.borrow(folders[0], scheme="int8") as engine:
        before = tokens(engine)
        cache.max_bytes = int(2.2 * MIB)
        with pytest.raises(CapacityError, match="in use"), cache.borrow(folders[1], scheme="int8"):
            pass
        assert tokens(engine) == before
    with cache.borrow(folders[1], scheme="int8"):
        pass
    assert all(name.split()[0].endswith("b") for name in cache.names)


def test_schemes_are_models_of_their_own_and_a_changed_model_is_loaded_again(
    folders: list[Path],
) -> None:
    load = Counted()
    cache = ModelCache(64 * MIB, threads=1, load=load)
    for scheme in ("int8", "int4", None, "int8"):
        with cache.borrow(folders[0], scheme=scheme):
            pass
    assert len(load.sources) == 3
    changed = hub.load(folders[0])
    changed.model.layers[0].mlp.down_proj.weight.data.mul_(3)
    hub.save(changed, folders[0])
    with cache.borrow(folders[0], scheme="int8"):
        pass
    assert len(load.sources) == 4


def test_a_load_that_fails_leaves_nothing_and_wakes_who_waits(folders: list[Path]) -> None:
    def fail(*_: Any, **__: Any) -> Engine | None:
        time.sleep(0.05)
        raise OSError("gone")

    cache = ModelCache(64 * MIB, load=fail)
    failed: list[str] = []

    def work() -> None:
        try:
            with cache.borrow(folders[0]):
                pass
        except OSError as error:
            failed.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(timeout=10)
    assert failed == ["gone"] * 3 and cache.num_bytes == 0


def test_what_cannot_be_held_is_one_error(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_bytes"):
        ModelCache(0)
    with pytest.raises(CapacityError, match="weights of"), ModelCache(10).borrow(folders[0]):
        pass
    hub.save(ours(reference("deepseek-v3")), tmp_path / "latent")
    with pytest.raises(ConfigError, match="latent"), ModelCache(MIB).borrow(tmp_path / "latent"):
        pass
