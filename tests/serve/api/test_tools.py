"""Tools: what the model is told, what its answer is held to, and how calls are found."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import llguidance
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.serve.api.grammars import call_grammar, calls_grammar, free_grammar
from deepseek.serve.api.schema.chat import Function
from deepseek.serve.api.tool_calls import Call, ToolCallParser
from deepseek.serve.generation import Grammar
from tests.serve.api.support import chat, error_of, events, make_app
from tests.serve.fakes import TOOL_TEMPLATE, FakeGenerator, byte_tokenizer

PARAMETERS = {
    "type": "object",
    "properties": {"place": {"$ref": "#/$defs/Place"}},
    "required": ["place"],
    "additionalProperties": False,
    "$defs": {"Place": {"type": "string"}},
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Bern"}}\n</tool_call>'
NAMES = frozenset({"weather", "clock"})


def strict(tool: dict[str, Any]) -> dict[str, Any]:
    """Return the tool with strict calls."""
    return {**tool, "function": {**tool["function"], "strict": True}}


def pieces(text: str, cuts: list[int], **options: Any) -> tuple[str, list[tuple[str, Any]]]:
    """Return content and calls of a text that comes in parts."""
    parser = ToolCallParser(NAMES, **options)
    found = []
    places = [0, *sorted(cuts), len(text)]
    for start, end in itertools.pairwise(places):
        found += parser.push(text[start:end])
    found += parser.flush()
    content = "".join(piece for piece in found if isinstance(piece, str))
    calls = [(p.name, json.loads(p.arguments)) for p in found if isinstance(p, Call)]
    return content, calls


BERN = ("weather", {"place": "Bern"})
NOW = ("clock", {})

TEXTS = {
    "plain": ("Hello <b> there", "Hello <b> there", []),
    "one call": (CALL, "", [BERN]),
    "text and call": (f"Let me see.\n\n{CALL}", "Let me see.", [BERN]),
    "two calls": (f'{CALL}\n<tool_call>{{"name":"clock"}}</tool_call>\n', "", [BERN, NOW]),
    "text behind": (f"{CALL} done", " done", [BERN]),
    "tag inside a string": (
        '<tool_call>{"name": "weather", "arguments": {"place": "</tool_call> \\" {"}}</tool_call>',
        "",
        [("weather", {"place": '</tool_call> " {'})],
    ),
    "no end": ('<tool_call>{"name": "weather", "argu', '<tool_call>{"name": "weather", "argu', []),
    "unknown name": (
        'a <tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        'a <tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        [],
    ),
    "no json": ("<tool_call>hm", "<tool_call>hm", []),
    "arguments are text": (
        '<tool_call>{"name": "clock", "arguments": "x"}',
        '<tool_call>{"name": "clock", "arguments": "x"}',
        [],
    ),
    "not a number": (
        '<tool_call>{"name": "clock", "arguments": {"a": NaN}}',
        '<tool_call>{"name": "clock", "arguments": {"a": NaN}}',
        [],
    ),
    "bare": ('{"name": "weather", "parameters": {"place": "Bern"}}', "", [BERN]),
    "bare list": (
        '[{"name": "weather", "arguments": {"place": "Bern"}}, {"name": "clock"}]',
        "",
        [BERN, NOW],
    ),
    "bare json that is no call": ('{"a": [1, 2]} ok', '{"a": [1, 2]} ok', []),
    "bare within a text": ('x {"name": "clock"}', 'x {"name": "clock"}', []),
    "half a surrogate": (
        '{"name": "clock", "arguments": {"a": "\\ud800"}}',
        '{"name": "clock", "arguments": {"a": "\\ud800"}}',
        [],
    ),
    "deep": ('{"name": "clock", "arguments": ' + '{"a":' * 70, None, []),
    "spaces": ("  ", "  ", []),
}


@pytest.mark.parametrize("case", TEXTS)
def test_calls_are_found(case: str) -> None:
    text, content, calls = TEXTS[case]
    assert pieces(text, []) == (text if content is None else content, calls)


@given(st.sampled_from(sorted(TEXTS)), st.data())
def test_how_a_text_is_cut_changes_nothing(case: str, data: st.DataObject) -> None:
    text = TEXTS[case][0]
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=20))
    assert pieces(text, cuts) == pieces(text, [])


@given(st.text(alphabet='<>tool_ca/{}[]"\\: \nname,', max_size=60))
def test_text_without_calls_is_given_back_whole(text: str) -> None:
    content, calls = pieces(text, list(range(len(text))))
    assert calls == [] and content == text


def test_bare_calls_can_be_switched_off_and_counted() -> None:
    bare = '{"name": "clock"}'
    assert pieces(bare, [], takes_bare=False) == (bare, [])
    assert pieces(CALL + CALL, [], max_calls=1) == ("", [BERN])


@pytest.mark.parametrize(
    "part", ["<tool_call", "<tool_call>", "{", '{"a":', "<tool_call>{", "\n", '"', "</tool_call>"]
)
def test_attack_14_parsing_takes_linear_time(part: str) -> None:
    def seconds(count: int) -> float:
        parser = ToolCallParser(NAMES)
        began = time.process_time()
        for _ in range(count):
            parser.push(part)
        parser.flush()
        return time.process_time() - began

    seconds(100)
    short = min(seconds(4_000) for _ in range(3))
    # quadratic work would take 64 times as long
    assert seconds(32_000) < 24 * short + 0.05


def test_a_call_in_an_answer() -> None:
    app = make_app(FakeGenerator(f"I look.\n{CALL}"))
    choice = chat(app, tools=[WEATHER]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look."
    [made] = choice["message"]["tool_calls"]
    assert made["id"].startswith("call_") and made["type"] == "function"
    assert made["function"] == {"name": "weather", "arguments": '{"place": "Bern"}'}


def test_calls_in_a_stream() -> None:
    app = make_app(FakeGenerator(f'{CALL}\n<tool_call>{{"name": "clock"}}</tool_call>'))
    chunks = events(chat(app, tools=[WEATHER, CLOCK], stream=True).text)[:-1]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    parts = [part for delta in deltas for part in delta.get("tool_calls", [])]
    assert [part["index"] for part in parts] == [0, 0, 1, 1]
    assert parts[0]["id"] != parts[2]["id"] and "id" not in parts[1]
    assert parts[0]["function"] == {"name": "weather", "arguments": ""}
    assert parts[1] == {"index": 0, "function": {"arguments": '{"place": "Bern"}'}}
    assert not any(delta.get("content") for delta in deltas)
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_one_call_where_parallel_ones_are_not_wanted() -> None:
    app = make_app(FakeGenerator(CALL + CALL))
    message = chat(app, tools=[WEATHER], parallel_tool_calls=False).json()["choices"][0]["message"]
    assert len(message["tool_calls"]) == 1


def test_no_call_is_looked_for_where_none_is_wanted() -> None:
    generator = FakeGenerator(CALL)
    answer = chat(make_app(generator), tools=[WEATHER], tool_choice="none").json()
    assert answer["choices"][0]["message"]["content"] == CALL
    assert "weather" not in generator.tokenizer.decode(generator.requests[0].prompt)


def test_calls_that_are_required_or_named_are_held_to_a_grammar() -> None:
    call = '{"name": "weather", "arguments": {"place": "Bern"}}'
    generator = FakeGenerator(f"[{call}]")
    app = make_app(generator)
    choice = chat(app, tools=[WEATHER, CLOCK], tool_choice="required").json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and len(choice["message"]["tool_calls"]) == 1
    generator.text = call
    named = {"type": "function", "function": {"name": "weather"}}
    choice = chat(app, tools=[WEATHER, CLOCK], tool_choice=named).json()["choices"][0]
    assert choice["finish_reason"] == "stop" and len(choice["message"]["tool_calls"]) == 1
    chat(app, tools=[strict(WEATHER)])
    chat(app, tools=[WEATHER])
    kinds = [request.grammar and request.grammar.kind for request in generator.requests]
    assert kinds == ["json_schema", "json_schema", "lark", None]


class Bytes:
    """A vocabulary of the bytes and one end, for llguidance."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"\xff<end>")
    special_token_ids = (256,)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


