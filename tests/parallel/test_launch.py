"""Processes of one machine: one that fails ends the others, and its code is the answer."""

from __future__ import annotations

import sys

import pytest

from deepseek.parallel import run_workers

CODE = """
import os, sys, time
rank = int(os.environ["RANK"])
if rank == {failing}:
    print("it was me", file=sys.stderr)
    sys.exit(3)
time.sleep({sleep})
"""


@pytest.mark.parametrize("failing", [0, 1])
def test_the_code_is_that_of_who_failed(failing: int, capfd: pytest.CaptureFixture[str]) -> None:
    code = CODE.format(failing=failing, sleep=20)
    assert run_workers([sys.executable, "-c", code], 2) == 3
    assert capfd.readouterr().err.count("it was me") == 1


def test_all_well_is_zero() -> None:
    assert run_workers([sys.executable, "-c", CODE.format(failing=9, sleep=0)], 2) == 0


def test_a_worker_that_is_killed_is_told_as_a_shell_does() -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run_workers([sys.executable, "-c", code], 2) == 137


def test_what_all_say_is_shown_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Though the first worker is the last to say it."""
    code = (
        "import os, sys, time; time.sleep(1.0 if os.environ['RANK'] == '0' else 0.0);"
        "print('mistake', file=sys.stderr); sys.exit(2)"
    )
    assert run_workers([sys.executable, "-c", code], 3) == 2
    assert capfd.readouterr().err == "mistake\n"


def test_who_failed_first_is_told_though_others_follow(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import os, sys, time; first = os.environ['RANK'] == '1';"
        "time.sleep(0.0 if first else 1.0);"
        "print('cause' if first else 'effect', file=sys.stderr); sys.exit(3 if first else 70)"
    )
    assert run_workers([sys.executable, "-c", code], 3) == 3
    assert capfd.readouterr().err.splitlines() == ["effect", "cause"]
