"""The verbs on a tiny bundle: what they print, what they return as an object, what they refuse."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepseek import hub
from deepseek.cli.main import verb_parser
from deepseek.cli.verbs.eval import OPTIONS
from deepseek.evaluate import ExitCalibration, SuiteSettings
from deepseek.generate import Exits
from tests.cli.conftest import Run


def test_generate_streams_the_text_and_repeats_itself(run: Run, tiny_folder: str) -> None:
    words = ["generate", tiny_folder, "--prompt", "ab", "--max-tokens", "5", "--json"]
    greedy = run(*words)
    assert greedy.code == 0
    assert greedy.object["finish_reason"] in ("stop", "length")
    assert {m["name"] for m in greedy.object["measurements"]} == {"first_token_s", "total_s"}
    seeded = [*words, "--temperature", "1", "--seed", "3"]
    first, again = run(*seeded), run(*seeded)
    assert first.object["token_ids"] == again.object["token_ids"]
    assert run(*words[:-1]).out == greedy.object["text"] + "\n"


def test_generate_reads_standard_input(
    run: Run, tiny_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pipe(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    pipe(b"ab")
    piped = run("generate", tiny_folder, "--max-tokens", "3", "--json")
    given = run("generate", tiny_folder, "--prompt", "ab", "--max-tokens", "3", "--json")
    assert piped.object["token_ids"] == given.object["token_ids"]
    pipe(b"\xff\xfe")
    refused = run("generate", tiny_folder)
    assert refused.code == 2 and "must be UTF-8 text" in refused.err


def test_generate_goes_on_behind_the_context(run: Run, tiny_folder: str) -> None:
    words = ["generate", tiny_folder, "--prompt", "ab " * 600, "--max-tokens", "5", "--json"]
    refused = run(*words)
    assert refused.code == 2 and "--context" in refused.err and "--memory" in refused.err
    longer = run(*words, "--context", "4096")
    assert longer.object["num_prompt_tokens"] > 512
    assert run(*words, "--context", "512", "--memory", "512").code == 0
    wrong = run(*words, "--memory", "1000")
    assert wrong.code == 2 and "max_len of Memory must be a whole multiple of 64" in wrong.err


def test_generate_lets_tokens_leave_early(run: Run, tiny_folder: str, tmp_path: Path) -> None:
    words = ["generate", tiny_folder, "--prompt", "ab", "--max-tokens", "8", "--json"]
    early = run(*words, "--exits", "0")
    assert early.object["runs_on"] == {"engine": False, "dtype": "float32"}
    assert "runs through PyTorch: tokens leave early" in early.err
    assert early.object["depths"] == [2, *[1] * (len(early.object["depths"]) - 1)]
    assert run(*words).object["depths"] is None
    mean = sum(early.object["depths"]) / len(early.object["depths"])
    told = {each["name"]: each["value"] for each in early.object["measurements"]}
    assert told["mean_layers"] == mean
    exits = Exits(layers=(1,), threshold=0)
    file = tmp_path / "exits.json"
    found = ExitCalibration(exits=exits, delta=0.1, confidence=0.95, measurements=())
    found.save(file)
    assert run(*words, "--exits", str(file)).object["token_ids"] == early.object["token_ids"]
    dataclasses.replace(found, exits=None).save(file)
    for value, message in (
        (str(file), "a calibration that found a threshold"),
        ("2", "threshold of Exits must be from 0 to 1"),
        (str(tmp_path / "none.json"), "calibration of early exit must be a file"),
    ):
        refused = run(*words, "--exits", value)
        assert refused.code == 2 and message in refused.err
    refused = run(*words, "--exits", "0.2", "--scheme", "int8")
    assert refused.code == 2 and "Load it without a scheme" in refused.err


def test_generate_with_chat_uses_the_template(run: Run, tiny_folder: str) -> None:
    words = ["--max-tokens", "1", "--json"]
    chat = run("generate", tiny_folder, "--chat", "--prompt", "hi", "--system", "be", *words)
    assert chat.object["num_prompt_tokens"] == len("[system]be[user]hi[assistant]")
    plain = run("generate", tiny_folder, "--prompt", "hi", "--system", "be")
    assert plain.code == 2 and "--system of deepseek generate must be used with --chat" in plain.err


def test_without_a_tokenizer_only_text_is_refused(run: Run, silent_folder: Path) -> None:
    for words in (["generate", "--prompt", "x"], ["generate", "--chat", "--prompt", "x"], ["chat"]):
        ended = run(words[0], str(silent_folder), *words[1:])
        assert ended.code == 2 and "tokenizer" in ended.err
    assert run("show", str(silent_folder)).code == 0


def test_show_and_verify(run: Run, tiny_folder: str, tmp_path: Path) -> None:
    shown = run("show", tiny_folder, "--verify", "--json")
    assert shown.object["card"]["name"] == "tiny" and shown.object["verified"]
    assert "for tests" in run("show", tiny_folder).out
    copy = hub.pull(tiny_folder, to=tmp_path / "copy").path
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    damaged = run("show", str(copy), "--verify")
    assert damaged.code == 2 and "as it was written" in damaged.err


def test_pull_to_a_folder_and_list(
    run: Run, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    pulled = run("pull", tiny_folder, "--to", str(tmp_path / "here"), "--json")
    assert pulled.code == 0 and Path(pulled.object["path"]) == tmp_path / "here"
    listed = run("list", "--json")
    assert listed.object["bundles"] == []
    assert "smollm2-135m" in listed.object["can_be_pulled"]
    run("pull", tiny_folder)
    assert len(run("list", "--json").object["bundles"]) == 1


def test_doctor_says_what_runs_and_why(run: Run) -> None:
    found = run("doctor", "--json").object
    assert found["machine"]["cores"] >= 1
    operations = {row["operation"] for row in found["execution"]}
    assert operations == {"linear", "attention", "sampling"}
    assert all(row["why"] for row in found["execution"])
    assert "torch" in run("doctor").out


def test_every_option_of_eval_is_a_setting() -> None:
    fields = {field.name for field in dataclasses.fields(SuiteSettings)}
    assert {flag[2:].replace("-", "_") for flag, _ in OPTIONS} | {"max_tokens"} == fields


def test_eval_shows_measurements_and_saves_them(run: Run, tiny_folder: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    folder = str(hub.pull(tiny_folder, to=tmp_path / "copy").path)
    words = ["--text", str(text), "--window", "64", "--max-tokens", "300", "--save", "--json"]
    ended = run("eval", folder, "--tasks", "perplexity,divergence", "--reference", folder, *words)
    assert ended.code == 0, ended.err
    found = {item["name"]: item for item in ended.object["measurements"]}
    assert found["perplexity"]["value"] > 1 and found["perplexity"]["spread"] is not None
    assert found["kl_divergence"]["value"] == 0.0
    import shlex

    for item in found.values():
        words = shlex.split(item["command"])
        assert words[:2] == ["deepseek", "eval"] and "--dtype" in words
        verb_parser("eval").parse_args(words[2:])
    card = json.loads((Path(folder) / "bundle.json").read_text())
    assert {item["name"] for item in card["measurements"]} == set(found)
    assert "perplexity" in run("show", folder).out


@pytest.mark.parametrize(
    "words,said",
    [
        (["--tasks", "poetry"], "task of suite must be one of"),
        (["--tasks", "divergence"], "Give the model to compare with: --reference MODEL"),
        (["--text", "/nowhere.txt"], "nowhere.txt"),
    ],
)
def test_eval_refuses(words: list[str], said: str, run: Run, tiny_folder: str) -> None:
    ended = run("eval", tiny_folder, *words)
    assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1


def test_chat_keeps_the_dialogue(
    run: Run, tiny_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n/reset\nthree\n"))
    ended = run("chat", tiny_folder, "--max-tokens", "2", "--temperature", "0", "--json")
    roles = [message["role"] for message in ended.object["messages"]]
    assert roles == ["user", "assistant"]
    assert ended.object["messages"][0]["content"] == "three"


def test_chat_survives_a_question_that_is_too_long(
    run: Run, tiny_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 600 + "\nshort\n"))
    ended = run("chat", tiny_folder, "--max-tokens", "2", "--json")
    assert ended.code == 0 and "/reset" in ended.err
    assert [m["content"] for m in ended.object["messages"] if m["role"] == "user"] == ["short"]


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_program(tiny_folder: str) -> None:
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "deepseek", "chat", tiny_folder, "--max-tokens", "400"]
    process = subprocess.Popen(
        [*command, "--temperature", "0"],
        stdin=child,
        stdout=child,
        stderr=child,
        close_fds=True,
        # a shell makes programs in the background deaf to it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(child)
    said = b""

    def wait_for(mark: bytes, after: int = 0, limit_s: float = 90) -> None:
        nonlocal said
        end = time.monotonic() + limit_s
        while mark not in said[after:] and time.monotonic() < end:
            said += os.read(parent, 4096)
        assert mark in said[after:], said

    wait_for(b"> ")
    os.write(parent, b"hello\n")
    wait_for(b"hello\r\n")
    before = len(said)
    said += os.read(parent, 64)
    process.send_signal(signal.SIGINT)
    wait_for(b"> ", before)
    assert process.poll() is None
    os.write(parent, b"/quit\n")
    assert process.wait(timeout=60) == 0
    os.close(parent)
