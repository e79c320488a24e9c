"""The default text and files in its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek.errors import ConfigError, FormatError
from deepseek.evaluate import Corpus, default_corpus, read_corpus


def test_default_text_is_long_clean_and_without_repeats() -> None:
    corpus = default_corpus()
    paragraphs = corpus.text.rstrip("\n").split("\n\n")
    assert len(corpus.text) > 250_000
    assert len({" ".join(each.split()) for each in paragraphs}) == len(paragraphs)
    assert "\n*****" not in corpus.text
    assert default_corpus().sha256 == corpus.sha256


def test_conditions_say_which_text_it_was() -> None:
    facts = default_corpus().conditions()
    assert facts["text"] == "python-topics"
    assert len(str(facts["text_sha256"])) == 64
    assert facts["text_characters"] == len(default_corpus().text)
    assert str(facts["python"]).startswith("3.")


@pytest.mark.parametrize("least", [1, 500, 10**9])
def test_documents_joined_are_the_text(least: int) -> None:
    corpus = default_corpus()
    documents = corpus.documents(least)
    assert corpus.separator.join(documents) == corpus.text
    assert all(len(each) >= least - len(corpus.separator) for each in documents[:-1])


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffGrüße\r\n你好".encode())
    corpus = read_corpus(path)
    assert corpus.text == "Grüße\n你好"
    assert corpus.flag() == str(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "something in it"),
        (b" \n\t", "something in it"),
        (b"abc\0def", "zero byte at offset 3"),
        (b"gr\xfc\xdfe", "byte 0xfc at offset 2"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message):
        read_corpus(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be there"):
        read_corpus(tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="not a folder"):
        read_corpus(tmp_path)


def test_text_from_python_has_no_command() -> None:
    assert not Corpus(name="text", text="a", is_repeatable=False).is_repeatable
