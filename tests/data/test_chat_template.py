"""Chat templates are untrusted text: they follow the conventions and cannot hang or escape."""

from __future__ import annotations

import json

import pytest

from deepseek.data import chat_template
from deepseek.data.chat_template import ChatTemplate
from deepseek.errors import ConfigError

MESSAGES = [{"role": "user", "content": "hé <b>", "tools": [{"b": 1, "a": [2]}]}]


def render(source: str, **special: str) -> str:
    return ChatTemplate(source).render(MESSAGES, add_generation_prompt=True, special_tokens=special)


CONVENTIONS = {
    "blocks are trimmed": "{% if true %}\n  {% for m in messages %}\n{{ m.role }}\n"
    "{% endfor %}\n{% endif %}",
    "tojson": "{{ messages|tojson }}{{ messages|tojson(indent=2) }}",
    "loop control": "{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}"
    "{{ i }}{% endfor %}",
    "loop variables": "{% for m in 'abc' %}{{ loop.index }}{{ loop.last }}{{ loop.length }}"
    "{% endfor %}",
    "recursive loop": "{% for x in [1, [2, 3]] recursive %}{% if x is iterable %}{{ loop(x) }}"
    "{% else %}{{ x }}{% endif %}{% endfor %}",
    "generation tag": "{% generation %}{{ messages[0].content }}{% endgeneration %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in [1, 2] %}{% set ns.n = ns.n + m %}"
    "{% endfor %}{{ ns.n }}",
    "macro": "{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(1) }}{{ '-' * 5 }}{{ 2 ** 3 }}",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ tools is none }}|{{ undefined_name }}",
    "generation prompt": "{% if add_generation_prompt %}yes{% endif %}\n",
    "date": "{{ strftime_now('%Y') }}",
}


@pytest.mark.parametrize("case", CONVENTIONS)
def test_conventions_of_transformers(case: str) -> None:
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    special = {"bos_token": "<s>", "eos_token": "</s>"}
    expected, _ = render_jinja_template(
        [MESSAGES], chat_template=CONVENTIONS[case], add_generation_prompt=True, **special
    )
    assert render(CONVENTIONS[case], **special) == expected[0]


HOSTILE = {
    "endless loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "filtered loops": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}"
    "{% endfor %}",
    "endless output": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "repeated text": "{{ 'x' * 10 ** 9 }}",
    "repeated list": "{{ ([0] * 10 ** 9)|length }}",
    "power": "{{ (10 ** 9) ** (10 ** 9) }}",
    "doubling": "{% set ns = namespace(s='x') %}{% for i in range(60) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "python objects": "{{ ''.__class__.__mro__ }}",
    "range": "{{ range(10 ** 9)|list }}",
    "mutation": "{{ messages.append(1) }}",
    "division": "{{ 1 / 0 }}",
    "wrong type": "{{ messages + 1 }}",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_template_is_stopped(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(chat_template, "MAX_STEPS", 20_000)
    with pytest.raises(ConfigError, match="of chat_template must be renderable"):
        render(HOSTILE[case])


def test_a_template_can_refuse() -> None:
    with pytest.raises(ConfigError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize("source", ["{% for", "{{ 1 + }}", "{% unknown %}", "{% endif %}"])
def test_invalid_template(source: str) -> None:
    with pytest.raises(ConfigError, match="must be valid jinja2"):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        {"role": "user"},
        ["hello"],
        [{"content": "x"}],
        [{"role": 5}],
        7,
        [{"role": "user", "content": object()}],
    ],
)
def test_malformed_messages(messages: object) -> None:
    with pytest.raises(ConfigError, match=r"messages? of apply_chat_template must be"):
        ChatTemplate("x").render(messages, add_generation_prompt=True, special_tokens={})  # type: ignore[arg-type]


def test_messages_of_the_caller_stay_as_they_were() -> None:
    messages = [{"role": "user", "content": None}]
    template = ChatTemplate("{{ messages[0].content is defined }}")
    assert template.render(messages, add_generation_prompt=True, special_tokens={}) == "False"
    assert messages == [{"role": "user", "content": None}]


def test_a_template_says_what_it_looks_at() -> None:
    template = ChatTemplate("{% if tools %}{{ tools }}{% endif %}{% set x = 1 %}{{ x }}")
    assert template.takes("tools") and not template.takes("x") and not template.takes("messages")
    assert not ChatTemplate("{% for tools in messages %}{{ tools }}{% endfor %}").takes("tools")


def test_tools_and_options_are_variables() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    template = ChatTemplate("{{ tools | tojson }}{% if enable_thinking is false %}!{% endif %}")
    text = template.render(
        MESSAGES,
        add_generation_prompt=True,
        special_tokens={},
        tools=tools,
        options={"enable_thinking": False},
    )
    assert text == json.dumps(tools) + "!"


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "cycler", "x"])
def test_options_are_of_a_known_few(name: str) -> None:
    with pytest.raises(ConfigError, match="options of apply_chat_template must be some of"):
        ChatTemplate("{{ x }}").render(
            MESSAGES, add_generation_prompt=True, special_tokens={}, options={name: 1}
        )


def test_a_rendering_has_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", -1.0)
    with pytest.raises(ConfigError, match=r"it takes more than -1\.0 seconds"):
        render("{% for i in [1] %}{{ i }}{% endfor %}")
    assert render("{{ 1 }}") == "1"
