"""Our server beside others: the same prompts, threads and users, by turns.

    python benchmarks/serve.py --peers peers.json --plot serve.svg
    python benchmarks/serve.py --schemes int8 --guesses off text draft --draft FOLDER

Each round starts every server anew, one after another, so that whatever else the machine does meets
all of them; ratios are to the best peer of the same round, and of guesses ahead to the same server
without them. A round asks what no other asks.
`benchmarks/peers/README.md` says how each peer was set up and what FILE holds. It fails when a
request does, or when an answer has not the tokens that were asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek.cli.models import positive
from deepseek.cli.serve_trial import warm_up
from deepseek.records import Measurement, summarize
from deepseek.serve.load import (
    Client,
    Load,
    Run,
    ServerProcess,
    Target,
    Workload,
    plan_dialogues,
    run_load,
)
from deepseek.serve.load.objectives import percentile

SCHEMES = ("int8", "int4")


@dataclasses.dataclass(frozen=True)
class Mode:
    """What is asked of a server, by how many at once."""

    workload: Workload
    users: int


def _mode(users: int, **rest: Any) -> Mode:
    return Mode(Workload(**rest), users)


MODES: dict[str, Mode] = {
    "one_user": _mode(1, num_dialogues=8, vary="exponential"),
    "users_16": _mode(16, num_dialogues=64, vary="exponential"),
    "second_turn": _mode(
        1, kind="dialogue", num_dialogues=4, prompt_tokens=1950, follow_tokens=16, new_tokens=32
    ),
    "shared_prefix": _mode(4, kind="shared-prefix", num_dialogues=16, prompt_tokens=32),
    "copy": _mode(1, kind="copy", num_dialogues=8, prompt_tokens=256, new_tokens=96),
    "copy_16": _mode(16, kind="copy", num_dialogues=48, prompt_tokens=256, new_tokens=96),
}
"""Prompts of 128 and answers of 64 tokens where nothing else is said; `exponential` lengths, since
what continuous batching gains grows with how they differ."""

FIGURES: dict[str, tuple[str, bool]] = {
    "new_tokens_per_s": ("tokens/s", True),
    "first_token_p50_s": ("s", False),
    "first_token_p95_s": ("s", False),
    "inter_token_p50_s": ("s", False),
    "inter_token_p95_s": ("s", False),
    "second_turn_first_token_s": ("s", False),
    "server_cpu_s_per_token": ("s/token", False),
    "peak_rss_bytes": ("bytes", False),
    "client_cpu_share": ("1", False),
}
"""Unit of each figure, and whether more is better."""
COMPARED = ("new_tokens_per_s", "first_token_p95_s", "inter_token_p95_s")
"""Figures of which the ratio to the best peer is told; above 1 is better than it."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """A server and the command that starts it."""

    name: str
    command: str
    is_ours: bool
    baseline: str | None = None
    """Name of the same server without guesses, where both are measured."""


def contenders(options: argparse.Namespace) -> list[Contender]:
    """Return our schemes, each with every kind of guesses, and the peers of the file."""
    found = []
    for scheme in options.schemes:
        words = [sys.executable, "-m", "deepseek", "serve", options.model, "--scheme", scheme]
        command = f"{shlex.join(words)} --threads {{threads}} --port {{port}} {options.ours}"
        name, more = f"deepseek {scheme}", {"text": "", "off": " --no-guesses"}
        more["draft"] = f" --draft {shlex.quote(options.draft or '')}"
        for kind in options.guesses:
            is_compared = kind != "off" and "off" in options.guesses
            found.append(
                Contender(
                    name if kind == "text" else f"{name} {kind}",
                    command + more[kind],
                    True,
                    f"{name} off" if is_compared else None,
                )
            )
    peers = json.loads(options.peers.read_text()) if options.peers else {}
    found += [Contender(name, given["command"], False) for name, given in peers.items()]
    return found


def measure(each: Contender, names: Sequence[str], threads: int, part: int) -> dict[str, Any]:
    """Start a server, return its figures in every mode, stop it."""
    command = each.command.replace("{threads}", str(threads))
    found = {}
    with ServerProcess(command) as server:
        target = Target(url=f"http://127.0.0.1:{server.port}")
        for name in names:
            print(f"{name}, {each.name} ...", file=sys.stderr, flush=True)
            mode = MODES[name]
            target = warm_up(target, mode.workload)
            dialogues = list(plan_dialogues(mode.workload, part))
            before_s = server.cpu_s() or 0.0
            run = asyncio.run(_drive(target, dialogues, mode.users))
            if run.was_interrupted:
                raise KeyboardInterrupt
            check(each, name, run, {d.number: [t.max_tokens for t in d.turns] for d in dialogues})
            found[name] = figures(run, (server.cpu_s() or 0.0) - before_s)
            found[name]["peak_rss_bytes"] = server.peak_rss_bytes() or 0
    return found


async def _drive(target: Target, dialogues: Sequence[Any], users: int) -> Run:
    async with Client(target) as client:
        return await run_load(client, dialogues, Load(concurrency=users))


def check(each: Contender, name: str, run: Run, asked: dict[int, list[int]]) -> None:
    """End the benchmark when an answer is missing or has not as many tokens as asked for."""
    for outcome in run.outcomes:
        want = asked[outcome.dialogue][outcome.turn]
        if outcome.error is not None or outcome.tokens != want:
            got = outcome.error or f"{outcome.tokens} tokens in place of {want}"
            sys.exit(f"serve: {each.name}, {name}: {got} {outcome.detail}")


def figures(run: Run, server_cpu_s: float) -> dict[str, float]:
    """Return the figures of one run by name."""
    first = sorted(each.first_token_s for each in run.outcomes)
    gaps = sorted(gap for each in run.outcomes for gap in each.token_gaps_s)
    tokens = sum(each.tokens for each in run.outcomes)
    found = {
        "new_tokens_per_s": tokens / run.wall_s,
        "first_token_p50_s": percentile(first, 50),
        "first_token_p95_s": percentile(first, 95),
        "inter_token_p50_s": percentile(gaps, 50),
        "inter_token_p95_s": percentile(gaps, 95),
        "server_cpu_s_per_token": server_cpu_s / tokens,
        "client_cpu_share": run.client_cpu_s / run.wall_s,
    }
    later = [each.first_token_s for each in run.outcomes if each.turn > 0]
    if later:
        found["second_turn_first_token_s"] = statistics.median(later)
    return found


def results(
    samples: dict[str, list[dict[str, Any]]], specs: list[Contender], about: dict[str, Any]
) -> list[Measurement]:
    """Return each server's figures, and of ours the ratios to the best peer of every round."""
    found = []
    command = "python benchmarks/serve.py --peers FILE"
    for name, mode in MODES.items():
        rounds = {
            spec.name: [each[name] for each in samples[spec.name]]
            for spec in specs
            if samples[spec.name] and name in samples[spec.name][0]
        }
        for spec in specs:
            conditions = {**about, "engine": spec.name, "mode": name, "users": mode.users}
            for figure, (unit, is_more_better) in FIGURES.items():
                values = [each[figure] for each in rounds.get(spec.name, []) if figure in each]
                if not values:
                    continue
                found.append(
                    summarize(figure, values, unit, conditions=conditions, command=command)
                )
                for word, others in compared(spec, specs) if figure in COMPARED else ():
                    peers = [rounds[each] for each in others]
                    found.append(
                        summarize(
                            f"{figure}_over_{word}",
                            ratios(values, figure, peers, is_more_better),
                            "1",
                            conditions=conditions,
                            command=command,
                        )
                    )
    return found


