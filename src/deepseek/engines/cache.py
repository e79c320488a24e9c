"""Engines held for all who ask for them: each loaded once, within a bound of bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek import hub
from deepseek.engines.facts import as_scheme, engine_facts
from deepseek.engines.loading import load_engine
from deepseek.errors import CapacityError, ConfigError, describe
from deepseek.ops.scheme import Scheme

if TYPE_CHECKING:
    from deepseek.generate import Engine

_Key = tuple[str, str, tuple[tuple[str, int, int], ...]]
"""Folder, scheme, and the files' names, sizes and times: a model that was changed is another."""


@dataclasses.dataclass(eq=False)
class _Held:
    """An engine, or the place of one that is being loaded."""

    num_bytes: int
    engine: Engine | None = None
    users: int = 1
    used: int = 0
    turn: threading.Lock = dataclasses.field(default_factory=threading.Lock)


class ModelCache:
    """Engines of several models in one process, for any number of threads.

    A model is loaded once, by the first who borrows it; the others wait for it. An engine runs one
    step at a time, so those who borrow the same one take turns. Where a new model needs room, those
    that nobody has go, the one unused for longest first.

    Args:
        max_bytes: most bytes of packed weights, of all engines together.
        threads: that compute; None for the cores that this process may use.
        load: loads an engine, as `load_engine`.

    Example:
        cache = ModelCache(512 * 2**20)
        with cache.borrow("smollm2-135m", scheme="int4") as engine:
            generate(engine, "The sea is")
    """

    def __init__(
        self,
        max_bytes: int,
        *,
        threads: int | None = None,
        load: Callable[..., Engine | None] = load_engine,
    ) -> None:
        if max_bytes < 1:
            raise ConfigError(describe("max_bytes", "ModelCache", "at least 1", max_bytes))
        self.max_bytes = max_bytes
        self._threads, self._load = threads, load
        self._held: dict[_Key, _Held] = {}
        self._changed = threading.Condition()
        self._clock = itertools.count(1)

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights of all engines that are held or being loaded."""
        with self._changed:
            return sum(each.num_bytes for each in self._held.values())

    @property
    def names(self) -> list[str]:
        """Folder and scheme of each engine that is held, what was used last first."""
        with self._changed:
            held = sorted(self._held.items(), key=lambda item: -item[1].used)
            return [f"{folder} {scheme}" for (folder, scheme, _), _ in held]

    @contextlib.contextmanager
    def borrow(self, source: str | Path, *, scheme: str | Scheme | None = None) -> Iterator[Engine]:
        """Yield the engine of a model, alone until the block ends.

        Args:
            source: as in `load_engine`.
            scheme: as in `load_engine`.

        Raises:
            CapacityError: it does not fit beside the engines that others have just now.
            ConfigError: a model that has no engine without torch, or an unknown name or scheme.
            FormatError: a folder that is not a whole model.
        """
        asked = as_scheme(scheme)
        held = self._take(source, asked)
        try:
            with held.turn:
                assert held.engine is not None
                yield held.engine
        finally:
            with self._changed:
                held.users -= 1
                held.used = next(self._clock)
                self._changed.notify_all()

    def _take(self, source: str | Path, scheme: Scheme | None) -> _Held:
        """Return the entry of a model, with its engine, counted as used."""
        needed = _needed_bytes(source, scheme)
        key = _key(source, scheme)
        with self._changed:
            while (held := self._held.get(key)) is not None:
                if held.engine is not None:
                    held.users += 1
                    return held
                self._changed.wait()
            self._make_room(key[0], needed)
            held = self._held[key] = _Held(needed)
        try:
            engine = self._load(source, scheme=scheme, threads=self._threads)
            if engine is None:
                raise _no_engine(source, "it runs through PyTorch")
        except BaseException:
            with self._changed:
                del self._held[key]
                self._changed.notify_all()
            raise
        with self._changed:
            held.engine, held.num_bytes = engine, engine.weight_bytes
            self._changed.notify_all()
        return held

    def _make_room(self, folder: str, needed: int) -> None:
        idle = sorted((each.used, key) for key, each in self._held.items() if not each.users)
        busy = sum(each.num_bytes for each in self._held.values() if each.users)
        if busy + needed > self.max_bytes:
            must = f"at most {self.max_bytes - busy:,} bytes, with {busy:,} in use"
            step = "Wait until others are given back, or raise max_bytes"
            raise CapacityError(describe("weights", folder, must, needed, step))
        for _, key in idle:
            if sum(each.num_bytes for each in self._held.values()) + needed <= self.max_bytes:
                return
            del self._held[key]


def _needed_bytes(source: str | Path, scheme: Scheme | None) -> int:
    """Return what the packed weights of a model take, before they are read."""
    from deepseek.engines.facts import weights_of
    from deepseek.generate.footprint import engine_footprint
    from deepseek.hub.bundle import Bundle
    from deepseek.models.config import DecoderConfig

    facts = engine_facts(source, scheme=scheme)
    path = hub.resolve(source)
    if facts.reason or facts.scheme is None or not isinstance(facts.config, DecoderConfig):
        raise _no_engine(source, facts.reason or "it is no decoder")
    if path.is_file():
        raise _no_engine(source, "it is one file, which PyTorch reads")
    weights = weights_of(Bundle.open(path), facts.config)
    found = engine_footprint(facts.config, weights, facts.scheme, rows=1, context=1, threads=1)
    return found.weights_bytes


def _no_engine(source: str | Path, reason: str) -> ConfigError:
    must = "one that has an engine without torch"
    return ConfigError(describe("model", "ModelCache", must, f"{source}: {reason}"))


def _key(source: str | Path, scheme: Scheme | None) -> _Key:
    folder = hub.resolve(source).resolve()
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    state = [(path.name, path.stat()) for path in files if path.is_file()]
    name = "as stored" if scheme is None else repr(scheme)
    return str(folder), name, tuple((each, s.st_size, s.st_mtime_ns) for each, s in state)
