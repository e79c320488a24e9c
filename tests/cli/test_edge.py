"""`--target edge` at the command line: what is chosen is told, and a cap that is too small is one
line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from deepseek import hub
from deepseek.cli.edge import byte_count
from deepseek.cli.main import main
from deepseek.ops.cpu import why_missing
from tests.hub.tiny import tiny_decoder, tiny_tokenizer

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    model = tiny_decoder(vocab_size=330)
    model.tokenizer = tiny_tokenizer()
    hub.save(model, tmp_path / "model")
    return str(tmp_path / "model")


def test_a_plan_is_told_and_part_of_the_answer(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", folder, "--prompt", "a b", "--max-tokens", "3", "--json"]
    words += ["--target", "edge", "--memory-cap", "4GB", "--rows", "2", "--context", "64"]
    assert main(words) == 0
    printed = capsys.readouterr()
    edge = json.loads(printed.out)["edge"]
    assert (edge["rows"], edge["context"], edge["limit_bytes"]) == (2, 64, 4 * 10**9)
    assert edge["peak_bytes"] <= edge["limit_bytes"]
    assert "edge: int8-kv8" in printed.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target", "edge", "--memory-cap", "1MB"], "must be at least"),
        (["--memory-cap", "1GB"], "used with --target edge"),
        (["--rows", "2"], "used with --target edge"),
        (["--target", "edge", "--rows", "17"], "from 1 to 16"),
        (["--target", "edge", "--dtype", "float32"], "left out with --target edge"),
        (["--target", "edge", "--attention", "routed"], "auto or dense"),
    ],
)
def test_what_cannot_be_is_one_line(
    folder: str, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["generate", folder, "--prompt", "a", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and said in printed.err and printed.err.count("\n") == 1


def test_sizes_are_read_in_both_kinds_of_units() -> None:
    assert byte_count("512MiB") == 512 * 2**20 and byte_count("4GB") == 4 * 10**9
    assert byte_count("1.5 gib") == 3 * 2**29 and byte_count("77") == 77
    for word in ("", "MB", "4TB", "-1MB", "4 4"):
        with pytest.raises(argparse.ArgumentTypeError, match="512MiB"):
            byte_count(word)
