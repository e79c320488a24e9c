"""Folders and files that change all at once: a kill, a full disk or a power cut leaves the old one
or the new one whole.

A new folder is written beside the old one under a hidden name, brought to the disk, and then the
two names are exchanged in one step of the file system (`renameat2` with `RENAME_EXCHANGE`, Linux).
Where that
step does not exist, two renames follow each other, and whoever comes next finishes or undoes them
(`recover`).

Hidden names: `.NAME.new-*` is being written or, after the exchange, is the old folder;
`.NAME.old-*` is the old folder between two renames. Who works on one holds a lock on it, so what is
not locked was left by a
process that died.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from deepseek.errors import CapacityError, ConfigError, describe

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (
    errno.EACCES,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


@contextlib.contextmanager
def replace_folder(
    target: Path, keep: Callable[[str], bool] = lambda name: False
) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `target` when the block ends without an error.

    Args:
        target: the folder to make or to replace; its parents are made where they are missing.
        keep: says of a path in the old folder (relative, with `/`) whether the new one keeps that
            file.

    Raises:
        CapacityError: the disk is full; `target` is as it was.
        ConfigError: the place cannot be written to.
    """
    target = Path(os.path.realpath(target))
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(target)
        clean(target)
        with _held_folder(target) as fresh:
            try:
                yield fresh
                _sync_tree(fresh)
                with locked(target.parent):
                    _carry_over(target, fresh, keep)
                    leftover = _swap(fresh, target)
            except BaseException:
                shutil.rmtree(fresh, ignore_errors=True)
                raise
            if leftover is not None:
                shutil.rmtree(leftover, ignore_errors=True)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that its name holds the old content or the new one, whatever happens.

    Raises:
        CapacityError: the disk is full; the old content is there.
        ConfigError: the place cannot be written to.
    """
    fresh = path.with_name(f".{path.name}.new-{os.urandom(4).hex()}")
    with writing(path):
        try:
            with fresh.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
            _sync(path.parent)
        finally:
            fresh.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn the errors of a file system into ours: a full disk is a CapacityError, a closed door a
    ConfigError.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            got, step = error.strerror, "Free some space or choose another disk"
            raise CapacityError(describe("disk", str(target), "large enough", got, step)) from error
        if error.errno in _CLOSED:
            got = error.strerror
            raise ConfigError(
                describe("folder", str(target), "one that can be written to", got)
            ) from error
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file or folder, waiting for whoever has it; a dead process holds
    none.

    Args:
        path: an existing folder, or a file, which is made where it is missing.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    handle = os.open(path, flags, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def recover(target: Path) -> None:
    """Bring back a folder whose replacement was cut off between two renames, if one was."""
    target = Path(os.path.realpath(target))
    if target.exists() or not any(_hidden(target, "old")):
        return
    with locked(target.parent):
        left = sorted(_hidden(target, "old"))
        if left and not target.exists():
            os.rename(left[0], target)


def clean(target: Path) -> None:
    """Remove what writers of `target` that died have left beside it."""
    for folder in [*_hidden(target, "new"), *_hidden(target, "old")]:
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


@contextlib.contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """Yield an empty folder in `parent` that is gone afterwards; those of processes that died go as
    well.
    """
    target = parent / name
    parent.mkdir(parents=True, exist_ok=True)
    clean(target)
    with _held_folder(target) as folder:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def files_in(folder: Path) -> Iterator[str]:
    """Yield the path of every file in a folder, relative, with `/`, sorted; links to folders are
    not followed.
    """
    for root, folders, names in os.walk(folder):
        folders.sort()
        linked = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in sorted([*names, *linked]):
            yield Path(root, name).relative_to(folder).as_posix()


def _hidden(target: Path, kind: str) -> Iterable[Path]:
    return target.parent.glob(f".{_quoted(target.name)}.{kind}-*") if target.parent.is_dir() else ()


def _quoted(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


@contextlib.contextmanager
def _held_folder(target: Path) -> Iterator[Path]:
    """Make `.NAME.new-*` and hold its lock. A cleaner that comes between making and locking makes
    us try again.
    """
    while True:
        folder = target.with_name(f".{target.name}.new-{os.urandom(4).hex()}")
        os.mkdir(folder)
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(handle, fcntl.LOCK_EX)
        if folder.exists():
            break
        os.close(handle)
    try:
        yield folder
    finally:
        os.close(handle)


def _carry_over(target: Path, fresh: Path, keep: Callable[[str], bool]) -> None:
    """Link the files to keep into the new folder (copy where links do not work), and take over the
    folder's mode.
    """
    if not target.is_dir():
        return
    os.chmod(fresh, stat.S_IMODE(target.stat().st_mode))
    for name in files_in(target):
        source, place = target / name, fresh / name
        if not keep(name) or os.path.lexists(place):
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, place, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, place, follow_symlinks=False)
    for root, _, _ in os.walk(fresh):
        _sync(Path(root))


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            if not os.path.islink(os.path.join(root, name)):
                _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(fresh: Path, target: Path) -> Path | None:
    """Give the new folder its name and return where the old one is now, if there was one."""
    leftover: Path | None = fresh
    if not target.exists():
        os.rename(fresh, target)
        leftover = None
    elif not _exchange(fresh, target):
        leftover = target.with_name(fresh.name.replace(".new-", ".old-"))
        os.rename(target, leftover)
        try:
            os.rename(fresh, target)
        except BaseException:
            os.rename(leftover, target)
            raise
    _sync(target.parent)
    return leftover


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    failed = library.renameat2(
        _AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE
    )
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))
