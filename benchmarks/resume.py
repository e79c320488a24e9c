"""Kills a training run again and again, and changes its number of workers: does it end the same?

    python benchmarks/resume.py --kills 20 --steps 40
    python benchmarks/resume.py --trains '*' --quick --json

Three runs of `deepseek train` on the same data, each worker on one thread: one that nothing happens
to; one killed by SIGKILL at random moments and started again each time; one that goes on with 2, 4
and 1 workers after a SIGTERM. Weights are compared by the hash of their file, losses as they are
in `metrics.jsonl`, and `--prove` reads the ledger. The exit code is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from deepseek.cli.models import positive
from deepseek.records import Measurement, summarize
from deepseek.train.summary import read_metrics

WORKERS = (1, 2, 4, 1)
"""Of the starts of the third run."""
EXPECTED = {"weights_are_equal": 1, "largest_relative_loss_difference": 0, "ledger_is_proved": 1}
"""What is measured where resuming is exact."""
QUICK = {"kills": 2, "steps": 8, "every": 2}
"""What `--quick` takes: it shows that all runs, no more."""
LIMIT_S = 1800.0
"""How long a start may take to get to the step it is waited for."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a run ended."""

    sha256: str
    """Of the weights' file."""
    losses: list[float]
    """Of each step."""
    is_proved: bool
    """Whether the ledger shows each sample once, in order."""
    starts: list[float]
    """Seconds from each start to the first step that it did."""
    num_killed: int
    """Starts that SIGKILL ended, as it did not come too late."""


