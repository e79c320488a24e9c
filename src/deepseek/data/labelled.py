"""Texts with a label each, from CSV or JSONL files."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deepseek.data.texts import must_be_utf8, read_lines, wrong_line
from deepseek.errors import ConfigError, describe


@dataclasses.dataclass(frozen=True)
class LabelledText:
    """A text and the name of its class."""

    text: str
    label: str


def read_labelled(
    path: str | Path, *, text: str = "text", label: str = "label"
) -> list[LabelledText]:
    """Return the labelled texts of a file.

    Args:
        path: `.csv` or `.tsv` whose first line names the columns, or `.jsonl` with an object a
            line.
        text, label: names of the columns or fields; a label that is a number is taken as its
            digits.

    Raises:
        ConfigError: there is no such file, or its name ends otherwise.
        FormatError: a line without the two, or bytes that are no UTF-8; the message names the
            line.
    """
    file = Path(path)
    if not file.is_file() or file.suffix not in (".csv", ".tsv", ".jsonl"):
        must = "a .csv, .tsv or .jsonl file"
        raise ConfigError(describe("path", "read_labelled", must, str(file)))
    lines = read_lines(file) if file.suffix == ".jsonl" else _table(file)
    return [_labelled(fields, file, number, text, label) for number, fields in lines]


def label_names(texts: Sequence[LabelledText]) -> tuple[str, ...]:
    """Return the labels of texts, each once, in alphabetical order."""
    return tuple(sorted({each.label for each in texts}))


def _table(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of the line where each row ends, and its fields."""
    delimiter = "\t" if file.suffix == ".tsv" else ","
    with must_be_utf8(file), file.open(encoding="utf-8-sig", newline="") as content:
        rows = csv.DictReader(content, delimiter=delimiter, strict=True)
        try:
            for fields in rows:
                yield rows.line_num, fields
        except csv.Error as error:
            raise wrong_line(file, rows.line_num + 1, "a row of a table", str(error)) from error


def _labelled(
    fields: dict[str, Any], file: Path, number: int, text: str, label: str
) -> LabelledText:
    found = fields.get(label)
    name = str(found) if isinstance(found, int) and not isinstance(found, bool) else found
    if not isinstance(fields.get(text), str) or not isinstance(name, str) or not name:
        raise wrong_line(file, number, f"one with {text!r} and {label!r}", fields)
    return LabelledText(fields[text], name)
