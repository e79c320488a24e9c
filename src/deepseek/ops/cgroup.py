"""What the control groups of this process allow it. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
"""Where control groups are mounted, of either version."""
OWN = Path("/proc/self/cgroup")
"""The list of this process's groups."""
_LEAST_UNLIMITED = 2**62
"""Version 1 says no limit by a number that no machine has."""


def cgroup_cores(root: Path = ROOT, own: Path = OWN) -> float | None:
    """Return the processor quota of this process's control groups in cores, None without one.

    Args:
        root: where control groups are mounted, of either version.
        own: the list of this process's groups.
    """
    quotas = [_quota(group) for group in _groups("cpu", root, own)]
    return min((quota for quota in quotas if quota is not None), default=None)


def cgroup_memory(root: Path = ROOT, own: Path = OWN) -> tuple[int, int] | None:
    """Return the memory limit of this process's control groups and what of it is still free, both
    in bytes; None without a limit. Of several limits it is the one that leaves least free.

    Args: as `cgroup_cores`.
    """
    found = [_memory(group) for group in _groups("memory", root, own)]
    limits = [each for each in found if each is not None]
    return min(limits, key=lambda each: each[1], default=None)


def _groups(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """Yield this process's group of a controller, and all above it: it may use what all of them
    allow. A container sees its own group as the root."""
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, place = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        group = base / place.lstrip("/")
        yield from (each for each in (group, *group.parents) if each.is_relative_to(base))


def _quota(group: Path) -> float | None:
    """Return the quota of one group in cores."""
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        return None if quota == "max" or int(quota) < 0 else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _memory(group: Path) -> tuple[int, int] | None:
    """Return the limit of one group, and what is free of it: pages of files that can be dropped
    count as free."""
    try:
        if (group / "memory.max").is_file():
            limit, used = group / "memory.max", group / "memory.current"
        else:
            limit, used = group / "memory.limit_in_bytes", group / "memory.usage_in_bytes"
        most = int(limit.read_text())  # version 2 has the word "max" where there is no limit
        if most >= _LEAST_UNLIMITED:
            return None
        free = most - int(used.read_text()) + _droppable(group / "memory.stat")
        return most, max(0, min(most, free))
    except (OSError, ValueError):
        return None


def _droppable(stat: Path) -> int:
    try:
        counts = dict(line.split() for line in stat.read_text().splitlines())
        return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 0
