"""A power cut at any moment of applying a package, or of going back, leaves the old version or the
new one whole; and little memory is needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deepseek.export.delta import apply_delta, make_delta, make_keys
from deepseek.hub import Bundle, atomic
from deepseek.hub.bundle import card_bytes, make_card
from tests.export.delta_bundles import Case, contents, make_case

# A child is killed before its n-th call into the system, for growing n, until it comes through.
EVERY_STEP = """
import itertools, os, signal, sys
from pathlib import Path
from deepseek.export.delta import apply_delta, rollback
from deepseek.hub import Bundle, atomic

package, device, trust, old, new, kind, what, stride = sys.argv[1:]
watched = {"mkdir", "open", "fsync", "rename", "replace", "link", "chmod", "unlink", "rmdir",
           "write", "close"}
if kind == "two renames":
    atomic._exchange = lambda first, second: False

def run(kill_at):
    calls = 0
    def trace(frame, event, function):
        nonlocal calls
        if event == "c_call" and getattr(function, "__name__", "") in watched:
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(trace)
    apply_delta(package, device, trust) if what == "apply" else rollback(device)
    sys.setprofile(None)

seen = set()
for kill_at in itertools.count(1, int(stride)):
    child = os.fork()
    if child == 0:
        run(kill_at)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found = Bundle.open(Path(device), verify=True).content_hash
    assert found in (old, new), found
    seen.add(found)
    if not os.WIFSIGNALED(status):
        assert status == 0 and found == (new if what == "apply" else old), status
        break
    if what == "apply" and found == new:
        rollback(device)
    elif what == "rollback" and found == old:
        apply_delta(package, device, trust)
print(kill_at, len(seen))
"""

# Children are killed at random times.
AT_RANDOM = """
import os, random, signal, sys, time
from pathlib import Path
from deepseek.export.delta import apply_delta, rollback
from deepseek.hub import Bundle

package, device, trust, old, new, count = sys.argv[1:]

def apply():
    child = os.fork()
    if child == 0:
        apply_delta(package, device, trust)
        os._exit(0)
    return child

times = []
for _ in range(3):
    start = time.monotonic()
    assert os.waitpid(apply(), 0)[1] == 0
    times.append(time.monotonic() - start)
    rollback(device)
randomly, killed, ends = random.Random(0), 0, {old: 0, new: 0}
for _ in range(int(count)):
    child = apply()
    time.sleep(randomly.uniform(0, 1.2 * min(times)))
    os.kill(child, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    found = Bundle.open(Path(device), verify=True).content_hash
    ends[found] += 1
    if found == new:
        assert rollback(device).content_hash == old
assert apply_delta(package, device, trust).bundle.content_hash == new
print(killed, ends[old], ends[new])
"""

# The room for everything that is allocated is what the process has when it begins, and some more.
LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from deepseek.export.delta import apply_delta, chunks, rollback, verify_delta
from deepseek.export.delta.keys import public_key
import cryptography.exceptions, lzma, numpy
public_key(sys.argv[3])
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (int(sys.argv[4]) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
verify_delta(sys.argv[1], sys.argv[3], sys.argv[2])
apply_delta(sys.argv[1], sys.argv[2], sys.argv[3])
rollback(sys.argv[2])
"""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("delta"))


@pytest.fixture
def device(case: Case, tmp_path: Path) -> Path:
    return Path(shutil.copytree(case.old, tmp_path / "device"))


def program(code: str, case: Case, device: Path, *words: str) -> list[str]:
    """Run a program on a device and return what it printed."""
    hashes = [Bundle.open(each).content_hash for each in (case.old, case.new)]
    given = [str(case.package), str(device), str(case.trust), *hashes, *words]
    command = [sys.executable, "-W", "ignore", "-c", code, *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["exchange", "two renames"])
@pytest.mark.parametrize("what", ["apply", "rollback"])
def test_a_cut_before_a_step(case: Case, device: Path, kind: str, what: str, stride: int) -> None:
    if what == "rollback":
        apply_delta(case.package, device, case.trust)
    steps, seen = program(EVERY_STEP, case, device, kind, what, str(stride))
    assert int(steps) > 60 and seen == "2"
    hidden = {path.name[:15] for path in device.parent.iterdir() if path.name != "device"}
    assert hidden <= {".device.before-"}


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_cuts_at_random(case: Case, device: Path, count: int) -> None:
    killed, old, new = map(int, program(AT_RANDOM, case, device, str(count)))
    assert old + new == count and killed > count / 4 and old > 0
    assert contents(device) == contents(case.new)


def test_all_is_on_the_disk_before_the_names_change(
    case: Case, device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, swaps = set(), []
    sync, swap = atomic._sync, atomic._swap

    def syncing(path: Path) -> None:
        sync(path)
        synced.add(os.stat(path).st_ino)

    def swapping(fresh: Path, target: Path) -> Path | None:
        places = [fresh, *(fresh / name for name in atomic.files_in(fresh))]
        old = {each.stat().st_ino for each in case_files}
        late = [path.name for path in places if path.stat().st_ino not in synced | old]
        swaps.append((target.name, late))
        return swap(fresh, target)

    case_files = [path for path in device.rglob("*") if path.is_file()]
    monkeypatch.setattr(atomic, "_sync", syncing)
    monkeypatch.setattr(atomic, "_swap", swapping)
    apply_delta(case.package, device, case.trust)
    assert [name[:15] for name, _ in swaps] == [".device.before-", "device"]
    assert not any(late for _, late in swaps)


def large_case(folder: Path, num_bytes: int) -> Case:
    """Make two versions of a large weight of int8 codes, and the package between them."""
    random = np.random.default_rng(0)
    rows = num_bytes // 4096
    codes = random.integers(-127, 128, (rows, 4096)).astype(np.int8)
    entry = {"dtype": "I8", "shape": [rows, 4096], "data_offsets": [0, rows * 4096]}
    head = json.dumps({"w.weight": entry}).encode()
    for name in ("old", "new"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        with (folder / name / "model.safetensors").open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            file.write(codes.tobytes())
        card = make_card(folder / name, {}, name=name)
        (folder / name / "bundle.json").write_bytes(card_bytes(card))
        codes = codes + (random.random(codes.shape) < 0.2).astype(np.int8)
    key, trust = make_keys(folder / "key")
    make_delta(folder / "old", folder / "new", folder / "package", key)
    return Case(folder / "old", folder / "new", folder / "package", key, trust)


def test_memory_is_a_few_chunks(tmp_path: Path) -> None:
    case = large_case(tmp_path, 48 << 20)
    given = [str(case.package), str(case.old), str(case.trust)]
    command = [sys.executable, "-c", LITTLE_MEMORY, *given, "24"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
