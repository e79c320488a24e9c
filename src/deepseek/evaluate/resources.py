"""What a piece of work costs: peak memory, processor time, energy where the machine tells it."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_SAMPLE_EVERY_S = 0.005
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
POWERCAP = Path("/sys/class/powercap")


@dataclasses.dataclass
class Usage:
    """What was used between entering and leaving `track`; filled on leaving."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    """Processor time of all threads of this process."""
    peak_rss_bytes: int = 0
    """Most memory resident at once, weights mapped from files included."""
    peak_rss_method: str = ""
    energy_j: float | None = None
    """Energy of the processor packages, whoever used them; None where it cannot be read."""


@contextlib.contextmanager
def track(powercap: Path = POWERCAP) -> Iterator[Usage]:
    """Measure what the body uses.

    Peak memory: the kernel's high-water mark, put back to the present size on entering
    (`/proc/self/clear_refs`); where that is not permitted, the largest of samples every 5 ms;
    where there is no `/proc`, the high-water mark of the process's whole life. Which one is in
    `peak_rss_method`. Energy: the RAPL counters under `powercap`, if they can be read.

    Args:
        powercap: folder of the counters.
    """
    usage = Usage()
    counters = EnergyCounters(powercap)
    with _peak_memory(usage):
        energy, wall, cpu = counters.read(), time.perf_counter(), time.process_time()
        try:
            yield usage
        finally:
            usage.wall_s = time.perf_counter() - wall
            usage.cpu_s = time.process_time() - cpu
            usage.energy_j = counters.since(energy)


def current_rss_bytes() -> int | None:
    """Return the resident memory of this process now, or None where the system does not say."""
    return _status_bytes("VmRSS")


def peak_rss_bytes() -> int:
    """Return the most memory this process has had resident since it was started.

    From `/proc` where there is one: `getrusage` would also count what the process that started this
    one had at that moment.
    """
    high = _status_bytes("VmHWM")
    if high is not None:
        return high
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class EnergyCounters:
    """RAPL counters of the whole packages (`intel-rapl:N`, used by AMD processors as well).

    Args:
        folder: of the counters; those that cannot be read are left out.
    """

    def __init__(self, folder: Path = POWERCAP) -> None:
        self.ranges: dict[Path, int] = {}
        for zone in sorted(folder.glob("intel-rapl:*")):
            if zone.name.count(":") != 1:
                continue
            with contextlib.suppress(OSError, ValueError):
                int((zone / "energy_uj").read_text())
                self.ranges[zone] = int((zone / "max_energy_range_uj").read_text())

    def read(self) -> dict[Path, int]:
        """Return the counters in microjoules."""
        return {zone: int((zone / "energy_uj").read_text()) for zone in self.ranges}

    def since(self, before: dict[Path, int]) -> float | None:
        """Return joules since an earlier reading, None without counters; each may have wrapped
        around once."""
        if not before:
            return None
        after = self.read()
        used = 0
        for zone, start in before.items():
            change = after[zone] - start
            used += change if change >= 0 else change + self.ranges[zone]
        return used / 1e6


@contextlib.contextmanager
def _peak_memory(usage: Usage) -> Iterator[None]:
    if _reset_high_water():
        yield
        usage.peak_rss_bytes = _status_bytes("VmHWM") or 0
        usage.peak_rss_method = "high-water mark since the start of the measurement"
    elif current_rss_bytes() is not None:
        with _sampled(usage):
            yield
        usage.peak_rss_method = "largest of samples every 5 ms"
    else:
        yield
        usage.peak_rss_bytes = peak_rss_bytes()
        usage.peak_rss_method = "high-water mark of the whole process"


def _reset_high_water() -> bool:
    """Put the high-water mark back to the present size; False where this has no effect."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    high, now = _status_bytes("VmHWM"), _status_bytes("VmRSS")
    # Some sandboxes take the write and do nothing: then the mark stays far above the present.
    return high is not None and now is not None and high <= now + (16 << 20)


@contextlib.contextmanager
def _sampled(usage: Usage) -> Iterator[None]:
    stop = threading.Event()

    def sample() -> None:
        while True:
            usage.peak_rss_bytes = max(usage.peak_rss_bytes, current_rss_bytes() or 0)
            if stop.wait(_SAMPLE_EVERY_S):
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _status_bytes(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None
