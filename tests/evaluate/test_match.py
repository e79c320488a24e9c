"""Exact match: stop strings, filters and comparison; the same text by every way of generating."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deepseek.errors import ConfigError, FormatError
from deepseek.evaluate import MatchItem, addition_items, exact_match
from deepseek.evaluate.continuation import cut, greedy_continuation
from deepseek.evaluate.items import read_choice_items, read_match_items


def saying(text: str, prompt: str) -> object:
    """Return a model of bytes that writes a text after a prompt, and then ends."""
    tokens = [*(prompt + text).encode(), 256]

    def model(input_ids: Tensor) -> Tensor:
        logits = torch.zeros(*input_ids.shape, 257)
        logits[0, -1, tokens[input_ids.shape[1]]] = 1.0
        return logits

    return model


@pytest.mark.parametrize(
    ("written", "options", "is_right"),
    [
        (" 12", {}, True),
        (" 12\n13", {}, True),
        (" 13", {}, False),
        (" is 12.", {}, False),
        (" is 12.", {"pattern": r"[0-9]+"}, True),
        (" is 12.", {"pattern": r"x|([0-9])([0-9])"}, False),
        (" none", {"pattern": r"[0-9]+"}, False),
        (" 12.", {"ignore_punctuation": True}, True),
        (" 12;13", {"until": (";",)}, True),
        (" 12 and more", {"max_gen_toks": 3}, True),
    ],
)
def test_answers_are_cut_filtered_and_compared(
    tokenizer: object, written: str, options: dict[str, object], is_right: bool
) -> None:
    items = [MatchItem(prompt="7 + 5 =", answer="12")]
    found = exact_match(saying(written, items[0].prompt), items, tokenizer=tokenizer, **options)
    assert found.items[0].is_right is is_right
    assert found.measurements[0].value == float(is_right)


def test_what_no_filter_finds_is_marked(tokenizer: object) -> None:
    items = [MatchItem(prompt="a", answer="[invalid]")]
    found = exact_match(saying("b", "a"), items, tokenizer=tokenizer, pattern="z")
    assert found.items[0].extracted == "[invalid]"


def test_transformers_and_the_plain_loop_write_the_same(tiny: nn.Module, tokenizer: object) -> None:
    prompt = list(b"def f(x):")
    by_generate = greedy_continuation(tiny, tokenizer, prompt, max_tokens=12)
    plain = greedy_continuation(lambda ids: tiny(ids), tokenizer, prompt, max_tokens=12)
    assert by_generate == plain != ""
    stop = plain[3]
    stopped = greedy_continuation(tiny, tokenizer, prompt, max_tokens=12, until=[stop])
    assert stopped == cut(plain, [stop])


def test_the_command_holds_what_repeats_it(tokenizer: object) -> None:
    items, model = [MatchItem(prompt="a", answer="b")], saying("b", "a")
    flags = {"match_items": "x.jsonl"}
    found = exact_match(model, items, tokenizer=tokenizer, flags=flags, pattern="b+")
    assert found.measurements[0].command == (
        "deepseek eval MODEL --tasks match --match-items x.jsonl --pattern b+ --max-gen-toks 32"
    )
    other = exact_match(model, items, tokenizer=tokenizer, flags=flags, ignore_case=True)
    assert other.measurements[0].command == ""


def test_sums_are_right_and_repeatable() -> None:
    items = addition_items(30, seed=5)
    assert items == addition_items(30, seed=5)
    for item in items:
        left, right = item.prompt.split("\n")[-1].removesuffix(" =").split(" + ")
        assert int(left) + int(right) == int(item.answer)


def test_items_are_read_from_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"context": "a", "choices": ["b", "c"], "answer": 1, "id": 7}\n\n'
        '{"context": "", "choices": ["b", "c"], "answer": "b"}\n'
    )
    assert [each.answer for each in read_choice_items(path)] == [1, 0]
    path.write_text('{"prompt": "a", "answer": "b"}')
    assert read_match_items(path) == [MatchItem(prompt="a", answer="b")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2 of a.jsonl must be one JSON object"),
        ("[1]", "must be one JSON object"),
        ('{"context": "a", "choices": ["b"], "answer": 0}', "choices of line 2"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', "answer of line 2"),
        ('{"context": "a", "choices": ["b", "c"], "answer": true}', "answer of line 2"),
        ('{"choices": ["b", "c"], "answer": 0}', "context of line 2"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"context": "a", "choices": ["b", "c"], "answer": 1}\n' + line)
    with pytest.raises(FormatError, match=message):
        read_choice_items(path)


def test_mistakes_are_explained(tmp_path: Path, tiny: nn.Module, tokenizer: object) -> None:
    items = [MatchItem(prompt="a", answer="b")]
    with pytest.raises(ConfigError, match="a regular expression"):
        exact_match(tiny, items, tokenizer=tokenizer, pattern="(")
    with pytest.raises(ConfigError, match="below the model's length of 512"):
        exact_match(tiny, items, tokenizer=tokenizer, max_gen_toks=512)
    with pytest.raises(ConfigError, match="must be there"):
        read_match_items(tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(FormatError, match="at least one item"):
        read_match_items(tmp_path / "empty")
