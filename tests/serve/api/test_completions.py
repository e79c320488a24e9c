"""POST /v1/completions, /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.api.support import HEADERS, call, error_of, events, make_app, post
from tests.serve.fakes import FakeGenerator


def complete(app: Any, **fields: Any) -> Any:
    """Return the answer to a completion."""
    return post(app, "/v1/completions", {"model": "tiny"} | fields)


def test_a_text_is_continued() -> None:
    answer = complete(make_app(), prompt="Say").json()
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    [choice] = answer["choices"]
    assert choice["text"] == "Hello there." and choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    assert answer["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize("prompt", [["ab", "cd"], [[1, 2], [3, 4]]], ids=["texts", "lists of ids"])
def test_several_prompts_times_several_answers(prompt: Any) -> None:
    generator = FakeGenerator(lambda request: f"{request.prompt[0]}/{request.sampling.seed}")
    answer = complete(make_app(generator), prompt=prompt, n=2, seed=0).json()
    first, second = generator.requests[0].prompt[0], generator.requests[2].prompt[0]
    assert first != second
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [f"{first}/0", f"{first}/1", f"{second}/0", f"{second}/1"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 4


def test_ids_are_one_prompt() -> None:
    generator = FakeGenerator()
    complete(make_app(generator), prompt=[5, 6, 7])
    assert [request.prompt for request in generator.requests] == [(5, 6, 7)]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_lm_eval_scores_a_prompt(max_tokens: int) -> None:
    generator = FakeGenerator()
    ids = generator.tokenizer.encode("né")
    fields = {"temperature": 0, "max_tokens": max_tokens, "logprobs": 1, "seed": 1234}
    answer = complete(make_app(generator), prompt=[ids], echo=True, **fields).json()
    [choice] = answer["choices"]
    logprobs = choice["logprobs"]
    rest = ["H"] if max_tokens else []
    assert choice["text"] == "né" + "".join(rest)
    assert logprobs["tokens"] == ["n", "bytes:\\xc3", "bytes:\\xa9", *rest]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:3] == [-0.5, -0.5]
    assert logprobs["top_logprobs"][1] == {"bytes:\\xc3": -0.5}
    assert logprobs["text_offset"] == [0, 1, 1, *([2] if rest else [])]
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == max_tokens


def test_lm_eval_reads_our_logprobs() -> None:
    parse = pytest.importorskip(
        "lm_eval.models.openai_completions", exc_type=ModuleNotFoundError
    ).LocalCompletionsAPI.parse_logprobs
    generator = FakeGenerator()
    prompts = [generator.tokenizer.encode(text) for text in ("a question", "two")]
    fields = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    answer = complete(make_app(generator), prompt=prompts, **fields).json()
    assert parse(outputs=answer, tokens=prompts, ctxlens=[4, 1]) == [(-3.0, True), (-1.0, True)]


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_joins_to_the_whole_answer(echo: bool) -> None:
    app = make_app()
    fields = {"prompt": "Say", "echo": echo, "logprobs": 2}
    whole = complete(app, **fields).json()["choices"][0]
    answer = complete(app, stream=True, stream_options={"include_usage": True}, **fields)
    *chunks, last, done = events(answer.text)
    assert done == "[DONE]" and last["choices"] == [] and last["usage"]["prompt_tokens"] == 3
    parts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [item for part in parts for item in part["logprobs"][field]]
        assert joined == whole["logprobs"][field]
    assert parts[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 3, "n": 2}, "best_of"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": ["x"] * 64, "n": 2}, "n"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": "x", "prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], param: str) -> None:
    assert error_of(complete(make_app(), **fields), 400)["param"] == param


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], ["x", 5], [-1], ["a"] * 65, None, 5])
def test_attack_10_empty_and_mixed_prompts(prompt: Any) -> None:
    generator = FakeGenerator()
    error_of(complete(make_app(generator), prompt=prompt), 400)
    assert generator.requests == []


def test_tokenize_and_back() -> None:
    app = make_app()
    body = {"prompt": "né <|im_end|>", "return_token_strs": True}
    answer = post(app, "/tokenize", body).json()
    assert answer["count"] == len(answer["tokens"]) == 5 and answer["max_model_len"] == 4096
    assert answer["token_strs"][-1] == "<|im_end|>" and answer["token_strs"][1] == "bytes:\\xc3"
    back = post(app, "/detokenize", {"tokens": answer["tokens"]}).json()
    assert back == {"prompt": body["prompt"]}
    assert post(app, "/tokenize", {"prompt": ""}).json()["tokens"] == []
    error_of(post(app, "/tokenize", {}), 400)
    error_of(post(app, "/detokenize", {"tokens": [10**6]}), 400)


def test_lm_eval_finds_a_remote_tokenizer() -> None:
    info = call(make_app(), "GET", "/tokenizer_info", headers=HEADERS).json()
    assert info["eos_token"] == "<|im_end|>" and "message" in info["chat_template"]