class Trained:
    """One run in a folder, started as often as it takes."""

    def __init__(self, run: Path, folder: Path) -> None:
        """Take the file of the run and a new folder."""
        self._run, self._folder = run, folder
        self._starts: list[float] = []
        self._num_killed = 0

    def start_until(self, step: int, kind: signal.Signals, workers: int, late: float = 0.0) -> None:
        """Start, wait for a step of the whole run and `late` seconds more, and send a signal."""
        with self._started(workers) as process:
            self._wait_for(process, step)
            time.sleep(late)
            if kind == signal.SIGKILL:
                kill_all(process.pid)
            else:
                process.send_signal(kind)
            self._num_killed += process.wait(LIMIT_S) == -signal.SIGKILL

    def finish(self, workers: int) -> Ended:
        """Start, let it come to its end, and return what is there."""
        with self._started(workers) as process:
            out, err = process.communicate(timeout=LIMIT_S)
        if process.returncode:
            sys.exit(f"resume: a start failed: {err.strip()[-500:]}")
        bundle = Path(json.loads(out.splitlines()[-1])["bundle"])
        proof = subprocess.run([*self._words(1), "--prove"], capture_output=True, text=True)
        return Ended(
            sha256=sha256_of(sorted(bundle.glob("*.safetensors"))),
            losses=[line["loss"] for line in read_metrics(self._folder)],
            is_proved=proof.returncode == 0,
            starts=self._starts,
            num_killed=self._num_killed,
        )

    def _words(self, workers: int) -> list[str]:
        words = [sys.executable, "-m", "deepseek", "train", str(self._run), "--json"]
        return [*words, "--out", str(self._folder), "--threads", "1", "--workers", str(workers)]

    @contextlib.contextmanager
    def _started(self, workers: int) -> Iterator[subprocess.Popen[str]]:
        self._began, self._attempt = time.monotonic(), len(self._ledgers())
        process = subprocess.Popen(
            self._words(workers), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                kill_all(process.pid)
            process.communicate()

    def _wait_for(self, process: subprocess.Popen[str], step: int) -> None:
        """Wait until this start has done a step of the whole run, counted from 1."""
        is_first = True
        while (done := self._steps_done()) < step or is_first:
            if done and is_first:
                self._starts.append(time.monotonic() - self._began)
                is_first = False
            if process.poll() is not None:
                sys.exit(f"resume: it ended before step {step}: {process.communicate()[1][-500:]}")
            if time.monotonic() - self._began > LIMIT_S:
                sys.exit(f"resume: step {step} did not come in {LIMIT_S:.0f} s")
            time.sleep(0.01)

    def _ledgers(self) -> set[Path]:
        return set(self._folder.glob("ledger/attempt-*-rank-0.jsonl"))

    def _steps_done(self) -> int:
        """Return the steps that are done, 0 until the newest start has done one."""
        ledgers = sorted(self._ledgers())
        if len(ledgers) <= self._attempt or not ledgers[-1].stat().st_size:
            return 0
        metrics = self._folder / "metrics.jsonl"
        return len(metrics.read_bytes().splitlines()) if metrics.is_file() else 0


def kill_all(pid: int) -> None:
    """Kill a process and those below it."""
    for each in [pid, *children(pid)]:
        with contextlib.suppress(ProcessLookupError):  # it may be gone by then
            os.kill(each, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Return the processes below one, those of its children too."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        if parent == pid:
            child = int(entry.parent.name)
            found += [child, *children(child)]
    return found


def sha256_of(files: Sequence[Path]) -> str:
    """Return the hash of files' bytes, one after another."""
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


def write_run(folder: Path, options: argparse.Namespace) -> Path:
    """Write the file of the run that all three are."""
    stage = {
        "name": "only",
        "data": [{"path": "python-topics"}],
        "steps": options.steps,
        "length": options.length,
        "batch": options.batch,
        "micro_batch": max(1, options.batch // max(WORKERS)),
        "trains": options.trains,
        "optimizer": {"kind": "adamw", "rate": 1e-4},
    }
    path = folder / "run.yaml"
    run = {"model": options.model, "checkpoint_every": options.every, "stages": [stage]}
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return path


def killed(trained: Trained, options: argparse.Namespace) -> Ended:
    """Kill a run at random steps, each at a random moment of the second after it."""
    chance = random.Random(options.seed)
    steps = sorted(chance.choices(range(1, options.steps - 1), k=options.kills))
    for number, step in enumerate(steps):
        trained.start_until(step, signal.SIGKILL, 1, late=chance.random())
        tell(f"killed {number + 1} of {options.kills} times, after step {step}")
    return trained.finish(1)


def resized(trained: Trained, options: argparse.Namespace) -> Ended:
    """Let a run go on with another number of workers after each quarter of its steps."""
    for number, workers in enumerate(WORKERS[:-1]):
        step = options.steps * (number + 1) // len(WORKERS)
        trained.start_until(step, signal.SIGTERM, workers)
        tell(f"{workers} workers until step {step}")
    return trained.finish(WORKERS[-1])


def tell(words: str) -> None:
    """Say how far it is."""
    print(f"resume: {words}", file=sys.stderr, flush=True)


def compare(
    what: str, ended: Ended, unbroken: Ended, about: dict[str, Any], command: str
) -> list[Measurement]:
    """Return what differs between a run and the unbroken one."""
    pairs = zip(ended.losses, unbroken.losses, strict=True)
    difference = max(abs(a - b) / abs(b) for a, b in pairs)
    said: dict[str, Any] = {"conditions": {**about, "run": what}, "command": command}
    return [
        Measurement(name=name, value=float(value), unit="1", **said)
        for name, value in (
            ("weights_are_equal", ended.sha256 == unbroken.sha256),
            ("largest_relative_loss_difference", difference),
            ("ledger_is_proved", ended.is_proved),
            ("kills", ended.num_killed),
        )
    ] + [summarize("start_to_first_step_s", ended.starts, "s", **said)]


def measure(options: argparse.Namespace, command: str) -> list[Measurement]:
    """Do the three runs and return what differs."""
    names = ("model", "steps", "batch", "length", "trains", "every", "kills", "seed")
    about = {name: getattr(options, name) for name in names}
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        run = write_run(Path(place), options)
        unbroken = Trained(run, Path(place) / "unbroken").finish(1)
        tell(f"unbroken: loss {unbroken.losses[0]:.4f} to {unbroken.losses[-1]:.4f}")
        found = []
        for what, how in (("killed", killed), ("resized", resized)):
            ended = how(Trained(run, Path(place) / what), options)
            found += compare(what, ended, unbroken, about, command)
    return found


def show(found: list[Measurement]) -> None:
    """Print a line for each figure."""
    for item in found:
        spread = item.spread and f"[{item.spread.low:.4g} to {item.spread.high:.4g}]"
        who = item.conditions["run"]
        print(f"{who:8} {item.name:34} {item.value:10.4g} {item.unit} {spread or ''}")


def main() -> int:
    """Measure, and print lines or one JSON object; 1 where a run did not end the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kills", type=positive, default=20)
    parser.add_argument("--steps", type=positive, default=40)
    parser.add_argument("--batch", type=positive, default=4, help="rows of a step (4)")
    parser.add_argument("--length", type=positive, default=64, help="tokens of a row (64)")
    parser.add_argument("--every", type=positive, default=3, help="steps between checkpoints (3)")
    parser.add_argument(
        "--trains", nargs="+", default=["model.layers.2[89].*"], help="patterns of parameters"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the kills (0)")
    parser.add_argument("--folder", help="where the runs live (that of temporary files)")
    parser.add_argument("--quick", action="store_true", help="only show that it runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    for name, value in QUICK.items() if options.quick else ():
        setattr(options, name, value)
    command = shlex.join(["python", "benchmarks/resume.py", *sys.argv[1:]])
    found = measure(options, command)
    if options.json:
        print(json.dumps({"measurements": [item.to_dict() for item in found]}, indent=2))
    else:
        show(found)
    return 0 if all(EXPECTED.get(item.name, item.value) == item.value for item in found) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped: nothing was kept")
