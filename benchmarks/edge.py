"""A model within the limits of a small device: what it takes, how fast it answers, and the proof.

    python benchmarks/edge.py
    python benchmarks/edge.py --caps 4GB 512MiB 200MiB --cores 1 --json
    python benchmarks/edge.py --caps 512MiB --breach 300MiB

Each run is a process of its own in a memory control group of the cap, on the cores that are given.
It answers short questions one by one, then fills every row of its plan to the last token. A run
keeps its limit if the system did not end it and its largest resident size is not above what was
planned before a weight was read. Where no control group can be made, the size is only measured, and
the output says so. `--breach` takes memory that nobody planned: the run must then be found out.

The first start packs the weights, the others read them. Exit code 1: a limit was not kept.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

COMMAND = shlex.join(["python", "benchmarks/edge.py", *sys.argv[1:]])
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "What is 2 + 3?",
    "Who wrote Hamlet?",
    "What do bees make?",
    "Say hello in Spanish.",
)
ANSWER_TOKENS = 24
_ROOT = Path("/sys/fs/cgroup")


class Group:
    """A memory control group below this process's own, of either version."""

    def __init__(self, limit_bytes: int) -> None:
        self.folder, self.is_v2 = _own_group()
        self.folder /= f"deepseek-edge-{os.getpid()}-{time.monotonic_ns()}"
        self.folder.mkdir()
        name = "memory.max" if self.is_v2 else "memory.limit_in_bytes"
        (self.folder / name).write_text(str(limit_bytes))

    @property
    def peak_bytes(self) -> int:
        """Most bytes charged at once, pages of files that can be dropped included."""
        name = "memory.peak" if self.is_v2 else "memory.max_usage_in_bytes"
        return int((self.folder / name).read_text())

    @property
    def was_ended(self) -> bool:
        """Whether the system ended a process because of the limit."""
        name = "memory.events" if self.is_v2 else "memory.oom_control"
        fields = dict(line.split() for line in (self.folder / name).read_text().splitlines())
        return int(fields["oom_kill"]) > 0

    def remove(self) -> None:
        """Remove it; its processes must have ended, which the system may see a moment later."""
        for _ in range(50):
            with contextlib.suppress(OSError):
                return self.folder.rmdir()
            time.sleep(0.1)
        self.folder.rmdir()


def _own_group() -> tuple[Path, bool]:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, place = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _ROOT / "memory" / place.lstrip("/"), False
    unified = Path("/proc/self/cgroup").read_text().splitlines()[-1].split(":", 2)[2]
    return _ROOT / unified.lstrip("/"), True


@contextlib.contextmanager
def limited(limit_bytes: int) -> Iterator[Group | None]:
    """Yield a group of a limit, or None where none can be made."""
    try:
        group = Group(limit_bytes)
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        group.remove()


def run_child(asked: dict[str, Any], home: Path) -> dict[str, Any]:
    """Return what a process under a limit found, and what the system says of it."""
    child = [sys.executable, __file__, "--child", json.dumps(asked)]
    environment = os.environ | {"DEEPSEEK_HOME": str(home)}
    with limited(asked["cap_bytes"]) as group:
        if group is not None:  # it enters before it starts, so that all it takes is charged
            enter = f'echo $$ > {shlex.quote(str(group.folder / "cgroup.procs"))} && exec "$@"'
            child = ["sh", "-c", enter, "sh", *child]
        start_s = time.time()
        asked_at = environment | {"DEEPSEEK_EDGE_START": repr(start_s)}
        done = subprocess.run(child, env=asked_at, capture_output=True, text=True)
        found: dict[str, Any] = {"limit": "measured only" if group is None else "control group"}
        if group is not None:
            found |= {"group_peak_bytes": group.peak_bytes, "was_ended": group.was_ended}
    if done.returncode == 0:
        return found | json.loads(done.stdout)
    if not found.get("was_ended") and done.returncode not in (-9, 137):
        raise SystemExit(f"the run failed: {done.stderr}")
    return found | {"was_ended": True}


def verdict(found: dict[str, Any], cap_bytes: int) -> str:
    """Return whether a run kept its limit, or why not."""
    if found.get("refused"):
        return "refused"
    if found.get("was_ended"):
        return "ended by the system at its limit"
    planned = found["plan"]["peak_bytes"]
    if found["peak_rss_bytes"] > planned:
        return f"took {found['peak_rss_bytes']:,} bytes, and {planned:,} were planned"
    return "kept" if found["peak_rss_bytes"] <= cap_bytes else "took more than its cap"


