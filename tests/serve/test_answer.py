"""What ends an answer, and what a client gets of it."""

from __future__ import annotations

import pytest

from deepseek.serve.answer import Answer
from deepseek.serve.circles import CircleDetector
from deepseek.serve.generation import GenerationRequest, Output, TokenChoice
from tests.generate.conftest import byte_tokenizer

TOKENIZER = byte_tokenizer(eos_token="<end>")
LETTER = TOKENIZER.encode("c")[0]


def outputs(
    text: str, *, per_step: int = 1, context: int = 1000, **settings: object
) -> list[Output]:
    """Return what an answer makes of the tokens of a text."""
    values = {"prompt": (1,), "max_tokens": 999, **settings}
    answer = Answer(GenerationRequest(**values), TOKENIZER, context)  # type: ignore[arg-type]
    tokens = [TokenChoice(token) for token in TOKENIZER.encode(text)]
    found = []
    for start in range(0, len(tokens), per_step):
        found.append(answer.take(tokens[start : start + per_step]))
        if found[-1].finish_reason is not None:
            break
    return found


@pytest.mark.parametrize("per_step", [1, 3, 100])
def test_an_end_token_a_stop_string_and_a_stop_id(per_step: int) -> None:
    """However many tokens a step brings, what stands behind the end is not there."""
    cases = [
        ("well<end>more", {}, "well", None, 5),
        ("one two three", {"stop": ("two", "x")}, "one ", "two", 7),
        (
            "abcabc",
            {"stop_token_ids": (TOKENIZER.encode("c")[0],)},
            "ab",
            TOKENIZER.encode("c")[0],
            3,
        ),
    ]
    for text, settings, expected, stopped_by, count in cases:
        found = outputs(text, per_step=per_step, **settings)
        assert "".join(output.text for output in found) == expected
        assert found[-1].finish_reason == "stop" and found[-1].stopped_by == stopped_by
        assert sum(len(output.tokens) for output in found) == count


def test_as_many_tokens_as_were_asked_for_or_as_the_context_holds() -> None:
    for settings in ({"max_tokens": 3}, {"context": 4}):
        found = outputs("abcdef", **settings)  # type: ignore[arg-type]
        assert [output.text for output in found] == ["a", "b", "c"]
        assert found[-1].finish_reason == "length"


def test_the_start_of_a_stop_string_is_given_at_the_end() -> None:
    found = outputs("ab<end>", stop=("bc",))
    assert "".join(output.text for output in found) == "ab"


def test_a_text_that_goes_round_in_circles_is_ended() -> None:
    found = outputs("well, " + "no no " * 200)
    assert found[-1].finish_reason == "repetition"
    assert 512 <= sum(len(output.tokens) for output in found) <= 512 + 6 + 64


@pytest.mark.parametrize("period", [1, 7, 64])
def test_circles_of_any_period_are_seen_and_others_are_not(period: int) -> None:
    piece = list(range(period))
    detector = CircleDetector(128)
    assert any(detector.push(token) for token in piece * (400 // period))
    counting = CircleDetector(128)
    assert not any(counting.push(token % 65) for token in range(1000))
    off = CircleDetector(0)
    assert not any(off.push(0) for _ in range(5000))
