"""The token loop against a model that follows a script: stopping, streaming, limits, errors."""

from __future__ import annotations

import json

import pytest
import torch

from deepseek.errors import BackendError, CapacityError, ConfigError
from deepseek.generate import Completion, Piece, Sampling, chat_prompt, generate, stream
from deepseek.models import Decoder
from tests.generate.conftest import ScriptedModel, ScriptedText, byte_tokenizer

BEGIN = [0]


def completed(model: ScriptedModel, **options: object) -> Completion:
    result = generate(model, BEGIN, **options)  # type: ignore[call-overload]
    assert isinstance(result, Completion)
    return result


def test_ends_at_the_end_token(says: ScriptedText) -> None:
    result = completed(says("Hello"))
    assert (result.text, result.finish_reason) == ("Hello", "stop")
    assert len(result.token_ids) == 6
    assert result.num_prompt_tokens == 1
    assert 0 < result.first_token_s <= result.total_s
    assert result.tokens_per_s == 6 / result.total_s
    assert json.loads(json.dumps(result.to_dict()))["text"] == "Hello"


def test_ignores_the_end_token(says: ScriptedText) -> None:
    result = completed(says("Hello"), ignore_eos=True, max_tokens=8)
    assert (result.text, result.finish_reason, len(result.token_ids)) == ("Hello", "length", 8)


def test_ends_at_max_tokens(says: ScriptedText) -> None:
    result = completed(says("Hello"), max_tokens=5)
    assert (result.text, result.finish_reason) == ("Hello", "length")


def test_ends_at_the_end_of_the_context(says: ScriptedText) -> None:
    result = completed(says("Hello", ends=False, context=12), max_tokens=100)
    assert (result.finish_reason, len(result.token_ids)) == ("length", 11)


def test_ends_at_a_stop_token(says: ScriptedText) -> None:
    model = says("Hello")
    result = completed(model, stop_token_ids=model.tokenizer.encode("l"))
    assert (result.text, result.finish_reason, len(result.token_ids)) == ("He", "stop", 3)


@pytest.mark.parametrize(
    ("stop", "text"),
    [("lo", "Hel"), (["x", "o W"], "Hell"), (["Hello"], ""), (["x"], "Hello World")],
)
def test_ends_at_a_stop_string(says: ScriptedText, stop: str | list[str], text: str) -> None:
    result = completed(says("Hello World"), stop=stop)
    assert (result.text, result.finish_reason) == (text, "stop")


@pytest.mark.parametrize("limit", range(1, 12))
def test_held_text_comes_at_the_end(says: ScriptedText, limit: int) -> None:
    result = completed(says("Hello World", ends=False), stop=["World!"], max_tokens=limit)
    assert result.text == "Hello World"[:limit]
    assert result.finish_reason == "length"


def test_pieces_are_whole_characters(says: ScriptedText) -> None:
    text = "你好 👩‍👩‍👧 e\u0301"
    pieces = list(stream(says(text), BEGIN))
    assert "".join(piece.text for piece in pieces) == text
    assert all("\ufffd" not in piece.text for piece in pieces)
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert len(pieces) == len(text.encode()) + 1


def test_a_character_cut_by_the_limit_is_marked(says: ScriptedText) -> None:
    assert completed(says("你好"), max_tokens=4).text == "你\ufffd"


def test_rows_end_when_they_end(says: ScriptedText) -> None:
    model = says("abcdef")
    results = generate(model, [[0], [0] * 4, [0] * 7, [0] * 3])
    assert isinstance(results, list)
    assert [result.text for result in results] == ["abcdef", "def", "", "cdef"]
    assert [result.num_prompt_tokens for result in results] == [1, 4, 7, 3]
    assert [rows for rows, length in model.passes if length == 1] == [3, 3, 3, 2, 1, 1]


def test_pieces_of_a_step_come_in_the_order_of_the_prompts(says: ScriptedText) -> None:
    pieces = list(stream(says("abcd"), [[0] * 3, [0], [0] * 2]))
    assert [piece.row for piece in pieces] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 1, 2, 1]
    assert pieces[0].text == "c"


def test_on_piece_sees_what_stream_yields(says: ScriptedText) -> None:
    seen: list[Piece] = []
    result = completed(says("Hello"), on_piece=seen.append)
    assert seen == list(stream(says("Hello"), BEGIN))
    assert "".join(piece.text for piece in seen) == result.text


