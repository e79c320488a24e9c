"""Folders change all at once: whatever fails or is killed, the old or the new one is whole."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deepseek.errors import CapacityError, ConfigError
from deepseek.hub import atomic
from deepseek.hub.atomic import clean, files_in, locked, recover, replace_file, replace_folder

STEPS = ["mkdir", "open", "fsync", "rename", "link", "chmod", "walk"]


def write_all(target: Path, content: str, keep: Callable[[str], bool] = lambda name: False) -> None:
    with replace_folder(target, keep) as fresh:
        (fresh / "a").write_text(content)
        (fresh / "sub").mkdir()
        (fresh / "sub" / "b").write_text(content)


def content(target: Path) -> str:
    """Return what both files hold; they must agree."""
    both = {(target / "a").read_text(), (target / "sub" / "b").read_text()}
    assert len(both) == 1
    return both.pop()


def leftovers(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if path.name.startswith(".")]


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    return request.param


def test_a_folder_is_made_and_replaced(tmp_path: Path, way: str) -> None:
    target = tmp_path / "deep" / "model"
    for text in ("one", "two"):
        write_all(target, text)
        assert content(target) == text
        assert leftovers(target.parent) == []
    assert (target / "a").stat().st_mode & 0o777 == 0o666 & ~umask()
    assert target.stat().st_mode & 0o777 == 0o777 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_exchange_works_here_or_says_so(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if atomic._exchange(tmp_path / "a", tmp_path / "b"):
        assert (tmp_path / "a" / "b").exists()
    else:
        assert (tmp_path / "a" / "a").exists()


def test_an_error_inside_changes_nothing(tmp_path: Path, way: str) -> None:
    target = tmp_path / "model"
    write_all(target, "old")
    with pytest.raises(KeyError), replace_folder(target) as fresh:
        (fresh / "a").write_text("half")
        raise KeyError
    assert content(target) == "old"
    assert leftovers(tmp_path) == []


def test_kept_files_move_along(tmp_path: Path, way: str) -> None:
    target = tmp_path / "model"
    write_all(target, "old")
    (target / "notes.txt").write_text("mine")
    (target / "deep").mkdir()
    (target / "deep" / "er").write_text("mine too")
    (target / "link").symlink_to("notes.txt")
    target.chmod(0o750)
    write_all(target, "new", keep=lambda name: name not in ("a", "sub/b"))
    assert content(target) == "new"
    assert (target / "notes.txt").read_text() == "mine"
    assert (target / "deep" / "er").read_text() == "mine too"
    assert (target / "link").readlink() == Path("notes.txt")
    assert target.stat().st_mode & 0o777 == 0o750


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    write_all(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write_all(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == "new"


class FailingOS:
    """Stands for `os` and fails at the n-th call of the functions that touch the disk."""

    def __init__(self, fail_at: int, code: int = errno.EIO) -> None:
        self.calls, self.fail_at, self.code = 0, fail_at, code

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in STEPS:
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.fail_at:
                raise OSError(self.code, os.strerror(self.code))
            return real(*args, **kwargs)

        return call


def failing_runs(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[], None]
) -> Iterator[OSError | None]:
    """Run with a failure at the first step, the second, and so on until a run has fewer steps."""
    for fail_at in range(1, 200):
        broken = FailingOS(fail_at)
        monkeypatch.setattr(atomic, "os", broken)
        try:
            run()
        except OSError as error:
            yield error
        else:
            yield None
        monkeypatch.setattr(atomic, "os", os)
        if broken.calls < fail_at:
            return
    raise AssertionError("too many steps")


def test_failure_at_any_step_leaves_one_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    target = tmp_path / "model"
    write_all(target, "old")
    (target / "notes").write_text("mine")
    failures, number = 0, 0

    def run() -> None:
        nonlocal number
        number += 1
        write_all(target, str(number), keep=lambda name: name == "notes")

    for failure in failing_runs(monkeypatch, run):
        recover(target)
        found = content(target)
        assert (target / "notes").read_text() == "mine"
        if failure is None:
            assert found == str(number)
        failures += failure is not None
    assert failures >= 10
    write_all(target, "last")
    assert leftovers(tmp_path) == []


KILLED = """
import itertools, os, signal, sys
from pathlib import Path
from deepseek.hub import atomic

target = Path(sys.argv[1])
watched = {"mkdir", "open", "fsync", "rename", "link", "chmod", "unlink", "rmdir", "write", "close"}
if sys.argv[2] == "two renames":
    atomic._exchange = lambda first, second: False

def run(text, kill_at):
    calls = 0
    def trace(frame, event, function):
        nonlocal calls
        if event == "c_call" and getattr(function, "__name__", "") in watched:
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(trace)
    with atomic.replace_folder(target, lambda name: name == "notes") as fresh:
        (fresh / "a").write_text(text)
        (fresh / "sub").mkdir()
        (fresh / "sub" / "b").write_text(text)
    sys.setprofile(None)
    if calls < kill_at:
        print("whole", flush=True)

