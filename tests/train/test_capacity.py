"""Memory that runs out is one line, and the last checkpoint is whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek.errors import is_out_of_memory
from deepseek.parallel import World
from deepseek.train import Run, train
from deepseek.train.checkpoint import Checkpoints
from tests.train.conftest import MakeRun

ROOM_BYTES = 600 << 20
"""What the training may take beside what is loaded."""

CODE = """
import json, resource, sys
import torch
import deepseek.train.start
from deepseek.cli.main import main
torch.ones(1 << 20).sum(), torch.mm(torch.ones(64, 64), torch.ones(64, 64))
status = open("/proc/self/status").read()
now = 1024 * int(status.split("VmSize:")[1].split()[0])
resource.setrlimit(resource.RLIMIT_AS, (now + {room}, now + {room}))
sys.exit(main({words!r}))
"""


def trained_in_little_room(run: Run, folder: Path) -> subprocess.CompletedProcess[str]:
    """Train in a process whose memory is limited."""
    path = folder.parent / "run.py"
    body = f"return Run.from_dict({run.to_dict()!r})"
    path.write_text(f"from deepseek.train import Run\ndef run():\n    {body}\n")
    words = ["train", str(path), "--out", str(folder), "--threads", "1", "--json"]
    code = CODE.format(room=ROOM_BYTES, words=words)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
def test_memory_that_runs_out_is_one_line(make_run: MakeRun, tmp_path: Path) -> None:
    first, second = make_run().stages
    second = second.replace(batch=4096, micro_batch=4096, length=512, steps=2)
    run, folder = make_run(stages=(first.replace(steps=3), second)), tmp_path / "out"
    ended = trained_in_little_room(run, folder)
    assert ended.returncode == 2, ended.stderr
    error = json.loads(ended.stdout)["error"]
    assert error["kind"] == "CapacityError"
    assert (
        "smaller micro_batch" in error["message"] and "step-00000003 is whole" in error["message"]
    )
    assert [line for line in ended.stderr.splitlines() if line.startswith("deepseek:")] == [
        f"deepseek: {error['message']}"
    ]
    assert "Traceback" not in ended.stderr
    found = Checkpoints(folder / "checkpoints", World(), 2).find()
    assert found is not None and found[1].total_steps == 3


def test_it_goes_on_with_other_settings_of_memory(make_run: MakeRun, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def die(progress: object) -> None:
        raise Killed

    with pytest.raises(Killed):
        train(make_run(), tmp_path, report=die)
    stages = tuple(each.replace(micro_batch=1, recompute=True) for each in make_run().stages)
    train(make_run(stages=stages), tmp_path)


def test_errors_of_memory_are_known() -> None:
    words = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you"
    assert is_out_of_memory(RuntimeError(words)) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(ValueError("out of memory"))