def child(asked: dict[str, Any]) -> dict[str, Any]:
    """Answer within a profile, and say what that took."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: asked["cores"]])
    from deepseek.errors import CapacityError
    from deepseek.evaluate.resources import peak_rss_bytes
    from deepseek.export import EdgeProfile, optimize_for_edge

    profile = EdgeProfile(memory_bytes=asked["cap_bytes"], scheme=asked["scheme"])
    try:
        model = optimize_for_edge(asked["model"], profile)
    except CapacityError as error:
        return {"refused": str(error), "peak_rss_bytes": peak_rss_bytes()}
    found = answer(model)
    taken = bytearray(asked["breach_bytes"])
    taken[::4096] = bytes(1) * len(taken[::4096])
    fill(model)
    return found | {"plan": model.plan.to_dict(), "peak_rss_bytes": peak_rss_bytes()}


def answer(model: Any) -> dict[str, Any]:
    """Return what short answers take, each alone: seconds to the first token, and of each other."""
    from deepseek.generate import chat_prompt

    first_s, token_s, start_s = [], [], None
    for question in QUESTIONS:
        prompt = chat_prompt(model.engine.tokenizer, [{"role": "user", "content": question}])
        times = [time.perf_counter()]
        model.generate(
            prompt,
            max_tokens=ANSWER_TOKENS,
            on_piece=lambda _, times=times: times.append(time.perf_counter()),
        )
        if start_s is None:
            since = time.time() - float(os.environ["DEEPSEEK_EDGE_START"])
            start_s = since - (times[-1] - times[1])
        first_s.append(times[1] - times[0])
        token_s += [after - before for before, after in itertools.pairwise(times[1:])]
    return {"start_s": start_s, "first_token_s": first_s, "token_s": token_s}


def fill(model: Any) -> None:
    """Read and write every row of the plan to its last token."""
    new = 4
    prompts = [[row + 5] * (model.plan.context - new) for row in range(model.plan.rows)]
    model.generate(prompts, max_tokens=new)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that a share of all values is not above."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def measure(args: argparse.Namespace, cap_bytes: int, model: Path) -> dict[str, Any]:
    """Return what the starts of one cap found, the first with no packed weights."""
    asked = {
        "model": str(model),
        "cap_bytes": cap_bytes,
        "cores": args.cores,
        "scheme": args.scheme,
        "breach_bytes": args.breach,
    }
    home = Path(tempfile.mkdtemp(prefix="deepseek-edge-"))
    try:
        runs = [run_child(asked, home) for _ in range(1 + args.rounds)]
    finally:
        shutil.rmtree(home, ignore_errors=True)
    verdicts = [verdict(found, cap_bytes) for found in runs]
    worst = next((words for words in verdicts if words != "kept"), "kept")
    return {"cap_bytes": cap_bytes, "verdict": worst, "runs": runs}


def figures(found: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the measurements of one cap."""
    from deepseek.records import Measurement

    runs = [each for each in found["runs"] if "plan" in each]
    if not runs:
        return []
    plan = runs[0]["plan"]
    tokens = [1000 * each for run in runs for each in run["token_s"]]
    firsts = [1000 * each for run in runs for each in run["first_token_s"]]
    values: list[tuple[str, float, str]] = [
        ("planned_peak_bytes", max(run["plan"]["peak_bytes"] for run in runs), "bytes"),
        ("peak_rss_bytes", max(run["peak_rss_bytes"] for run in runs), "bytes"),
        ("token_p50_ms", statistics.median(tokens), "ms"),
        ("token_p95_ms", quantile(tokens, 0.95), "ms"),
        ("first_token_p50_ms", statistics.median(firsts), "ms"),
        ("first_token_p95_ms", quantile(firsts, 0.95), "ms"),
        ("first_start_s", runs[0]["start_s"], "s"),
    ]
    if len(runs) > 1:
        later = statistics.median(run["start_s"] for run in runs[1:])
        values.append(("second_start_s", later, "s"))
    conditions = {
        "model": args.model,
        "cap_bytes": found["cap_bytes"],
        "cores": args.cores,
        "limit": runs[0]["limit"],
        **{name: plan[name] for name in ("scheme", "threads", "rows", "context")},
        "answers": len(firsts),
    }
    return [
        Measurement(
            name=name, value=value, unit=unit, conditions=conditions, command=COMMAND
        ).to_dict()
        for name, value, unit in values
    ]


def show(found: dict[str, Any], measured: list[dict[str, Any]]) -> None:
    """Print what one cap found."""
    print(f"cap {found['cap_bytes'] / 2**20:,.0f} MiB: {found['verdict']}")
    for run in found["runs"]:
        if run.get("refused"):
            print(f"  {run['refused']} (at {run['peak_rss_bytes'] / 2**20:,.0f} MiB)")
            break
    for each in measured:
        is_bytes = each["unit"] == "bytes"
        value = f"{each['value'] / 2**20:,.1f} MiB" if is_bytes else f"{each['value']:.3g}"
        print(f"  {each['name']:24} {value} {'' if is_bytes else each['unit']}")
    if measured:
        print("  " + ", ".join(f"{k} {v}" for k, v in measured[0]["conditions"].items()))


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    from deepseek.cli.edge import byte_count

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--caps", nargs="+", type=byte_count, default=[4 * 10**9, 512 * 2**20])
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--scheme", help="of the weights (chosen by what fits)")
    parser.add_argument("--rounds", type=int, default=3, help="starts behind the first one (3)")
    parser.add_argument("--breach", type=byte_count, default=0, help="bytes taken unplanned")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> int:
    """Measure all caps; 1 where a limit was not kept."""
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(json.loads(sys.argv[2]))))
        return 0
    args = arguments()
    from deepseek import hub
    from deepseek.engines.facts import fetch
    from deepseek.errors import DeepseekError

    try:
        fetch(args.model)
        model = hub.resolve(args.model).resolve()
    except DeepseekError as error:
        print(f"benchmarks/edge.py: {error}", file=sys.stderr)
        return 2
    measurements, caps = [], []
    for cap_bytes in args.caps:
        found = measure(args, cap_bytes, model)
        measured = figures(found, args)
        caps.append({"cap_bytes": cap_bytes, "verdict": found["verdict"]})
        measurements += measured
        if not args.json:
            show(found, measured)
    if args.json:
        print(json.dumps({"caps": caps, "measurements": measurements}))
    return int(any(each["verdict"] not in ("kept", "refused") for each in caps))


if __name__ == "__main__":
    raise SystemExit(main())
