"""Loads: how many at once, in which order, what a later turn carries, and what a stop leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from deepseek.serve.load import (
    Client,
    Dialogue,
    Load,
    Outcome,
    Run,
    Target,
    Turn,
    Workload,
    plan_dialogues,
    run_load,
)
from tests.serve.load.fake_server import DONE, STREAM, FakeServer, Step, http, piece, plain


def run(
    server: FakeServer,
    dialogues: list[Dialogue],
    load: Load,
    on_end: Callable[[Outcome], None] = lambda outcome: None,
    **settings: Any,
) -> Run:
    """Return what becomes of dialogues."""

    async def drive() -> Run:
        async with server, Client(Target(url=server.url, model="fake", **settings)) as client:
            return await run_load(client, dialogues, load, on_end=on_end)

    return asyncio.run(drive())


def slow(asked: dict[str, Any]) -> list[Step]:
    """Answer one word in 30 ms."""
    return [STREAM, 0.03, piece("a", "stop"), DONE]


def singles(count: int) -> list[Dialogue]:
    """Return dialogues of one turn."""
    return list(plan_dialogues(Workload(num_dialogues=count, prompt_tokens=4, new_tokens=3)))


@pytest.mark.parametrize("users", [1, 3, 20])
def test_a_closed_loop_keeps_its_users_busy_and_no_more(users: int) -> None:
    server = FakeServer(slow)
    found = run(server, singles(9), Load(concurrency=users))
    assert len(found.outcomes) == 9 and all(each.is_answered for each in found.outcomes)
    assert server.most_open == min(users, 9)
    assert {each.dialogue for each in found.outcomes} == set(range(9))
    rounds = -(-9 // users)
    assert found.wall_s >= 0.03 * rounds
    assert all(0 <= each.queue_s < 0.1 for each in found.outcomes)
    assert found.client_cpu_s > 0 and not found.was_interrupted


def test_an_open_loop_waits_for_nobody() -> None:
    server = FakeServer(slow)
    found = run(server, singles(12), Load(rate=400.0, burstiness=1000.0))
    assert all(each.is_answered for each in found.outcomes)
    sent = [each.planned_s for each in sorted(found.outcomes, key=lambda each: each.dialogue)]
    assert sent == sorted(sent)
    assert sent[-1] - sent[0] == pytest.approx(11 / 400, rel=0.1)
    # 12 arrive within the time of the first answer
    assert server.most_open > 4
    assert all(each.queue_s >= 0 for each in found.outcomes)


def test_an_open_loop_goes_on_when_nobody_answers() -> None:
    server = FakeServer(lambda asked: [http(503, b"no")])
    found = run(server, singles(5), Load(rate=500.0))
    assert [each.error for each in found.outcomes] == ["http_503"] * 5


DIALOGUE = Dialogue(
    number=0,
    system="be brief",
    turns=(Turn(text="one", max_tokens=2), Turn(text="two", max_tokens=3)),
)


def test_a_later_turn_carries_the_answers() -> None:
    server = FakeServer(plain)
    found = run(server, [DIALOGUE], Load(concurrency=1), endpoint="chat")
    assert [each.turn for each in found.outcomes] == [0, 1]
    first, second = (each["messages"] for each in server.asked)
    assert first == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
    ]
    assert second == [
        *first,
        {"role": "assistant", "content": " w0 w1"},
        {"role": "user", "content": "two"},
    ]
    assert [each["max_tokens"] for each in server.asked] == [2, 3]


def test_without_chat_a_later_turn_continues_the_text() -> None:
    server = FakeServer(plain)
    run(server, [DIALOGUE], Load(concurrency=1))
    prompts = [each["prompt"] for each in server.asked]
    assert prompts == ["be brief\none", "be brief\none\n w0 w1\ntwo"]


def test_a_dialogue_ends_where_it_fails() -> None:
    server = FakeServer(lambda asked: [STREAM, piece("a")])
    found = run(server, [DIALOGUE], Load(concurrency=1))
    assert [each.error for each in found.outcomes] == ["cut_short"]


def test_one_failure_stops_nobody_else() -> None:
    def reply(asked: dict[str, Any]) -> list[Step]:
        return [None] if "two" in asked["prompt"] else slow(asked)

    texts = ("one", "two", "three")
    dialogues = [
        Dialogue(number=place, turns=(Turn(text=text, max_tokens=1),))
        for place, text in enumerate(texts)
    ]
    ended: list[int] = []
    found = run(
        FakeServer(reply),
        dialogues,
        Load(concurrency=2),
        on_end=lambda each: ended.append(each.dialogue),
    )
    errors = {each.dialogue: each.error for each in found.outcomes}
    assert errors == {0: None, 1: "dropped", 2: None} and sorted(ended) == [0, 1, 2]


def test_hang_ups_are_not_failures() -> None:
    few = Workload(num_dialogues=4, new_tokens=6, hang_up_share=1.0)

    def reply(asked: dict[str, Any]) -> list[Step]:
        return [STREAM, *([0.005, piece("a")] * 20), piece("", "length"), DONE]

    found = run(FakeServer(reply), list(plan_dialogues(few)), Load(concurrency=2))
    assert all(each.hung_up and each.error is None for each in found.outcomes)


@pytest.mark.parametrize("load", [Load(concurrency=2), Load(rate=100.0)])
def test_a_stop_leaves_what_there_was(load: Load) -> None:
    """The first answers come, then the server hangs, then the run is stopped."""
    answered = asyncio.Event()
    count = 0

    def reply(asked: dict[str, Any]) -> list[Step]:
        nonlocal count
        count += 1
        return plain(asked) if count <= 3 else [STREAM, piece("a"), 60.0]

    ended: list[Outcome] = []

    def on_end(outcome: Outcome) -> None:
        ended.append(outcome)
        if len(ended) == 3:
            answered.set()

    async def drive() -> Run:
        async with FakeServer(reply) as server, Client(Target(url=server.url)) as client:
            task = asyncio.ensure_future(run_load(client, singles(8), load, on_end=on_end))
            await asyncio.wait_for(answered.wait(), 10)
            task.cancel()
            return await task

    found = asyncio.run(drive())
    assert found.was_interrupted and found.outcomes == ended and len(ended) == 3
    assert found.wall_s > 0


def test_a_cancellation_that_is_lost_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something below may swallow one; whoever pressed Ctrl-C does not wait for the server."""
    monkeypatch.setattr("deepseek.serve.load.run.CANCEL_S", 0.01)
    lost: list[int] = []

    class Deaf(Client):
        async def ask(self, *asked: Any) -> None:
            for number in range(3):
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    lost.append(number)
            await asyncio.sleep(60)

    async def drive() -> Run:
        client = Deaf(Target(url="http://127.0.0.1:1", model="fake"))
        load = asyncio.ensure_future(run_load(client, singles(2), Load(concurrency=2)))
        await asyncio.sleep(0.01)
        load.cancel()
        return await asyncio.wait_for(load, 10)

    found = asyncio.run(drive())
    assert found.was_interrupted and not found.outcomes
    assert len(lost) == 6
