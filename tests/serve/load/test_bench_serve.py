"""`deepseek bench serve`: its figures, tables, kept measurements, stops, and users' mistakes."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from deepseek.cli.main import main
from tests.serve.load.fake_server import DONE, STREAM, Step, http, piece, plain, serving, usage

FAKE = f"{shlex.quote(sys.executable)} {Path(__file__).with_name('fake_server.py')} {{port}}"
FEW = ["--requests", "6", "--prompt-tokens", "8", "--new-tokens", "4"]


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def object(self) -> dict[str, Any]:
        """The one JSON object on standard output."""
        return json.loads(self.out)

    def values(self, name: str, **where: object) -> list[float]:
        """Return the values of a figure where its conditions are as told."""
        return [
            each["value"]
            for each in self.object["measurements"]
            if each["name"] == name
            and all(each["conditions"].get(key) == value for key, value in where.items())
        ]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs `deepseek bench serve`."""

    def run(*words: str) -> Ended:
        capsys.readouterr()
        code = main(["bench", "serve", *words])
        return Ended(code, *capsys.readouterr())

    return run


def test_every_load_is_measured(bench: Any) -> None:
    with serving() as server:
        found = bench(server.url, *FEW, "--concurrency", "1", "3", "--json")
    assert found.code == 0 and found.object["model"] == "fake"
    assert [each["load"] for each in found.object["loads"]] == ["1 at once", "3 at once"]
    assert found.values("requests_answered") == [6, 6] and found.values("errors") == [0, 0]
    for statistic in ("p50", "p90", "p95", "p99", "max"):
        assert len(found.values("first_token_s", statistic=statistic, concurrency=3)) == 1
    assert len(server.asked) == 2 * 6 + 2  # two to warm up
    assert len({each["prompt"] for each in server.asked}) == 14
    assert all(len(each["prompt"].split()) == 8 for each in server.asked)
    assert all(each["max_tokens"] == 4 for each in server.asked)
    command = found.object["measurements"][0]["command"]
    assert command.startswith(f"deepseek bench serve {server.url} --prompt-tokens 8")
    assert "--concurrency 1 3" in command


def test_the_same_seed_asks_the_same(bench: Any) -> None:
    asked = []
    for seed in ("7", "7", "8"):
        with serving() as server:
            assert bench(server.url, *FEW, "--concurrency", "2", "--seed", seed).code == 0
        asked.append(sorted(each["prompt"] for each in server.asked))
    assert asked[0] == asked[1] != asked[2]


def test_a_key_is_sent_and_not_written_down(bench: Any, tmp_path: Path) -> None:
    keep = tmp_path / "kept.jsonl"
    with serving() as server:
        words = ["--concurrency", "1", "--api-key", "hush", "--keep", str(keep), "--json"]
        found = bench(server.url, *FEW, *words)
    assert all(each["authorization"] == "bearer hush" for each in server.headers)
    assert "hush" not in found.out + found.err + keep.read_text()


def test_tables_are_for_people(bench: Any) -> None:
    with serving() as server:
        words = ["--workload", "dialogue", "--endpoint", "chat", "--goodput", "ttft:9", "e2e:9"]
        found = bench(server.url, *FEW, "--rate", "200", *words)
    assert found.code == 0
    for word in (
        "200/s",
        "time to first token, ms",
        "p99",
        "turn 2",
        "goodput share",
        "client cpu",
    ):
        assert word in found.out
    assert "errors, the first" not in found.out and "Traceback" not in found.err


def test_a_sweep_has_rates_between_its_ends(bench: Any) -> None:
    def reply(asked: dict[str, Any]) -> list[Step]:
        return [STREAM, 0.02, piece("a", "stop"), DONE]

    with serving(reply) as server:
        found = bench(server.url, *FEW, "--sweep", "2", "--json")
    loads = [each["load"] for each in found.object["loads"]]
    assert loads[:2] == ["1 at once", "6 at once"] and len(loads) == 4
    slow, fast, *_ = found.values("requests_per_s")
    rates = [float(load.removesuffix("/s")) for load in loads[2:]]
    assert slow < rates[0] < rates[1] < fast


