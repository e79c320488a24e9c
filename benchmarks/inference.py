"""Our engine beside every other on the same model, prompts and threads, by turns.

    python benchmarks/inference.py --peers peers.json --plot inference.svg

Engines stay loaded in processes of their own and take turns, so that whatever else the machine does
meets all of them; ratios are to the best peer of the same round. `benchmarks/peers/README.md` says
how each was set up and what FILE holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from deepseek.cli.models import positive
from deepseek.hub import pull
from deepseek.ops.scheme import SCHEMES as NAMED
from deepseek.records import Measurement, summarize

HERE = Path(__file__).resolve().parent / "peers"
SCHEMES = ("bfloat16", "int8", "int8-kv8", "int4", "int4-kv8")
MODES: dict[str, dict[str, Any]] = {
    "prefill_512": {"mode": "prefill", "prompt_tokens": 512, "new_tokens": 1, "batch": 1},
    "prefill_2048": {"mode": "prefill", "prompt_tokens": 2048, "new_tokens": 1, "batch": 1},
    "decode": {"mode": "decode", "prompt_tokens": 512, "new_tokens": 64, "batch": 1},
    "decode_16": {"mode": "batch", "prompt_tokens": 128, "new_tokens": 32, "batch": 16},
    "cold": {"mode": "cold", "prompt_tokens": 16, "new_tokens": 1, "batch": 1},
}
"""What is measured: tokens/s of reading a prompt, of one row, of 16 rows together; seconds from the
start of the process to the text of its first token, files warm."""


@dataclasses.dataclass(frozen=True)
class EngineSpec:
    """How an engine's program is started."""

    name: str
    python: str
    runner: str
    request: dict[str, Any]

    @property
    def is_ours(self) -> bool:
        """Whether it is this package."""
        return self.runner == "ours.py"

    def command(self, mode: dict[str, Any], threads: int) -> list[str]:
        """Return the words that start it for a mode."""
        asked = {**self.request, **mode, "threads": threads}
        return [self.python, str(HERE / self.runner), json.dumps(asked)]


