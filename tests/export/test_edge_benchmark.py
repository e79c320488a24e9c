"""The benchmark of the edge profile finds out who breaks a limit, and runs under a real one."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.edge import limited, quantile, verdict
from deepseek.ops.cpu import why_missing
from tests.house import REPO

MIB = 2**20


def found(peak: int, planned: int = 80, **others: Any) -> dict[str, Any]:
    return {"peak_rss_bytes": peak, "plan": {"peak_bytes": planned}, **others}


def test_verdicts() -> None:
    assert verdict(found(80), 100) == "kept"
    assert "and 80 were planned" in verdict(found(81), 100)
    assert verdict(found(110, planned=120), 100) == "took more than its cap"
    assert verdict({"was_ended": True}, 100).startswith("ended by the system")
    assert verdict({"refused": "too small"}, 100) == "refused"


def test_quantiles() -> None:
    assert quantile([3, 1, 2], 0.95) == 3 and quantile([3, 1, 2], 0.0) == 1


def test_a_process_beyond_a_groups_limit_is_ended_and_seen() -> None:
    with limited(64 * MIB) as group:
        if group is None:
            pytest.skip("no memory control group can be made here")
        enter = f'echo $$ > {group.folder}/cgroup.procs && exec "$@"'
        take = "x = bytearray(200 << 20); x[::4096] = bytes(1) * len(x[::4096])"
        done = subprocess.run(["sh", "-c", enter, "sh", sys.executable, "-c", take])
        assert done.returncode != 0 and group.was_ended
        assert group.peak_bytes <= 64 * MIB
        folder = group.folder
    assert not folder.exists()


def bench(*words: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "benchmarks/edge.py", "--json", "--rounds", "0", *words]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    return done.returncode, json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))
@pytest.mark.usefixtures("smollm2_folder")
def test_limits_are_kept_and_breaches_are_found() -> None:
    code, answer = bench("--caps", "512MiB", "200MiB", "100MB")
    assert code == 0
    assert [each["verdict"] for each in answer["caps"]] == ["kept", "kept", "refused"]
    values = {each["name"]: each["value"] for each in answer["measurements"]}
    assert values["token_p50_ms"] < 200
    for breach in ("60MiB", "300MiB"):
        code, answer = bench("--caps", "512MiB", "--breach", breach)
        assert code == 1 and answer["caps"][0]["verdict"] != "kept"
