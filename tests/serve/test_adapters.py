"""Adapters by name: loaded and dropped while requests run, several in one step, none by a path."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from deepseek.errors import CapacityError, ConfigError, FormatError
from deepseek.generate import Engine
from deepseek.generate.modules import engine_of
from deepseek.hub.adapter import WEIGHTS
from deepseek.models import Decoder
from deepseek.serve.adapters import AdapterRegistry
from deepseek.serve.core.request import Request, Work
from deepseek.serve.generation import GenerationRequest
from deepseek.serve.runtime.engine_executor import EngineExecutor
from tests.generate.conftest import TINY
from tests.ops.native import NEEDS_KERNELS
from tests.serve.adapter_files import write_adapter

pytestmark = NEEDS_KERNELS

PROMPT = tuple(range(40, 60))


@pytest.fixture
def engine() -> Engine:
    """Return an engine of its own: adapters change it."""
    torch.manual_seed(1)
    engine = engine_of(Decoder(TINY).eval())
    assert engine is not None
    return engine


@pytest.fixture
def registry(engine: Engine, tmp_path: Path) -> AdapterRegistry:
    """Return a registry of the adapters `one` and `two`, neither of them loaded."""
    registry = AdapterRegistry(engine)
    for seed, name in enumerate(("one", "two")):
        registry.register(name, write_adapter(tmp_path / name, seed))
    return registry


class Running:
    """A request under way on an executor, greedy, on a page of its own."""

    def __init__(self, executor: EngineExecutor, name: str, page: int, adapter: str | None) -> None:
        self.executor, self.page = executor, page
        self.request = Request(id=name, prompt=PROMPT, max_tokens=20, adapter=adapter)
        generation = GenerationRequest(prompt=PROMPT, max_tokens=20, adapter=adapter)
        executor.open(name, generation)

    def work(self) -> Work:
        start = self.request.num_computed
        tokens = tuple(self.request.tokens[start:])
        self.request.num_computed = len(self.request.tokens)
        return Work(self.request, start, tokens, 0, (self.page,))

    def take(self, token: int) -> None:
        self.request.tokens.append(token)

    @property
    def answer(self) -> list[int]:
        return self.request.tokens[len(PROMPT) :]


def advance(*running: Running) -> None:
    results = running[0].executor.execute([each.work() for each in running])
    for each, result in zip(running, results, strict=True):
        each.take(result.tokens[0].token_id)


def alone(engine: Engine, adapter: str | None, count: int = 10) -> list[int]:
    running = Running(EngineExecutor(engine, 1), "alone", 0, adapter)
    for _ in range(count):
        advance(running)
    return running.answer


def test_requests_of_different_adapters_share_steps(
    engine: Engine, registry: AdapterRegistry
) -> None:
    ids = [None, registry.load("one").id, registry.load("two").id]
    expected = [alone(engine, each) for each in ids]
    assert len({tuple(each) for each in expected}) == 3
    executor = EngineExecutor(engine, 6)
    running = [Running(executor, f"r{page}", page, ids[page % 3]) for page in range(6)]
    advance(*running[:4])  # the others come a step later
    for _ in range(9):
        advance(*running)
    advance(*running[4:])
    for page, each in enumerate(running):
        assert each.answer == expected[page % 3]


def test_what_is_dropped_is_finished_and_then_given_back(
    engine: Engine, registry: AdapterRegistry
) -> None:
    executor, adapter = EngineExecutor(engine, 2), registry.load("one")
    expected = alone(engine, adapter.id)
    running = Running(executor, "old", 0, adapter.id)
    for _ in range(4):
        advance(running)
    registry.drop("one")
    assert registry.loaded() == [] and engine.adapter_bytes > 0
    with pytest.raises(ConfigError, match="one that is loaded"):
        Running(executor, "late", 1, adapter.id)
    for _ in range(6):
        advance(running)
    assert running.answer == expected
    executor.close("old")
    assert engine.adapter_bytes == 0


def test_new_files_under_an_old_name_have_an_id_of_their_own(
    engine: Engine, registry: AdapterRegistry, tmp_path: Path
) -> None:
    """The id is the root of the cache: pages of the old adapter are not found again."""
    old = registry.load("one")
    executor = EngineExecutor(engine, 2)
    running = Running(executor, "old", 0, old.id)
    expected = alone(engine, old.id)
    registry.drop("one")
    write_adapter(tmp_path / "one", 7)
    new = registry.load("one")
    assert new.name == old.name and new.id != old.id
    assert registry.resolve("one") == new.id
    fresh = Running(executor, "new", 1, new.id)
    for _ in range(10):
        advance(running, fresh)
    assert running.answer == expected
    assert fresh.answer == alone(engine, new.id) != expected
    registry.drop("one")
    write_adapter(tmp_path / "one", 0)
    assert registry.load("one").id == old.id


def test_an_unknown_adapter_is_refused_when_a_request_is_opened(
    engine: Engine, registry: AdapterRegistry
) -> None:
    registry.load("one")
    for name in ("two", "one", "", "../one", registry.resolve("one") + "0"):
        with pytest.raises(ConfigError, match="one that is loaded"):
            Running(EngineExecutor(engine, 1), "r", 0, name)


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../one", "/etc", "a/b", "a\\b", "A", "-a", "_a", ".a", "a b", "a\n", "ä"),
        *("a" * 65, "one\x00", "one@1", "file:one", "~", "%2e%2e"),
    ],
)
def test_names_that_are_no_ids_are_refused_everywhere(
    name: str, registry: AdapterRegistry, tmp_path: Path
) -> None:
    """A folder of an adapter lies where the name, taken as a path, would point."""
    with pytest.raises(ConfigError, match="must be up to 64"):
        registry.register(name, tmp_path / "one")
    for use in (registry.load, registry.drop, registry.resolve):
        with pytest.raises(ConfigError):
            use(name)
    assert registry.registered() == ["one", "two"] and registry.loaded() == []


@pytest.mark.parametrize("name", ["a", "0", "a.b-c_d", "a" * 64, "a..b"])
def test_names_that_are_ids(name: str, registry: AdapterRegistry, tmp_path: Path) -> None:
    registry.register(name, tmp_path / "one")
    assert registry.load(name).id.startswith(f"{name}@")


def test_a_list_says_what_is_loaded(registry: AdapterRegistry) -> None:
    registry.load("two")
    registry.load("one")
    one, two = registry.loaded()
    assert (one.name, two.name) == ("one", "two")
    assert (one.rank, one.num_weights, one.base) == (4, 4, None)
    assert one.num_bytes == 2 * 4 * 4 * (32 + 32 + 48 + 32)


def test_mistakes_in_the_order_of_loading(registry: AdapterRegistry) -> None:
    with pytest.raises(ConfigError, match="a name in it"):
        registry.load("three")
    with pytest.raises(ConfigError, match="one that is loaded"):
        registry.drop("one")
    registry.load("one")
    with pytest.raises(ConfigError, match="not loaded yet"):
        registry.load("one")


def test_limits_of_number_and_bytes(
    engine: Engine, registry: AdapterRegistry, tmp_path: Path
) -> None:
    first = registry.load("one")
    held = engine.adapter_bytes
    few = AdapterRegistry(engine, max_adapters=1)
    few.register("x", tmp_path / "one")
    few.register("y", tmp_path / "two")
    few.load("x")
    with pytest.raises(CapacityError, match="at most 1"):
        few.load("y")
    few.drop("x")
    # what is dropped and still in use counts
    tight = AdapterRegistry(engine, max_bytes=2 * held)
    tight.register("y", tmp_path / "two")
    executor = EngineExecutor(engine, 1)
    Running(executor, "r", 0, first.id)
    registry.drop("one")
    tight.load("y")
    tight.drop("y")
    # the file fits by its values alone, not with what the engine needs around them
    for spare, words in ((first.num_bytes - 1, "values of"), (first.num_bytes, "all adapters")):
        tight = AdapterRegistry(engine, max_bytes=held + spare)
        tight.register("y", tmp_path / "two")
        with pytest.raises(CapacityError, match=words):
            tight.load("y")
        assert engine.adapter_bytes == held and tight.loaded() == []
    executor.close("r")
    assert engine.adapter_bytes == 0


def test_files_that_are_bad_change_nothing(
    engine: Engine, registry: AdapterRegistry, tmp_path: Path
) -> None:
    path = tmp_path / "one" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError):
        registry.load("one")
    assert registry.loaded() == [] and engine.adapter_bytes == 0 and not engine.adapters


def test_loading_and_dropping_beside_steps_changes_no_bit(
    engine: Engine, registry: AdapterRegistry
) -> None:
    """One thread runs steps, another loads and drops without end."""
    one = registry.load("one")
    expected = [alone(engine, None, 20), alone(engine, one.id, 20)]
    failures: list[BaseException] = []

    def come_and_go() -> None:
        try:
            for _ in range(30):
                registry.load("two")
                registry.drop("two")
        except BaseException as error:
            failures.append(error)

    other = threading.Thread(target=come_and_go)
    other.start()
    rounds = 0
    while other.is_alive() or not rounds:
        assert [alone(engine, None, 20), alone(engine, one.id, 20)] == expected
        rounds += 1
    other.join()
    assert not failures and registry.loaded() == [one]
