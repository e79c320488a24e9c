"""`deepseek adapt`: text and conversations, what they change, and what goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepseek import hub
from deepseek.data import conversation
from deepseek.models import Decoder
from deepseek.train.adapt import kind_of
from deepseek.train.held_out import measure_on, split_texts
from tests.cli.conftest import Run
from tests.data.test_conversations import chat_tokenizer
from tests.generate.conftest import TINY
from tests.train.test_resume import assert_same_bits

SMALL = ("--length", "32", "--batch", "4", "--steps", "6", "--precision", "float32")


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a tiny bundle with a chat template."""
    torch.manual_seed(1)
    model = Decoder(TINY)
    model.tokenizer = chat_tokenizer()
    return str(hub.save(model, tmp_path_factory.mktemp("chat") / "bundle", name="chat").path)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "sums.txt"
    path.write_text("".join(f"{a} and {b} are {a + b}.\n" for a in range(20) for b in range(20)))
    return path


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"{n} and 1?"},
                {"role": "assistant", "content": f"{n + 1}"},
            ]
        }
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_domain_is_learned_and_both_changes_are_shown(
    run: Run, chat_folder: str, text: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    general = tmp_path / "general.txt"
    general.write_text("What is known stays known, it is hoped. " * 30)
    words = ("adapt", chat_folder, str(text), "--out", out, "--general", str(general), *SMALL)
    ended = run(*words, "--rate", "1e-2", "--json")
    assert ended.code == 0, ended.err
    figures = {item["name"]: item for item in ended.object["measurements"]}
    assert figures["domain_change"]["value"] < -20
    assert figures["domain_change"]["conditions"]["text"] == "held-out.txt"
    assert figures["forgetting"]["conditions"]["text"] == "general.txt"
    assert "teacher writes" in ended.err and "measuring on" in ended.err
    settings = ended.object["settings"]
    assert (settings["method"], settings["replay"]) == ("full", 0.5)
    card = hub.Bundle.open(ended.object["bundle"]).card
    assert {"domain_change", "forgetting"} <= {item.name for item in card.measurements}
    again = run(*words, "--rate", "1e-2", "--json")
    assert again.object["bundle"] == ended.object["bundle"]
    assert run("train", f"{out}/adapt.json", "--out", out, "--prove").code == 0


def test_given_texts_are_replayed_beside_what_the_old_model_writes(
    run: Run, chat_folder: str, text: Path, tmp_path: Path
) -> None:
    known = tmp_path / "known.txt"
    known.write_text("Once there was a king who had seven daughters and no sons. " * 30)
    out = tmp_path / "out"
    words = ("adapt", chat_folder, str(text), "--out", str(out), "--general", str(known), *SMALL)
    ended = run(*words, "--replay", "0.5", "--replay-text", str(known), "--json")
    assert ended.code == 0, ended.err
    (stage,) = json.loads((out / "adapt.json").read_text())["stages"]
    learned, written, given = stage["data"]
    assert (learned["target"], learned["weight"]) == ("tokens", 0.5)
    assert (written["path"], written["weight"]) == ("teacher-text", 0.25)
    assert (given["path"], given["target"], given["weight"]) == (str(known), "teacher", 0.25)
    assert run("train", str(out / "adapt.json"), "--out", str(out), "--prove").code == 0


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_conversations_are_learned(
    run: Run, chat_folder: str, chat: Path, tmp_path: Path, method: str
) -> None:
    general = tmp_path / "general.txt"
    general.write_text("What is known stays known, it is hoped. " * 30)
    words = ("adapt", chat_folder, str(chat), "--out", str(tmp_path / "out"), *SMALL)
    words += ("--method", method, "--rate", "2e-2", "--general", str(general))
    ended = run(*words, "--json")
    assert ended.code == 0, ended.err
    figures = {item["name"]: item for item in ended.object["measurements"]}
    assert figures["domain_change"]["value"] < -10
    assert figures["forgetting"]["conditions"]["text"] == "general.txt"
    again = run(*words)
    assert "held-out.jsonl, to be learned" in again.out and "general.txt, to be kept" in again.out
    adapter = tmp_path / "out" / "adapters" / "adapt" / "adapter_model.safetensors"
    assert adapter.is_file()


def test_only_answers_are_measured(chat_folder: str, chat: Path) -> None:
    model = hub.load(chat_folder, dtype="float32")
    assert isinstance(model, Decoder) and model.tokenizer is not None
    (found,) = measure_on(model, str(chat))
    losses = []
    for line in chat.read_text().splitlines():
        document = conversation(json.loads(line)["messages"], model.tokenizer)
        tokens = torch.tensor([document.tokens])
        chances = model(tokens).logits[0, :-1].log_softmax(-1)
        each = -chances.gather(1, tokens[0, 1:, None])[:, 0]
        losses.append(each[torch.tensor(document.targets)[1:]])
    expected = torch.cat(losses)
    assert found.conditions["tokens"] == len(expected)
    assert found.value == pytest.approx(expected.mean().exp().item(), rel=1e-4)


@pytest.mark.dist
def test_workers_end_in_the_same_bits(chat_folder: str, text: Path, tmp_path: Path) -> None:
    ends = []
    for workers in ("1", "2"):
        out = str(tmp_path / workers)
        words = ["adapt", chat_folder, str(text), "--out", out, "--general", str(text), *SMALL]
        words += ["--micro-batch", "2", "--threads", "1", "--workers", workers, "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "deepseek", *words], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        ends.append(Path(json.loads(done.stdout)["bundle"]))
    assert_same_bits(*ends)


def test_a_gate_that_fails_is_exit_code_1(
    run: Run, chat_folder: str, text: Path, tmp_path: Path
) -> None:
    words = ("adapt", chat_folder, str(text), "--out", str(tmp_path / "out"), *SMALL)
    words += ("--replay", "0", "--general", str(text))
    # it got better, and not by 99 %
    ended = run(*words, "--most-forgotten", "-99")
    assert ended.code == 1
    assert "must be at most -99.0 % higher than before" in ended.err
    assert run(*words, "--most-forgotten", "1").code == 0


def test_mistakes_are_one_line(run: Run, chat_folder: str, text: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"text": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n')
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("")
    short.write_text("one\n" * 30)
    out = ("--out", str(tmp_path / "out"))
    for words, must in (
        ((chat_folder, str(empty), *out), "some lines of text"),
        ((chat_folder, str(short), *out), "Take a shorter --length or more text"),
        ((chat_folder, "nowhere.txt", *out), "a file or folder of"),
        ((chat_folder, str(text), *out, "--replay", "1"), "from 0 to below 1"),
        (
            (chat_folder, str(text), *out, "--replay", "0", "--replay-text", str(text)),
            "Take a --replay of 0.25",
        ),
        ((chat_folder, str(text), *out, "--replay-text", "nowhere.txt"), "a file or folder of"),
        ((chat_folder, str(text), *out, "--rate", "-1"), "must be a positive number"),
        ((chat_folder, str(text), *out, "--beta", "1"), "left out"),
        ((chat_folder, str(pairs), *out, "--replay", "0.5"), "left out"),
        ((chat_folder, str(pairs), *out, "--method", "qlora"), "full or lora"),
        ((chat_folder, str(mixed), *out), "texts, or conversations"),
    ):
        ended = run("adapt", *words)
        assert ended.code == 2, words
        assert must in ended.err and ended.err.count("\n") == 1, ended.err


def test_kinds_of_data(text: Path, chat: Path, tmp_path: Path) -> None:
    assert kind_of(text) == "text" and kind_of(chat) == "conversations"
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "a"}\n')
    assert kind_of(lines) == "text"


def test_nothing_that_is_kept_back_is_learned(text: Path, chat: Path, tmp_path: Path) -> None:
    for path in (text, chat):
        learned, kept = split_texts(path, tmp_path / path.stem)
        taught = learned.read_text()
        if path is chat:
            back = kept.read_text().splitlines()
            assert len(back) == 3 and not set(back) & set(taught.splitlines())
        else:
            parts = json.loads(taught)["text"], kept.read_text()
            assert "".join(parts) == path.read_text()
            assert 0.04 < len(parts[1]) / len(path.read_text()) < 0.06