def accepts(grammar: Grammar, text: str) -> bool:
    """Tell whether a grammar lets a text through, as the engine would."""
    make = {
        "json_schema": llguidance.LLMatcher.grammar_from_json_schema,
        "lark": llguidance.LLMatcher.grammar_from_lark,
    }[grammar.kind]
    matcher = llguidance.LLMatcher(
        llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes())), make(grammar.text)
    )
    assert not matcher.is_error(), matcher.get_error()
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


GOOD = '{"name": "weather", "arguments": {"place": "Bern"}}'
BAD = '{"name": "weather", "arguments": {"place": 3}}'
OTHER = '{"name": "clock", "arguments": {"anything": [1]}}'


def test_grammars_hold_calls_to_their_schemas() -> None:
    functions = [Function.model_validate(tool["function"]) for tool in (WEATHER, CLOCK)]
    named = call_grammar(functions[0])
    assert accepts(named, GOOD) and not accepts(named, BAD) and not accepts(named, OTHER)
    required = calls_grammar(functions, parallel=True)
    assert accepts(required, f"[{GOOD}, {OTHER}]")
    assert not accepts(required, "[]") and not accepts(required, f"[{BAD}]")
    assert not accepts(calls_grammar(functions, parallel=False), f"[{GOOD}, {OTHER}]")


