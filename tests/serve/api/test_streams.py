"""Streams and clients that go away, read slowly, or meet an error on the way."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from deepseek.serve.api import Metrics
from deepseek.serve.generation import DeadlineError, EngineError, QueueFull
from tests.serve.api.support import HELLO, Caller, chat, error_of, events, make_app, post, run
from tests.serve.fakes import FakeGenerator

ASK: dict[str, Any] = {"model": "tiny", "messages": HELLO}


def gated(at: int) -> FakeGenerator:
    """Return an engine that stops before output `at` until somebody opens its gate."""
    generator = FakeGenerator()
    generator.gate, generator.gate_at = asyncio.Event(), at
    return generator


async def until(condition: Any) -> None:
    """Wait until something holds."""
    while not condition():
        await asyncio.sleep(0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("n", [1, 3])
def test_attack_24_a_client_that_goes_away_ends_its_answers(stream: bool, at: int, n: int) -> None:
    seen: list[Any] = []

    async def work() -> FakeGenerator:
        generator = gated(at)
        caller = Caller(make_app(generator, on_event=seen.append), ASK | {"stream": stream, "n": n})
        task = asyncio.create_task(caller())
        await until(lambda: generator.running == n)
        for _ in range(20):
            await asyncio.sleep(0)
        caller.disconnect()
        await task
        assert caller.status == (200 if stream and at else 499)
        return generator

    generator = run(work())
    assert (generator.running, generator.cancelled) == (0, n)
    assert [event.finish_reason for event in seen] == ["cancelled"] * n


def test_attack_24_a_client_that_goes_away_before_its_stream_has_begun() -> None:
    async def work() -> None:
        generator = FakeGenerator()
        caller = Caller(make_app(generator), ASK | {"stream": True})

        async def wait(message: dict[str, Any]) -> None:
            caller.disconnect()
            await asyncio.Event().wait()

        caller.on_send = wait
        await caller()
        # now, not when the loop ends and closes what was forgotten
        assert (generator.running, generator.cancelled) == (0, 1)

    run(work())


def test_attack_24_a_storm_of_disconnects_leaves_nothing() -> None:
    metrics = Metrics("tiny")

    async def work() -> FakeGenerator:
        generator = FakeGenerator()
        app = make_app(generator, metrics=metrics)
        callers = [Caller(app, ASK | {"stream": number % 2 == 0, "n": 2}) for number in range(60)]
        tasks = [asyncio.create_task(caller()) for caller in callers]
        for number, caller in enumerate(callers):
            for _ in range(number % 7):
                await asyncio.sleep(0)
            caller.disconnect()
        await asyncio.gather(*tasks)
        assert len(asyncio.all_tasks()) <= 2  # this one, and sse-starlette's watcher
        return generator

    generator = run(work())
    assert generator.running == 0 and len(generator.requests) > 60
    assert b'vllm:num_requests_running{model_name="tiny"} 0.0' in metrics.text()


def test_attack_18_a_slow_reader_is_dropped() -> None:
    async def work() -> tuple[FakeGenerator, Caller]:
        generator = FakeGenerator("x" * 1000)
        caller = Caller(make_app(generator, send_timeout_s=0.02), ASK | {"stream": True})

        async def never(message: dict[str, Any]) -> None:
            if len(caller.sent) == 5:
                await asyncio.Event().wait()

        caller.on_send = never
        await caller()
        return generator, caller

    generator, caller = run(work())
    assert (generator.running, generator.cancelled) == (0, 1)
    assert len(caller.sent) == 5 and caller.sent[-1].get("more_body")


def test_a_slow_reader_holds_the_reading_of_the_engine_up() -> None:
    async def work() -> int:
        generator = FakeGenerator("x" * 1000)
        caller = Caller(make_app(generator), ASK | {"stream": True})
        blocked, taken = asyncio.Event(), []
        outputs = generator._outputs
        generator._outputs = lambda request: (taken.append(o) or o for o in outputs(request))  # type: ignore[assignment,return-value]

        async def wait(message: dict[str, Any]) -> None:
            if len(caller.sent) == 5:
                blocked.set()
                await asyncio.Event().wait()

        caller.on_send = wait
        task = asyncio.create_task(caller())
        await blocked.wait()
        for _ in range(500):
            await asyncio.sleep(0)
        caller.disconnect()
        await task
        return len(taken)

    assert run(work()) < 20


def test_a_silent_stream_gets_comments() -> None:
    async def work() -> Caller:
        generator = gated(2)
        caller = Caller(make_app(generator, keep_alive_s=0.01), ASK | {"stream": True})
        task = asyncio.create_task(caller())
        await until(lambda: caller.body.count(b": keep-alive\n\n") >= 2)
        assert generator.gate is not None
        generator.gate.set()
        await task
        return caller

    caller = run(work())
    assert events(caller.body.decode())[-1] == "[DONE]"


def test_a_stream_opens_before_a_late_first_output() -> None:
    async def work() -> Caller:
        generator = gated(0)
        caller = Caller(make_app(generator, keep_alive_s=0.01), ASK | {"stream": True})
        task = asyncio.create_task(caller())
        await until(lambda: caller.body.count(b"keep-alive"))
        generator.error, generator.error_at = DeadlineError("late"), 0
        assert generator.gate is not None
        generator.gate.set()
        await task
        return caller

    caller = run(work())
    assert caller.status == 200
    assert events(caller.body.decode())[-1]["error"]["code"] == "deadline_exceeded"


FAULTS = [
    (QueueFull("full", 7.2), 503, "overloaded", "8"),
    (DeadlineError("late"), 504, "deadline_exceeded", None),
    (EngineError("died at 0x7f00dead /home/x"), 503, "engine_error", "5"),
    (RuntimeError("secret 0x7f00dead"), 500, "internal_error", None),
]


@pytest.mark.parametrize(("fault", "status", "code", "retry_after"), FAULTS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_an_error_before_the_first_output_has_its_status(
    fault: Exception, status: int, code: str, retry_after: str | None, stream: bool, path: str
) -> None:
    generator = FakeGenerator()
    generator.error = fault
    app = make_app(generator)
    body = {"stream": stream} | ({"prompt": "x"} if path == "/v1/completions" else ASK)
    response = post(app, path, body)
    assert error_of(response, status)["code"] == code
    assert response.headers.get("retry-after") == retry_after
    assert "secret" not in response.text and "/home" not in response.text


@pytest.mark.parametrize(("fault", "status", "code", "retry_after"), FAULTS[1:])
def test_an_error_in_the_middle_of_a_stream_is_an_event(
    fault: Exception, status: int, code: str, retry_after: str | None
) -> None:
    generator = FakeGenerator()
    generator.error, generator.error_at = fault, 4
    response = chat(make_app(generator), stream=True)
    assert response.status_code == 200
    *chunks, last = events(response.text)
    assert len(chunks) == 5
    assert last["error"]["code"] == code and "secret" not in response.text
    assert response.text.endswith("}}\n\n")


@pytest.mark.parametrize(
    ("finish", "status", "code"),
    [("error", 500, "generation_failed"), ("deadline", 504, None), ("cancelled", 503, None)],
)
def test_an_answer_that_the_engine_gave_up_is_an_error(
    finish: str, status: int, code: str | None
) -> None:
    generator = FakeGenerator()
    generator.finish = finish
    error = error_of(chat(make_app(generator)), status)
    assert code is None or error["code"] == code
    assert "error" in events(chat(make_app(generator), stream=True).text)[-1]


def test_outputs_that_end_too_early_are_an_error() -> None:
    generator = FakeGenerator()
    generator._outputs = lambda request: []  # type: ignore[method-assign]
    error_of(chat(make_app(generator)), 503)


def test_one_failing_answer_ends_its_siblings() -> None:
    generator = FakeGenerator()
    generator.error, generator.error_at = EngineError("x"), 3
    error_of(chat(make_app(generator), n=4), 503)
    assert generator.running == 0
