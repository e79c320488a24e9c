"""The demo's server: started, asked by one and by many, and held to what one alone was told."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from deepseek.cli.demo.state import Demo
from deepseek.cli.output import number
from deepseek.cli.report import Section
from deepseek.records import Measurement

if TYPE_CHECKING:
    from openai import OpenAI

SCHEME, USERS, NEW_TOKENS = "int8", 8, 48
COMMAND = "deepseek demo"
LETTER = "Dear reader, this is a long letter that you should remember. " * 30


def serve(demo: Demo) -> Section:
    """A server, asked by OpenAI's client: one user, eight at once, and a second turn."""
    from openai import OpenAI

    from deepseek.serve import local_server

    options = ["--scheme", SCHEME, "--name", "demo", "--max-running", str(USERS)]
    with (
        local_server(demo.bundle.path, options) as server,
        OpenAI(base_url=server.url, api_key="none") as client,
    ):
        questions = [f"Tell me one thing about the number {place}." for place in range(USERS)]
        _ask(client, "Hello")
        start_s = time.perf_counter()
        alone = [_ask(client, question) for question in questions]
        alone_s = time.perf_counter() - start_s
        others = [f"Now tell me another thing about {place}." for place in range(USERS)]
        start_s = time.perf_counter()
        with ThreadPoolExecutor(USERS) as users:
            list(users.map(lambda question: _ask(client, question), others))
        together_s = time.perf_counter() - start_s
        with ThreadPoolExecutor(USERS) as users:
            again = list(users.map(lambda question: _ask(client, question), questions))
        first_s, second_s, cached = _two_turns(client)
    tokens = USERS * NEW_TOKENS
    differing = sum(a != b for a, b in zip(alone, again, strict=True))
    conditions = {"model": demo.name, "scheme": SCHEME, "new_tokens": NEW_TOKENS}
    found = (
        _measurement("served_tokens_per_s", tokens / alone_s, "tokens/s", users=1, **conditions),
        _measurement(
            "served_tokens_per_s", tokens / together_s, "tokens/s", users=USERS, **conditions
        ),
        _measurement("first_token_s", first_s, "s", turn=1, **conditions),
        _measurement("first_token_s", second_s, "s", turn=2, **conditions),
    )
    words = (
        f"{USERS} users at once: {number(alone_s / together_s)} times the tokens/s of one by one; "
        f"{USERS - differing} of {USERS} answers are, word for word, those that each got alone\n"
        f"second turn of a dialogue: {cached} tokens of the prompt were in the cache"
    )
    failure = None
    if differing:
        failure = f"{differing} of {USERS} answers depend on who else asks"
    return Section(title="Served to many", words=words, measurements=found, failure=failure)


def _ask(client: OpenAI, question: str) -> str:
    """Return a greedy answer of `NEW_TOKENS` tokens."""
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": question}],
        max_tokens=NEW_TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    return answer.choices[0].message.content or ""


def _two_turns(client: OpenAI) -> tuple[float, float, int]:
    """Return seconds to the first token of two turns, and tokens of the second that were cached."""
    messages: list[Any] = [{"role": "user", "content": LETTER}]
    first_s, said, _ = _first_token(client, messages)
    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "Thanks!"}]
    second_s, _, cached = _first_token(client, messages)
    return first_s, second_s, cached


def _first_token(client: OpenAI, messages: list[Any]) -> tuple[float, str, int]:
    start_s = time.perf_counter()
    first_s, said, cached = 0.0, "", 0
    chunks = client.chat.completions.create(
        model="demo",
        messages=messages,
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in chunks:
        if chunk.choices and chunk.choices[0].delta.content:
            first_s = first_s or time.perf_counter() - start_s
            said += chunk.choices[0].delta.content
        if chunk.usage and chunk.usage.prompt_tokens_details:
            cached = chunk.usage.prompt_tokens_details.cached_tokens or 0
    return first_s, said, cached


def _measurement(name: str, value: float, unit: str, **conditions: Any) -> Measurement:
    return Measurement(name=name, value=value, unit=unit, conditions=conditions, command=COMMAND)