class Worker:
    """An engine that is loaded and waits for its turn."""

    def __init__(self, spec: EngineSpec, mode: dict[str, Any], threads: int) -> None:
        """Start it and wait until it is warm."""
        self.spec = spec
        self._process = subprocess.Popen(
            spec.command(mode, threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(),
        )
        self.version = str(self._read()["version"])

    def turn(self) -> dict[str, float]:
        """Return one measurement."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Let it go."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"inference: {self.spec.name} ended with code {self._process.wait()}")
        return json.loads(line)


def environment() -> dict[str, str]:
    """Return an engine's environment: with compiled bytecode, as installed packages have it."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def engines(options: argparse.Namespace) -> list[EngineSpec]:
    """Return our schemes and the peers of the file."""
    folder = str(pull(options.model).path)
    found = [
        EngineSpec(
            f"deepseek {scheme}",
            sys.executable,
            "ours.py",
            {"model": folder, "scheme": scheme, "isa": options.isa},
        )
        for scheme in options.schemes
    ]
    peers = json.loads(options.peers.read_text()) if options.peers else {}
    if not peers:
        request = {"model": folder, "dtype": "bfloat16"}
        found.append(EngineSpec("transformers bf16", sys.executable, "hf.py", request))
    for name, given in peers.items():
        rest = {key: value for key, value in given.items() if key not in ("python", "runner")}
        found.append(EngineSpec(name, given["python"], given["runner"], rest))
    return found


def measure(
    name: str, specs: list[EngineSpec], threads: int, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Return the samples of each engine in one mode, taken by turns."""
    mode = MODES[name]
    samples: dict[str, list[dict[str, float]]] = {spec.name: [] for spec in specs}
    if mode["mode"] == "cold":
        for number in range(rounds + 1):
            for spec in specs:
                words = spec.command(mode, threads)
                done = subprocess.run(
                    words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment()
                )
                # the first round warms the file cache
                if done.returncode != 0:
                    sys.exit(f"inference: {spec.name} ended with code {done.returncode}")
                if number > 0:
                    samples[spec.name].append(json.loads(done.stdout.splitlines()[-1]))
        return samples
    workers = [Worker(spec, mode, threads) for spec in specs]
    for _ in range(rounds):
        for worker in workers:
            samples[worker.spec.name].append(worker.turn())
    for worker in workers:
        worker.close()
    return samples


def results(
    name: str,
    specs: list[EngineSpec],
    samples: dict[str, list[dict[str, float]]],
    conditions: dict[str, Any],
) -> list[Measurement]:
    """Return each engine's figure, and of ours its ratio to the best peer of every round."""
    key, unit = ("cold_s", "s") if name == "cold" else ("tokens_per_s", "tokens/s")
    command = "python benchmarks/inference.py --peers FILE"
    found, values = [], {}
    for spec in specs:
        values[spec.name] = [sample[key] for sample in samples[spec.name]]
        about = {**conditions, "engine": spec.name}
        found.append(summarize(name, values[spec.name], unit, conditions=about, command=command))
        peak = max(sample["peak_rss_bytes"] for sample in samples[spec.name])
        found.append(
            Measurement(
                name=f"{name}_peak_rss_bytes",
                value=peak,
                unit="bytes",
                conditions=about,
                command=command,
            )
        )
    peers = [values[spec.name] for spec in specs if not spec.is_ours]
    for spec in specs:
        if not spec.is_ours or not peers:
            continue
        best = [
            min(column) if name == "cold" else max(column) for column in zip(*peers, strict=True)
        ]
        pairs = zip(values[spec.name], best, strict=True)
        ratios = [peer / own if name == "cold" else own / peer for own, peer in pairs]
        about = {**conditions, "engine": spec.name}
        found.append(
            summarize(f"{name}_over_best_peer", ratios, "1", conditions=about, command=command)
        )
    return found


def plot(path: Path, found: list[Measurement]) -> None:
    """Draw a bar for each engine in each mode."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(MODES), figsize=(4 * len(MODES), 4.5), sharey=True)
    for axis, name in zip(axes, MODES, strict=True):
        items = [item for item in found if item.name == name]
        labels = [str(item.conditions["engine"]) for item in items]
        colors = ["#1b6ca8" if label.startswith("deepseek") else "#b0b7bf" for label in labels]
        axis.barh(labels, [item.value for item in items], color=colors)
        axis.invert_yaxis()
        axis.set_title(name)
        axis.set_xlabel(items[0].unit if items else "")
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> int:
    """Measure, and print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="name of ours, the peers' in FILE")
    parser.add_argument("--peers", type=Path, metavar="FILE", help="transformers alone without it")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=NAMED)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--isa", help="instruction set of ours")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        specs = engines(options)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"--peers {options.peers}: {error}; see benchmarks/peers/README.md")
    found: list[Measurement] = []
    for name in options.modes:
        print(f"{name} ...", file=sys.stderr, flush=True)
        conditions = {"model": options.model, "threads": options.threads, "rounds": options.rounds}
        samples = measure(name, specs, options.threads, options.rounds)
        found += results(name, specs, samples, {**conditions, **MODES[name]})
    if options.plot:
        plot(options.plot, found)
    if options.json:
        print(json.dumps({"measurements": [item.to_dict() for item in found]}, indent=2))
        return 0
    for item in found:
        spread = f"  [{item.spread.low:.3g} to {item.spread.high:.3g}]" if item.spread else ""
        value = item.value / 2**20 if item.unit == "bytes" else item.value
        unit = "MiB" if item.unit == "bytes" else item.unit
        print(f"{item.conditions['engine']:24} {item.name:28} {value:9.4g} {unit}{spread}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped: nothing was kept")