def compared(spec: Contender, specs: list[Contender]) -> list[tuple[str, list[str]]]:
    """Return what a server is compared with: a word for it, and the servers' names."""
    peers = [each.name for each in specs if not each.is_ours]
    found = [("best_peer", peers)] if spec.is_ours and peers else []
    return found if spec.baseline is None else [*found, ("no_guesses", [spec.baseline])]


def ratios(
    own: list[float], figure: str, peers: list[list[dict[str, float]]], is_more_better: bool
) -> list[float]:
    """Return how many times better than the best peer, round by round."""
    found = []
    for place, value in enumerate(own):
        others = [peer[place][figure] for peer in peers]
        best = max(others) if is_more_better else min(others)
        found.append(value / best if is_more_better else best / value)
    return found


def plot(path: Path, found: list[Measurement]) -> None:
    """Draw tokens a second of each server in each mode."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(str(item.conditions["mode"]) for item in found))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3.5), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        items = [
            item
            for item in found
            if item.name == "new_tokens_per_s" and item.conditions["mode"] == name
        ]
        labels = [str(item.conditions["engine"]) for item in items]
        colors = ["#1b6ca8" if label.startswith("deepseek") else "#b0b7bf" for label in labels]
        axis.barh(labels, [item.value for item in items], color=colors)
        axis.invert_yaxis()
        axis.set(title=name, xlabel="tokens/s")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> int:
    """Measure, and print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="name of ours, the peers' in FILE")
    parser.add_argument("--peers", type=Path, metavar="FILE", help="ours alone without it")
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES))
    parser.add_argument(
        "--guesses",
        nargs="+",
        default=["text"],
        choices=("off", "text", "draft"),
        help="of ours: none, by what the text said before, by the model of --draft",
    )
    parser.add_argument("--draft", metavar="MODEL", help="of the same tokenizer")
    parser.add_argument("--ours", default="", metavar="OPTIONS", help="of deepseek serve")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if "draft" in options.guesses and options.draft is None:
        parser.error("--guesses draft needs --draft MODEL")
    try:
        specs = contenders(options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--peers {options.peers}: {error}; see benchmarks/peers/README.md")
    samples: dict[str, list[dict[str, Any]]] = {spec.name: [] for spec in specs}
    for part in range(options.rounds):
        for spec in specs:
            samples[spec.name].append(measure(spec, options.modes, options.threads, part))
    about = {"model": options.model, "threads": options.threads, "rounds": options.rounds}
    found = results(samples, specs, about)
    if options.plot:
        plot(options.plot, found)
    if options.json:
        print(json.dumps({"measurements": [item.to_dict() for item in found]}, indent=2))
        return 0
    for item in found:
        spread = f"  [{item.spread.low:.3g} to {item.spread.high:.3g}]" if item.spread else ""
        value = item.value / 2**20 if item.unit == "bytes" else item.value
        unit = "MiB" if item.unit == "bytes" else item.unit
        where = f"{item.conditions['engine']:24} {item.conditions['mode']:14}"
        print(f"{where} {item.name:32} {value:9.4g} {unit}{spread}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped: nothing was kept")
