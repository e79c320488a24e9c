"""POST /v1/chat/completions: whole answers and streams."""

from __future__ import annotations

import pytest

from deepseek.serve.generation import Grammar
from tests.serve.api.support import HELLO, call, chat, error_of, events, make_app, post
from tests.serve.fakes import FakeGenerator


def test_a_whole_answer() -> None:
    generator = FakeGenerator()
    generator.num_cached = 7
    answer = chat(make_app(generator)).json()
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "tiny"
    [choice] = answer["choices"]
    message = {"role": "assistant", "content": "Hello there.", "refusal": None, "tool_calls": None}
    assert choice == {
        "index": 0,
        "message": message,
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    prompt = generator.requests[0].prompt
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": len("Hello there.") + 1,
        "total_tokens": len(prompt) + len("Hello there.") + 1,
        "prompt_tokens_details": {"cached_tokens": 7},
    }
    assert "<|im_start|>user\nHi<|im_end|>" in generator.tokenizer.decode(
        prompt, skip_special_tokens=False
    )


def test_a_stream_joins_to_the_whole_answer() -> None:
    app = make_app()
    answer = chat(app, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(answer.text)
    assert done == "[DONE]"
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    first = chunks[0]["choices"][0]
    assert first["delta"]["role"] == "assistant" and first["finish_reason"] is None
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == "Hello there."
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert all("usage" not in chunk for chunk in chunks)


def test_usage_comes_as_the_last_chunk_of_a_stream() -> None:
    answer = chat(make_app(), stream=True, stream_options={"include_usage": True})
    *chunks, last, _ = events(answer.text)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 13
    assert all(chunk["usage"] is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers(stream: bool) -> None:
    generator = FakeGenerator(lambda request: f"seed {request.sampling.seed}")
    answer = chat(make_app(generator), n=3, seed=5, stream=stream)
    texts = {0: "", 1: "", 2: ""}
    if stream:
        for chunk in events(answer.text)[:-1]:
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
    else:
        texts = {c["index"]: c["message"]["content"] for c in answer.json()["choices"]}
        assert answer.json()["usage"]["prompt_tokens"] == len(generator.requests[0].prompt)
    assert texts == {0: "seed 5", 1: "seed 6", 2: "seed 7"}


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(stream: bool) -> None:
    app = make_app(FakeGenerator("é"))
    answer = chat(app, logprobs=True, top_logprobs=2, stream=stream)
    if stream:
        choices = [chunk["choices"][0] for chunk in events(answer.text)[:-1]]
        tokens = [t for c in choices if c["logprobs"] for t in c["logprobs"]["content"]]
    else:
        tokens = answer.json()["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in tokens] == ["bytes:\\xc3", "bytes:\\xa9", "<|im_end|>"]
    assert [token["bytes"] for token in tokens[:2]] == [[0xC3], [0xA9]]
    assert [len(token["top_logprobs"]) for token in tokens] == [2, 2, 2]
    assert tokens[0]["logprob"] == -0.5


def test_fields_reach_the_engine() -> None:
    generator = FakeGenerator()
    chat(
        make_app(generator),
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        seed=-1,
        stop=["x", "y"],
        logit_bias={"5": -100},
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[3],
        deadline_ms=1500,
        priority=4,
        max_completion_tokens=9,
    )
    [request] = generator.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (
        0.5,
        0.9,
        40,
        0.1,
    )
    assert sampling.repetition_penalty == 1.1 and sampling.seed == 2**62 - 1
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.2, -0.3)
    assert request.stop == ("x", "y") and request.stop_token_ids == (3,)
    assert request.logit_bias == {5: -100} and request.min_tokens == 2 and request.ignore_eos
    assert (request.deadline_s, request.priority, request.max_tokens) == (1.5, 4, 9)
    assert request.tenant == "ann" and request.logprobs is None


def test_defaults_and_null() -> None:
    generator = FakeGenerator(context=100)
    nulls = dict.fromkeys(["temperature", "top_p", "n", "stop", "seed", "tools", "logprobs"])
    assert chat(make_app(generator), **nulls).status_code == 200
    [request] = generator.requests
    assert request.sampling.temperature == 1 and request.sampling.seed is None
    assert request.max_tokens == 100 - len(request.prompt)
    chat(make_app(generator, default_max_tokens=5))
    assert generator.requests[1].max_tokens == 5


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1e-9}, {"top_p": 0}])
def test_greedy(fields: dict[str, float]) -> None:
    generator = FakeGenerator()
    assert chat(make_app(generator), **fields).status_code == 200
    assert generator.requests[0].sampling.is_greedy