def test_errors_are_counted_and_shown(bench: Any) -> None:
    count = 0

    def reply(asked: dict[str, Any]) -> list[Step]:
        nonlocal count
        count += 1
        return plain(asked) if count % 2 else [http(429, b'{"error": {"message": "too many"}}')]

    with serving(reply) as server:
        told = bench(server.url, *FEW, "--concurrency", "1")
        found = bench(server.url, *FEW, "--concurrency", "1", "--json")
    assert told.code == found.code == 0
    assert "http_429" in told.out and "too many" in told.out
    assert found.values("errors_of_kind", kind="http_429") == [3]
    assert found.object["loads"][0]["errors"] == {"http_429": "too many"}


def test_nothing_answered_is_a_failure(bench: Any) -> None:
    count = 0

    def reply(asked: dict[str, Any]) -> list[Step]:
        nonlocal count
        count += 1
        return plain(asked) if count <= 2 else [None]

    with serving(reply) as server:
        found = bench(server.url, *FEW, "--concurrency", "2", "--json")
    assert found.code == 1 and "not one request was answered" in found.err
    assert found.values("errors_of_kind", kind="dropped") == [6]


def test_a_server_that_refuses_is_told_at_once(bench: Any) -> None:
    with serving(lambda asked: [http(401, b'{"error": {"message": "who are you"}}')]) as server:
        found = bench(server.url, *FEW)
        assert found.code == 2 and found.out == "" and len(server.asked) == 2
    assert "a server that answers; got 'http_401: who are you'" in found.err
    gone = bench(server.url, *FEW)
    assert gone.code == 2 and "lists its models" in gone.err and gone.err.count("\n") == 1


def test_what_was_measured_is_kept(bench: Any, tmp_path: Path) -> None:
    keep, few = str(tmp_path / "kept.jsonl"), [*FEW, "--keep", str(tmp_path / "kept.jsonl")]
    with serving() as server:
        first = bench(server.url, *few, "--concurrency", "1", "--json")
        asked = len(server.asked)
        both = bench(server.url, *few, "--concurrency", "1", "2", "--json")
        assert len(server.asked) == asked + 6 + 2
        assert both.values("wall_s", concurrency=1) == first.values("wall_s")
        other = bench(server.url, *few, "--seed", "1", "--concurrency", "1")
    assert other.code == 2 and "keep of bench serve must be of the same measurement" in other.err
    assert "(workload differ)" in other.err and keep in other.err


def test_a_plot_is_drawn(bench: Any, tmp_path: Path) -> None:
    path = tmp_path / "load.svg"
    with serving() as server:
        found = bench(server.url, *FEW, "--concurrency", "1", "2", "--plot", str(path))
    assert found.code == 0 and "users at once" in path.read_text() and str(path) in found.out


