"""Texts on the disk become documents of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek.data import read_texts, text_files, tokenized
from deepseek.errors import ConfigError, FormatError
from tests.generate.conftest import byte_tokenizer


def test_files_and_lines_are_documents(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("one text")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "second"}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    files = text_files(tmp_path)
    assert [file.name for file in files] == ["a.jsonl", "b.txt"]
    assert list(read_texts(files)) == ["first", "second", "one text"]


def test_the_end_of_a_text_is_a_token() -> None:
    tokenizer = byte_tokenizer(bos_token="<begin>", eos_token="<end>")
    first, second = tokenized(iter(["ab", "c"]), tokenizer)
    assert list(first.tokens)[-1] == tokenizer.eos_token_id == list(second.tokens)[-1]
    assert tokenizer.decode(first.tokens) == "ab"


@pytest.mark.parametrize("line", ["{", '{"words": "x"}', '{"text": 3}', "[]"])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(FormatError, match="line 2"):
        list(read_texts([path]))


def test_what_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match="UTF-8"):
        list(read_texts([path]))
    with pytest.raises(ConfigError, match="file or folder"):
        text_files(tmp_path / "nothing")