@pytest.mark.parametrize(
    ("finish", "shown", "stop_reason"),
    [("length", "length", None), ("repetition", "length", "repetition"), ("stop", "stop", None)],
)
def test_reasons_of_an_end(finish: str, shown: str, stop_reason: str | None) -> None:
    generator = FakeGenerator()
    generator.finish = finish
    choice = chat(make_app(generator)).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == (shown, stop_reason)


def test_a_stop_string_is_named() -> None:
    choice = chat(make_app(), stop="there").json()["choices"][0]
    assert choice["message"]["content"] == "Hello "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "there")


def test_formats_become_grammars() -> None:
    generator = FakeGenerator('{"a": 1}')
    app = make_app(generator)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    named = {"name": "x", "schema": schema, "strict": True}
    chat(app, response_format={"type": "json_schema", "json_schema": named})
    chat(app, response_format={"type": "json_object"})
    chat(app, structured_outputs={"regex": "a+"})
    chat(app, structured_outputs={"choice": ['ye"s', "no"]})
    chat(app, structured_outputs={"json": schema})
    chat(app, structured_outputs={"grammar": 'start: "a"'})
    chat(app, response_format={"type": "text"})
    kinds = [request.grammar.kind if request.grammar else None for request in generator.requests]
    assert kinds == [
        "json_schema",
        "json_object",
        "regex",
        "lark",
        "json_schema",
        "lark",
        None,
    ]
    assert generator.requests[3].grammar == Grammar(kind="lark", text='start: "ye\\"s" | "no"\n')


def test_parts_of_a_message_are_joined() -> None:
    generator = FakeGenerator()
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "Be"}, {"role": "user", "content": parts}]
    assert chat(make_app(generator), messages=messages).status_code == 200
    prompt = generator.tokenizer.decode(generator.requests[0].prompt, skip_special_tokens=False)
    assert "<|im_start|>system\nBe<|im_end|>" in prompt and "user\none\ntwo<|im_end|>" in prompt


def test_chat_equals_template_and_completions() -> None:
    generator = FakeGenerator()
    app = make_app(generator)
    chat(app)
    text = generator.tokenizer.apply_chat_template(HELLO)
    post(app, "/v1/completions", {"prompt": text, "add_special_tokens": False})
    ids = post(app, "/tokenize", {"messages": HELLO}).json()["tokens"]
    post(app, "/v1/completions", {"prompt": ids})
    first, second, third = (request.prompt for request in generator.requests)
    assert first == second == third == tuple(ids)


def test_models_and_adapters() -> None:
    generator = FakeGenerator()
    app = make_app(generator, adapters=lambda: {"poet"})
    names = [model["id"] for model in call(app, "GET", "/v1/models").json()["data"]]
    assert names == ["tiny", "poet"]
    poet = call(app, "GET", "/v1/models/poet").json()
    assert (poet["root"], poet["max_model_len"]) == ("tiny", 4096)
    assert chat(app, model="poet").json()["model"] == "poet"
    assert generator.requests[0].adapter == "poet"
    for name in ("gone", "../../etc/passwd", "tiny/", ""):
        error = error_of(chat(app, model=name), 404)
        assert error["code"] == "model_not_found"
    error_of(call(app, "GET", "/v1/models/../../etc/passwd"), 404)