@pytest.mark.parametrize(
    ("prompts", "count"),
    [
        ("a", None),
        ([1, 2], None),
        ((1, 2), None),
        (torch.tensor([1, 2]), None),
        (["a", "bc"], 2),
        ([[1], [2, 3]], 2),
        ([torch.tensor([1]), torch.tensor([2, 3])], 2),
        (torch.tensor([[1, 2], [3, 4]]), 2),
        (["a"], 1),
        (["a", [1, 2]], 2),
    ],
)
def test_forms_of_prompts(says: ScriptedText, prompts: object, count: int | None) -> None:
    result = generate(says("Hello"), prompts)  # type: ignore[arg-type]
    assert (len(result) if isinstance(result, list) else None) == count


@pytest.mark.parametrize(
    "prompts", [[], None, 5, b"a", [None], [1.5], [["a"]], torch.tensor([1.5])]
)
def test_what_is_no_prompt(says: ScriptedText, prompts: object) -> None:
    with pytest.raises(ConfigError, match=r"^prompts of generate must be"):
        generate(says("Hello"), prompts)  # type: ignore[arg-type]


def test_empty_prompt_begins_with_bos(says: ScriptedText) -> None:
    model = says("Hello")
    for prompts in ("", [""], [[]]):
        generate(model, prompts)
    bare = ScriptedModel(model.script, byte_tokenizer())
    with pytest.raises(ConfigError, match="must be at least one token"):
        generate(bare, "")
    bare.tokenizer, bare.config.bos_token_id = None, 256
    generate(bare, [[]])


def test_works_without_tokenizer(says: ScriptedText) -> None:
    model = says("Hello")
    model.tokenizer = None
    result = completed(model, max_tokens=7)
    assert (result.text, len(result.token_ids)) == ("", 7)
    model.config.eos_token_id = (255, 257)
    assert completed(model).finish_reason == "stop"
    with pytest.raises(
        ConfigError, match=r"prompts of generate must be token ids.*tokenizer\.json"
    ):
        generate(model, "Hello")
    with pytest.raises(ConfigError, match="stop of generate must be empty without a tokenizer"):
        generate(model, BEGIN, stop=["x"])


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"stop": [""]},
        {"stop": [5]},
        {"stop_token_ids": ["a"]},
    ],
)
def test_arguments_are_checked_at_the_call(says: ScriptedText, options: dict[str, object]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=f"^{name} of generate must be"):
        stream(says("Hello"), BEGIN, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("token", [-1, 258])
def test_ids_outside_the_vocabulary(says: ScriptedText, token: int) -> None:
    with pytest.raises(ConfigError, match=rf"prompt 1 of generate .* from 0 to 257; got {token}"):
        generate(says("Hello"), [[0], [0, token]])


def test_a_prompt_too_long_for_the_context(says: ScriptedText) -> None:
    model = says("Hello", context=8)
    with pytest.raises(CapacityError, match="shorter than the model's context of 8 tokens"):
        stream(model, [0] * 8)
    assert len(completed(model).text) == 5
    assert len(generate(model, [0] * 7).token_ids) == 1  # type: ignore[union-attr]


def test_interruption_leaves_the_model_usable(tiny_model: Decoder) -> None:
    expected = generate(tiny_model, "abc", max_tokens=6)

    def interrupt(_: Piece) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tiny_model, "abc", max_tokens=6, on_piece=interrupt)
    pieces = stream(tiny_model, "abc", max_tokens=6)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    again = generate(tiny_model, "abc", max_tokens=6)
    assert again.token_ids == expected.token_ids  # type: ignore[union-attr]


def test_the_loop_of_a_stream_may_train(tiny_model: Decoder) -> None:
    for _ in stream(tiny_model, "abc", max_tokens=3):
        assert not torch.is_inference_mode_enabled()
        tiny_model(torch.tensor([[1, 2]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in tiny_model.parameters())


def test_damaged_weights_are_a_clear_error(tiny_model: Decoder) -> None:
    with torch.no_grad():
        tiny_model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(BackendError, match="largest logit of row 0"):
        generate(tiny_model, "abc")


def test_chat_prompt_has_the_special_tokens_once() -> None:
    tokenizer = byte_tokenizer(
        bos_token="<begin>", chat_template="{{ bos_token }}{{ messages[0].content }}"
    )
    assert chat_prompt(tokenizer, [{"role": "user", "content": "a"}]) == [
        tokenizer.bos_token_id,
        *tokenizer.encode("a"),
    ]


def test_sampling_is_reexported() -> None:
    assert Sampling(temperature=0.5).temperature == 0.5