def test_a_text_is_read_from_a_file(bench: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one two three four five six seven eight nine ten eleven twelve")
    with serving() as server:
        words = ["--concurrency", "1", "--workload", "text", str(path)]
        assert bench(server.url, *FEW, *words).code == 0
    assert all(
        set(each["prompt"].split()) <= set(path.read_text().split()) for each in server.asked
    )


def test_users_may_hang_up(bench: Any) -> None:
    def reply(asked: dict[str, Any]) -> list[Step]:
        return [STREAM, *([piece("a"), 0.005] * 8), piece("", "length"), usage(8, 8), DONE]

    with serving(reply) as server:
        words = ["--concurrency", "2", "--hang-up", "0.5", "--requests", "20", "--json"]
        found = bench(server.url, *FEW, *words)
    (hung,) = found.values("hung_up")
    assert 4 <= hung <= 16 and found.values("requests_answered") == [20 - hung]
    assert found.values("errors") == [0]


def test_a_server_is_started_and_its_costs_are_told(bench: Any) -> None:
    found = bench("--launch", FAKE, *FEW, "--concurrency", "2", "--json")
    assert found.code == 0
    (cpu_s,), (peak,) = found.values("server_cpu_s"), found.values("server_peak_rss_bytes")
    assert 0 <= cpu_s < 30 and peak > 5 << 20
    told = bench("--launch", FAKE, *FEW, "--concurrency", "2")
    assert "server cpu s" in told.out and "MiB" in told.out
    ended = bench("--launch", f"{sys.executable} -c 'raise SystemExit(3)' {{port}}", *FEW)
    assert ended.code == 2 and "got 'exit 3: '" in ended.err


def listen_to_ctrl_c() -> None:
    """Undo what a shell does to programs that it starts in the background: they are deaf to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_shows_what_there_is(tmp_path: Path) -> None:
    """The first load is answered; in the second the server hangs and the user gives up."""
    count = 0

    def reply(asked: dict[str, Any]) -> list[Step]:
        nonlocal count
        count += 1
        return plain(asked) if count <= 2 + 6 + 2 else [STREAM, piece("a"), 60.0]

    with serving(reply) as server:
        deepseek = str(Path(sys.executable).parent / "deepseek")
        keep = tmp_path / "kept.jsonl"
        words = [deepseek, "bench", "serve", server.url, *FEW, "--concurrency", "1", "2", "--json"]
        process = subprocess.Popen(
            [*words, "--keep", str(keep)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=listen_to_ctrl_c,
        )
        until = time.monotonic() + 120
        while count < 12:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until, count
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    found = Ended(130, out, err)
    assert found.object["interrupted"] is True
    assert found.values("requests_answered", concurrency=1) == [6]
    assert found.values("requests_answered", concurrency=2) == [2]
    assert keep.read_text().count("\n") == 2  # what was stopped is measured again


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no server": ([], "URL of bench serve must be given, or started by --launch"),
    "a launch without a port": (["--launch", "sleep 1"], "URL of bench serve must be given"),
    "no address": (["127.0.0.1"], "an address like http"),
    "two loads": (["http://h", "--rate", "1", "--concurrency", "2"], "concurrency and rate"),
    "an unknown workload": (["http://h", "--workload", "poems"], "one of random"),
    "a text without a file": (["http://h", "--workload", "text"], "behind text one FILE"),
    "a file without text": (["http://h", "--workload", "copy", "f.txt"], "behind text one FILE"),
    "a file that is not there": (["http://h", "--workload", "text", "no.txt"], "no.txt"),
    "a bound that is none": (["http://h", "--goodput", "p95:1"], "NAME:SECONDS"),
    "a rate of nothing": (["http://h", "--rate", "0"], "must be a number above 0; got '0'"),
    "a share above 1": (["http://h", "--hang-up", "2"], "a number from 0 to 1; got '2'"),
    "a plot elsewhere": (["http://h", "--plot", "/no/such/a.svg"], "in a folder that is there"),
    "a plot of a kind": (["http://h", "--plot", "a.doc"], "ends in .svg, .png, .pdf"),
    "a place to keep": (["http://h", "--keep", "/no/such/a"], "in a folder that is there"),
    "another form's option": (["http://h", "--lengths", "9"], "--lengths of bench serve must be"),
    "bench's own option": (["http://h", "--dtype", "float32"], "--dtype of bench serve must be"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_told_in_one_line(bench: Any, case: str, tmp_path: Path) -> None:
    os.chdir(tmp_path)
    words, said = MISTAKES[case]
    found = bench(*words)
    assert found.code == 2 and said in found.err and found.err.count("\n") == 1, found.err


@pytest.mark.parametrize("form", [["smollm2-135m"], ["attention", "smollm2-135m"]])
def test_other_forms_refuse_its_options(
    capsys: pytest.CaptureFixture[str], form: list[str]
) -> None:
    assert main(["bench", *form, "--rate", "1"]) == 2
    said = "--rate of bench must be given behind the word serve: deepseek bench serve URL"
    assert said in capsys.readouterr().err
