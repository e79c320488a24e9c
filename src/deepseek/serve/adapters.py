"""Adapters by name: where they lie, which are loaded, and what stands for them in a request.

A client says a name and never a path. A loaded adapter has an id of its name and a fingerprint of
what its files hold. The id is what a request carries to the engine and what the cache of pages is
rooted in, so that another adapter loaded under an old name finds none of the old one's pages. What
runs or waits when its adapter is dropped is finished with it; the memory is given back behind the
last of these requests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import threading
from pathlib import Path

from deepseek.errors import CapacityError, ConfigError, describe
from deepseek.hub.adapter import read_adapter
from deepseek.serve.stepping import StepEngine

MAX_ADAPTERS = 32
MAX_BYTES = 1 << 30

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedAdapter:
    """An adapter that requests can use."""

    name: str
    id: str
    """What `GenerationRequest.adapter` holds: the name and a fingerprint of the content."""
    rank: int
    """The largest of its ranks."""
    num_weights: int
    """Weights that it stands beside."""
    num_bytes: int
    """Of its values."""
    base: str | None
    """What its files say that it was trained on."""


class AdapterRegistry:
    """Names of adapters, and those that are loaded into an engine. For any thread.

    Args:
        engine: computes with them.
        reference: of the same model, for audits: it gets every adapter as well; None for none.
        max_adapters: most that are loaded at a time.
        max_bytes: most bytes of all adapters in memory, those included that were dropped and are
            still in use.
    """

    def __init__(
        self,
        engine: StepEngine,
        reference: StepEngine | None = None,
        *,
        max_adapters: int = MAX_ADAPTERS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._engines = [engine] if reference is None else [engine, reference]
        self._max_adapters, self._max_bytes = max_adapters, max_bytes
        self._folders: dict[str, Path] = {}
        self._loaded: dict[str, LoadedAdapter] = {}
        self._changes = threading.Lock()

    def register(self, name: str, folder: Path) -> None:
        """Say where the adapter of a name lies. For whoever runs the server: a folder never comes
        from a client.

        Raises:
            ConfigError: the name is not one that a registry may hold.
        """
        if _NAME.fullmatch(name) is None:
            must = "up to 64 of a-z, 0-9, '.', '_' and '-', a letter or digit first"
            raise ConfigError(describe("name", "the adapter", must, name))
        self._folders[name] = folder

    def registered(self) -> list[str]:
        """Return all names that could be loaded, sorted."""
        return sorted(self._folders)

    def loaded(self) -> list[LoadedAdapter]:
        """Return the adapters that requests can use, sorted by name."""
        return sorted(self._loaded.copy().values(), key=lambda adapter: adapter.name)

    def load(self, name: str) -> LoadedAdapter:
        """Read an adapter's files and put it into the engine, while requests run.

        Raises:
            ConfigError: the name is not registered or is loaded already, or the adapter does not
                fit the engine's model.
            FormatError: its files are not an adapter that can be computed here.
            CapacityError: too many are loaded, or there is not enough memory.
        """
        folder = self._folders.get(name)
        if folder is None:
            raise ConfigError(describe("adapter", "the registry", "a name in it", name))
        with self._changes:
            return self._load(name, folder)

    def _load(self, name: str, folder: Path) -> LoadedAdapter:
        if name in self._loaded:
            step = "Drop it first to load its files anew"
            raise ConfigError(describe("adapter", "the registry", "not loaded yet", name, step))
        if len(self._loaded) >= self._max_adapters:
            must, got = f"at most {self._max_adapters}", len(self._loaded) + 1
            raise CapacityError(describe("adapters", "the registry", must, got, "Drop another"))
        adapter = read_adapter(folder, max_bytes=self._max_bytes - self._num_bytes)
        # half of the digest: nobody finds two adapters that share it
        known_by = f"{name}@{adapter.fingerprint[:32]}"
        with contextlib.ExitStack() as undo:
            for engine in self._engines:
                engine.add_adapter(known_by, adapter.updates)
                undo.callback(engine.drop_adapter, known_by)
            got = self._num_bytes
            if got > self._max_bytes:
                must = f"at most {self._max_bytes}"
                raise CapacityError(describe("bytes", "all adapters", must, got, "Drop another"))
            undo.pop_all()
        self._loaded[name] = LoadedAdapter(
            name=name,
            id=known_by,
            rank=adapter.rank,
            num_weights=len(adapter.updates),
            num_bytes=adapter.num_bytes,
            base=adapter.base,
        )
        return self._loaded[name]

    def drop(self, name: str) -> None:
        """Give an adapter to no more requests; those that have it are finished with it.

        Raises:
            ConfigError: it is not loaded.
        """
        with self._changes:
            adapter = self._loaded.pop(name, None)
            if adapter is None:
                must = "one that is loaded"
                raise ConfigError(describe("adapter", "the registry", must, name))
            for engine in self._engines:
                engine.drop_adapter(adapter.id)

    @property
    def _num_bytes(self) -> int:
        return sum(engine.adapter_bytes for engine in self._engines)

    def resolve(self, name: str) -> str:
        """Return the id of the adapter of a name, as a request carries it.

        Raises:
            ConfigError: it is not loaded.
        """
        adapter = self._loaded.get(name)
        if adapter is None:
            raise ConfigError(describe("adapter", "the request", "one that is loaded", name))
        return adapter.id