def test_the_grammar_of_strict_tools_leaves_text_free() -> None:
    functions = [Function.model_validate(tool["function"]) for tool in (WEATHER, CLOCK)]
    free = free_grammar(functions)
    tagged = f"<tool_call>\n{GOOD}\n</tool_call>"
    for text in ("", "Hi <b>", tagged, f"I look.\n{tagged}\n{tagged}", f"{tagged} done"):
        assert accepts(free, text), text
    for text in (tagged.replace(GOOD, BAD), "<tool_call>", "a <tool_call> b"):
        assert not accepts(free, text), text


def test_a_template_that_knows_tools_is_given_them() -> None:
    generator = FakeGenerator(tokenizer=byte_tokenizer(TOOL_TEMPLATE))
    made = {"name": "weather", "arguments": '{"place": "Bern"}'}
    messages = [
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": made}],
        },
        {"role": "tool", "content": "no", "tool_call_id": "call_1"},
    ]
    options = {"enable_thinking": True}
    answer = chat(
        make_app(generator), messages=messages, tools=[WEATHER], chat_template_kwargs=options
    )
    assert answer.status_code == 200, answer.text
    prompt = generator.tokenizer.decode(generator.requests[0].prompt, skip_special_tokens=False)
    assert prompt.startswith('<|im_start|>system\n{"type": "function", "function": {"name": "wea')
    assert '<tool_call>{"name": "weather", "arguments": {"place": "Bern"}}</tool_call>' in prompt
    assert "<|im_start|>tool\nno<|im_end|>" in prompt and "<think>" in prompt


def test_a_template_that_knows_none_gets_a_system_message() -> None:
    generator = FakeGenerator()
    made = {"name": "clock", "arguments": ""}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Time?"},
        {
            "role": "assistant",
            "content": "So:",
            "tool_calls": [{"id": "call_1", "type": "function", "function": made}],
        },
        {"role": "tool", "content": "noon", "tool_call_id": "call_1"},
    ]
    assert chat(make_app(generator), messages=messages, tools=[CLOCK]).status_code == 200
    prompt = generator.tokenizer.decode(generator.requests[0].prompt, skip_special_tokens=False)
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\nYou can call functions.")
    assert '<tools>\n{"name": "clock"}\n</tools>' in prompt
    assert '<tool_call>\n{"name": "the name", "arguments": {"the argument"' in prompt
    assert 'So:\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>' in prompt
    assert "user\n<tool_response>\nnoon\n</tool_response><|im_end|>" in prompt


REFUSED = {
    "no tools": {"tool_choice": "required"},
    "named and not there": {
        "tools": [CLOCK],
        "tool_choice": {"type": "function", "function": {"name": "x"}},
    },
    "twice": {"tools": [CLOCK, CLOCK]},
    "with a format": {"tools": [CLOCK], "response_format": {"type": "json_object"}},
    "a name of signs": {"tools": [{"type": "function", "function": {"name": "a b"}}]},
    "another type": {"tools": [{"type": "code_interpreter"}]},
    "129 tools": {"tools": [CLOCK] * 129},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    generator = FakeGenerator()
    error_of(chat(make_app(generator), **REFUSED[case]), 400)
    assert generator.requests == []


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "something"}}},
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}},
        {"type": "string"},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}},
    ],
)
def test_attack_13_malformed_tools_are_refused_and_the_engine_lives(schema: Any) -> None:
    generator = FakeGenerator()
    app = make_app(generator)
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    error_of(chat(app, tools=[tool], tool_choice="required"), 400)
    error_of(chat(app, tools=[tool], tool_choice="required", stream=True), 400)
    assert generator.running == 0
    assert chat(app).status_code == 200
