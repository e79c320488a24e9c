"""A folder of contents under names that the server makes: each is there whole, or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from deepseek.hub.atomic import writing

_ORPHAN_AGE_S = 3600
"""Another process may be about to enter a content that is younger than that."""


@dataclasses.dataclass(frozen=True)
class Staged:
    """A content that is on disk under its name, and not entered in a database yet."""

    id: str
    path: Path
    size_bytes: int


class ContentFolder:
    """Contents on disk. Who owns which is known elsewhere."""

    def __init__(self, folder: Path) -> None:
        """Take a folder, which is made where it is missing; nothing else may lie in it.

        Raises:
            ConfigError: the place cannot be written to.
        """
        self._folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, content_id: str) -> Path:
        """Return where a content lies; the id comes from `stage`, never from a client."""
        return self._folder / content_id

    @contextlib.contextmanager
    def stage(self, content: Iterable[bytes]) -> Iterator[Staged]:
        """Write a content to the disk under a new id; it is removed again where the block fails.

        Raises:
            CapacityError: the disk is full.
        """
        content_id = f"file-{secrets.token_hex(16)}"
        path, fresh = self._folder / content_id, self._folder / f".{content_id}.new"
        size = 0
        try:
            with writing(path):
                with open(
                    os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb"
                ) as file:
                    for part in content:
                        file.write(part)
                        size += len(part)
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(fresh, path)
                _sync(self._folder)
            yield Staged(content_id, path, size)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            fresh.unlink(missing_ok=True)

    def remove(self, ids: Iterable[str]) -> None:
        """Remove contents; one that is not there is no trouble."""
        for content_id in ids:
            self.path(content_id).unlink(missing_ok=True)

    def remove_orphans(self, known: Callable[[], set[str]]) -> None:
        """Remove what killed processes have left: old contents that are not among the known."""
        oldest = time.time() - _ORPHAN_AGE_S
        with os.scandir(self._folder) as entries:
            old = {entry.name for entry in entries if entry.stat().st_mtime < oldest}
        if old:
            self.remove(old - known())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
