"""The benchmark beside other servers: its figures, its ratios, and what ends it."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serve import MODES, Contender, check, contenders, figures, ratios, results
from deepseek.records import Measurement
from deepseek.serve.load import Load, Outcome, Run
from tests.house import REPO

FAKE = f"{shlex.quote(sys.executable)} {REPO / 'tests/serve/load/fake_server.py'} {{port}}"


def bench(tmp_path: Path, *words: str, **peers: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmark on peers that are started by commands."""
    path = tmp_path / "peers.json"
    path.write_text(json.dumps({name: {"command": text} for name, text in peers.items()}))
    command = [sys.executable, "benchmarks/serve.py", "--schemes", "--peers", str(path), *words]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True)


def test_peers_are_asked_by_turns(tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    words = ["--modes", "one_user", "--rounds", "2", "--json", "--plot", str(plot)]
    done = bench(tmp_path, *words, one=FAKE, two=FAKE)
    assert done.returncode == 0, done.stderr
    asked = [line for line in done.stderr.splitlines() if line.endswith("...")]
    assert asked == ["one_user, one ...", "one_user, two ..."] * 2
    found = [Measurement.from_dict(each) for each in json.loads(done.stdout)["measurements"]]
    rates = {each.conditions["engine"]: each for each in found if each.name == "new_tokens_per_s"}
    assert set(rates) == {"one", "two"} and all(each.value > 0 for each in rates.values())
    assert not any("over" in each.name for each in found) and "one_user" in plot.read_text()


def test_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    done = bench(tmp_path, "--peers", str(tmp_path / "gone.json"))
    assert done.returncode == 2 and "see benchmarks/peers/README.md" in done.stderr


def answer(number: int, *times: float, **rest: Any) -> Outcome:
    """Return an answer that was sent at 0, with the times of its pieces."""
    ended = {"planned_s": 0.0, "sent_s": 0.0, "ended_s": times[-1]}
    return Outcome(dialogue=number, piece_times_s=list(times), **ended, **rest)


def test_figures_are_those_of_the_run() -> None:
    outcomes = [answer(0, 1.0, 1.5, 2.0), answer(0, 0.25, 0.5, turn=1)]
    run = Run(load=Load(concurrency=1), outcomes=outcomes, wall_s=4.0, client_cpu_s=0.04)
    found = figures(run, server_cpu_s=2.0)
    assert found["new_tokens_per_s"] == 1.25 and found["server_cpu_s_per_token"] == 0.4
    assert found["first_token_p50_s"] == 0.625 and found["second_turn_first_token_s"] == 0.25
    assert found["inter_token_p50_s"] == 0.5 and found["client_cpu_share"] == 0.01


def test_an_answer_that_is_short_ends_it() -> None:
    spec = Contender("peer", "", False)
    run = Run(load=Load(concurrency=1), outcomes=[answer(0, 1.0, 2.0)])
    check(spec, "copy", run, {0: [2]})
    with pytest.raises(SystemExit, match="peer, copy: 2 tokens in place of 3"):
        check(spec, "copy", run, {0: [3]})
    run.outcomes[0].error = "dropped"
    with pytest.raises(SystemExit, match="peer, copy: dropped"):
        check(spec, "copy", run, {0: [2]})


def test_ratios_are_to_the_best_peer_of_the_round() -> None:
    peers = [[{"x": 10.0}, {"x": 4.0}], [{"x": 5.0}, {"x": 8.0}]]
    assert ratios([20.0, 4.0], "x", peers, True) == [2.0, 0.5]
    assert ratios([2.5, 8.0], "x", peers, False) == [2.0, 0.5]


def options(*guesses: str, draft: str | None = None) -> argparse.Namespace:
    asked: dict[str, Any] = {"schemes": ["int8"], "model": "m", "ours": "", "peers": None}
    return argparse.Namespace(guesses=guesses, draft=draft, **asked)


def test_guesses_are_compared_with_the_same_server_without_them() -> None:
    off, text, draft = contenders(options("off", "text", "draft", draft="a folder"))
    assert off.command.endswith("--no-guesses") and "--draft" not in text.command
    assert draft.command.endswith("--draft 'a folder'")
    specs = [off, text, draft]
    figure = {"inter_token_p95_s": 1.0, "first_token_p95_s": 1.0}
    samples = {
        each.name: [{"copy": {"new_tokens_per_s": rate, **figure}}]
        for each, rate in zip(specs, (20.0, 30.0, 10.0), strict=True)
    }
    found = {
        each.conditions["engine"]: each.value
        for each in results(samples, specs, {})
        if each.name == "new_tokens_per_s_over_no_guesses"
    }
    assert found == {"deepseek int8": 1.5, "deepseek int8 draft": 0.5}
    assert all(each.baseline is None for each in contenders(options("text", "draft", draft="x")))


def test_a_draft_must_be_named(tmp_path: Path) -> None:
    done = bench(tmp_path, "--guesses", "draft")
    assert done.returncode == 2 and "needs --draft MODEL" in done.stderr


def test_only_ours_is_compared() -> None:
    specs = [Contender("deepseek int8", "", True), Contender("peer", "", False)]
    one = {"new_tokens_per_s": 30.0, "inter_token_p95_s": 0.1, "first_token_p95_s": 1.0}
    two = {"new_tokens_per_s": 20.0, "inter_token_p95_s": 0.2, "first_token_p95_s": 0.5}
    samples = {"deepseek int8": [{"copy": one}], "peer": [{"copy": two}]}
    found = {
        (each.conditions["engine"], each.name): each.value for each in results(samples, specs, {})
    }
    assert found["deepseek int8", "new_tokens_per_s_over_best_peer"] == 1.5
    assert found["deepseek int8", "inter_token_p95_s_over_best_peer"] == 2.0
    assert found["deepseek int8", "first_token_p95_s_over_best_peer"] == 0.5
    assert not any("over" in name for engine, name in found if engine == "peer")
    assert set(MODES) >= {"one_user", "users_16", "second_turn", "copy", "copy_16"}
