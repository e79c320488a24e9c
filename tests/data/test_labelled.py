"""Labelled texts from CSV and JSONL files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.data import LabelledText, label_names, read_labelled
from deepseek.errors import ConfigError, FormatError

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), min_size=1)
TEXTS = st.lists(st.builds(LabelledText, NAMES, NAMES))


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
@given(texts=TEXTS)
def test_what_is_written_is_read(
    kind: str, texts: list[LabelledText], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("labelled") / f"texts.{kind}"
    with file.open("w", encoding="utf-8", newline="") as content:
        if kind == "jsonl":
            lines = [json.dumps({"says": one.text, "is": one.label, "more": 1}) for one in texts]
            content.write("\n".join(lines))
        else:
            rows = csv.writer(content, delimiter="\t" if kind == "tsv" else ",")
            rows.writerow(["more", "says", "is"])
            rows.writerows([["x", one.text, one.label] for one in texts])
    assert read_labelled(file, text="says", label="is") == texts


def test_labels_are_numbers_or_words(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "one", "label": 1}\n\n{"text": "two", "label": "b"}\n')
    texts = read_labelled(file)
    assert [each.label for each in texts] == ["1", "b"]
    assert label_names([*texts, *texts]) == ("1", "b")


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.csv", b"text,label\na,b\nc\n", "line 3"),
        ("a.csv", b"text,kind\na,b\n", "line 2"),
        ("a.csv", b'text,label\n"a,b\n', "line 2"),
        ("a.csv", b"text,label\na,\n", "line 2"),
        ("a.csv", b"text,label\n\xff,b\n", "UTF-8"),
        ("a.jsonl", b'{"text": "a", "label": true}', "line 1"),
        ("a.jsonl", b'{"text": "a"}', "line 1"),
        ("a.jsonl", b'{"text": "a", "la', "line 1"),
    ],
)
def test_bad_files_are_told(name: str, content: bytes, where: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=where):
        read_labelled(tmp_path / name)


def test_other_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for name in ("a.txt", "missing.csv"):
        with pytest.raises(ConfigError, match="path of read_labelled"):
            read_labelled(tmp_path / name)
