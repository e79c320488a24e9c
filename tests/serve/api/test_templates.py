"""Chat templates come with a model, and are strangers: they cannot hang or escape the server."""

from __future__ import annotations

import asyncio

import pytest

from deepseek.data import chat_template
from tests.serve.api.support import HELLO, chat, client, error_of, make_app, run
from tests.serve.fakes import FakeGenerator, byte_tokenizer

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{{ 'x' * 10 ** 9 }}",
        ENDLESS,
    ],
)
def test_attack_3_hostile_templates_are_a_400(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "MAX_STEPS", 5_000)
    generator = FakeGenerator(tokenizer=byte_tokenizer(template))
    error = error_of(chat(make_app(generator)), 400)
    assert error["param"] == "messages" and "subclasses" not in error["message"]
    assert generator.requests == []


def test_a_model_without_a_template_has_no_chat() -> None:
    generator = FakeGenerator(tokenizer=byte_tokenizer(None))
    assert "chat_template" in error_of(chat(make_app(generator)), 400)["message"]


def test_attack_4_a_slow_template_does_not_hold_others_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_STEPS", 10**9)
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.5)

    async def work() -> int:
        async with client(make_app(FakeGenerator(tokenizer=byte_tokenizer(ENDLESS)))) as session:
            body = {"messages": HELLO}
            slow = asyncio.create_task(session.post("/v1/chat/completions", json=body))
            answered = 0
            while not slow.done():
                assert (await session.get("/health")).status_code == 200
                answered += 1
                await asyncio.sleep(0.01)  # without a socket, a request alone never yields
            error = error_of(slow.result(), 400)
            assert "it takes more than 0.5 seconds" in error["message"]
            return answered

    assert run(work()) > 5
