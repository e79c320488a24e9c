"""What control groups of both versions allow, from files as the kernel shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek.ops.cgroup import cgroup_cores, cgroup_memory


def written(folder: Path, groups: str, files: dict[str, str]) -> tuple[Path, Path]:
    own = folder / "own"
    own.write_text(groups)
    for name, text in files.items():
        path = folder / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "groups", own


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/cpu.max": "50000 100000\n", "a/b/cpu.max": "max 100000\n"}, 0.5),
        (
            "4:memory:/x\n1:cpu,cpuacct:/a\n0::/\n",
            {"cpu/a/cpu.cfs_quota_us": "200000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            2.0,
        ),
        (
            "1:cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        ("1:cpuset:/\n", {}, None),
        ("0::/\n", {"cpu.max": "nonsense\n"}, None),
        ("", {}, None),
    ],
)
def test_the_quota_of_control_groups_of_both_versions(
    tmp_path: Path, groups: str, files: dict[str, str], cores: float | None
) -> None:
    assert cgroup_cores(*written(tmp_path, groups, files)) == cores


V2 = "0::/a/b\n"
V1 = "4:memory:/x\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "memory"),
    [
        (V2, {"a/b/memory.max": "1000\n", "a/b/memory.current": "300\n"}, (1000, 700)),
        (V2, {"a/b/memory.max": "max\n", "a/b/memory.current": "300\n"}, None),
        (
            V2,
            {
                "a/memory.max": "900\n",
                "a/memory.current": "800\n",
                "a/b/memory.max": "500\n",
                "a/b/memory.current": "300\n",
            },
            (900, 100),
        ),
        (
            V2,
            {
                "a/b/memory.max": "1000\n",
                "a/b/memory.current": "900\n",
                "a/b/memory.stat": "anon 5\ninactive_file 250\n",
            },
            (1000, 350),
        ),
        (V2, {"a/b/memory.max": "100\n", "a/b/memory.current": "300\n"}, (100, 0)),
        (
            V1,
            {
                "memory/x/memory.limit_in_bytes": "1000\n",
                "memory/x/memory.usage_in_bytes": "900\n",
                "memory/x/memory.stat": "inactive_file 1\ntotal_inactive_file 50\n",
            },
            (1000, 150),
        ),
        (
            V1,
            {
                "memory/x/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/x/memory.usage_in_bytes": "900\n",
            },
            None,
        ),
        (V2, {"a/b/memory.max": "nonsense\n", "a/b/memory.current": "300\n"}, None),
        (V2, {"a/b/memory.max": "1000\n"}, None),
        ("", {}, None),
    ],
)
def test_the_tightest_memory_limit(
    tmp_path: Path, groups: str, files: dict[str, str], memory: tuple[int, int] | None
) -> None:
    assert cgroup_memory(*written(tmp_path, groups, files)) == memory