for kill_at in itertools.count(1):
    child = os.fork()
    if child == 0:
        run(str(kill_at), kill_at)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    atomic.recover(target)
    both = {(target / "a").read_text(), (target / "sub" / "b").read_text()}
    assert len(both) == 1, both
    assert (target / "notes").read_text() == "mine"
    if not os.WIFSIGNALED(status):
        assert status == 0 and both == {str(kill_at)}, status
        break
print(kill_at)
"""


@pytest.mark.parametrize("kind", ["exchange", "two renames"])
def test_a_kill_at_any_moment_leaves_one_whole_folder(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "model"
    write_all(target, "old")
    (target / "notes").write_text("mine")
    command = [sys.executable, "-c", KILLED, str(target), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 20
    write_all(target, "last", keep=lambda name: name == "notes")
    assert leftovers(tmp_path) == []
    assert content(target) == "last"


def test_a_full_disk_is_a_capacity_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    write_all(target, "old")
    for code in (errno.ENOSPC, errno.EDQUOT):
        monkeypatch.setattr(atomic, "os", FailingOS(3, code))
        with pytest.raises(CapacityError, match=r"Free some space"):
            write_all(target, "new")
        monkeypatch.setattr(atomic, "os", os)
        assert content(target) == "old"
        assert leftovers(tmp_path) == []


def test_a_file_that_may_not_grow_is_a_capacity_error(tmp_path: Path) -> None:
    target = tmp_path / "model"
    write_all(target, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(CapacityError), replace_folder(target) as fresh:
            (fresh / "a").write_bytes(b"x" * 20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(target) == "old"
    assert leftovers(tmp_path) == []


def test_a_place_that_cannot_be_written_to_is_a_config_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="can be written to"):
        write_all(tmp_path / "file" / "model", "new")
    monkeypatch.setattr(atomic, "os", FailingOS(1, errno.EACCES))
    with pytest.raises(ConfigError, match="can be written to"):
        write_all(tmp_path / "model", "new")


def test_what_a_living_writer_has_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with replace_folder(target) as fresh:
        (fresh / "a").write_text("slow")
        (tmp_path / ".model.new-dead").mkdir()
        (tmp_path / ".model.old-dead").mkdir()
        (tmp_path / ".models.new-dead").mkdir()
        clean(target)
        assert sorted(leftovers(tmp_path)) == sorted([fresh.name, ".models.new-dead"])
    assert (target / "a").read_text() == "slow"


def test_a_cut_off_replacement_is_undone(tmp_path: Path) -> None:
    write_all(tmp_path / "model", "old")
    (tmp_path / "model").rename(tmp_path / ".model.old-dead")
    (tmp_path / ".model.new-dead").mkdir()
    recover(tmp_path / "model")
    assert content(tmp_path / "model") == "old"
    write_all(tmp_path / "model", "new")
    assert leftovers(tmp_path) == []


def test_names_with_signs_of_patterns(tmp_path: Path) -> None:
    target = tmp_path / "m[1]*?"
    (tmp_path / ".m1x.new-dead").mkdir()
    write_all(target, "one")
    write_all(target, "two")
    assert content(target) == "two"
    assert leftovers(tmp_path) == [".m1x.new-dead"]


def test_a_file_is_replaced_or_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "card"
    replace_file(path, b"old")
    for code, expected in ((errno.ENOSPC, CapacityError), (errno.EIO, OSError)):
        monkeypatch.setattr(atomic, "os", FailingOS(1, code))
        with pytest.raises(expected):
            replace_file(path, b"new")
        monkeypatch.setattr(atomic, "os", os)
        assert path.read_bytes() == b"old"
        assert leftovers(tmp_path) == []


def test_locks_exclude_other_processes(tmp_path: Path) -> None:
    log, lock = tmp_path / "log", tmp_path / "lock"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom deepseek.hub.atomic import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    with open(sys.argv[2], 'a') as file:\n"
        "        file.write('in '); file.flush(); time.sleep(0.1); file.write('out ')\n"
    )
    command = [sys.executable, "-c", code, str(lock), str(log)]
    running = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert log.read_text().split() == ["in", "out"] * 3
    with locked(tmp_path):
        pass


def test_files_are_listed_with_links_but_not_through_them(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").touch()
    (tmp_path / "a").touch()
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert list(files_in(tmp_path)) == ["a", "loop", "sub/b"]


def test_json_of_a_card_survives_a_concurrent_reader(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    for number in range(50):
        replace_file(path, json.dumps({"n": number}).encode())
        assert json.loads(path.read_text())["n"] == number
