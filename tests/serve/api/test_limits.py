"""Limits of a tenant on a clock that the test moves."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.serve.api import TenantLimits
from deepseek.serve.api.limits import TokenBucket
from deepseek.serve.api.stateful import add_state
from deepseek.serve.state.batches import BatchStore
from deepseek.serve.state.database import open_database
from deepseek.serve.state.files import FileStore
from deepseek.serve.state.responses import ResponseStore
from tests.serve.api.support import (
    HELLO,
    OTHER_KEY,
    Caller,
    call,
    chat,
    error_of,
    make_app,
    post,
    run,
)
from tests.serve.fakes import FakeGenerator


class FakeClock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def limited(clock: FakeClock, generator: FakeGenerator | None = None, **limits: Any) -> Any:
    """Return an application whose first tenant has limits."""
    return make_app(generator, clock=clock, limits=TenantLimits(**limits))


def test_requests_a_minute() -> None:
    clock = FakeClock()
    app = limited(clock, requests_per_minute=3)
    for _ in range(3):
        assert call(app, "GET", "/v1/models").status_code == 200
    response = call(app, "GET", "/v1/models")
    error = error_of(response, 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert response.headers["retry-after"] == "20"
    other = {"Authorization": f"Bearer {OTHER_KEY}"}
    assert call(app, "GET", "/v1/models", headers=other).status_code == 200
    assert call(app, "GET", "/health").status_code == 200
    clock.now += 19.9
    error_of(call(app, "GET", "/v1/models"), 429)
    clock.now += 0.2
    assert call(app, "GET", "/v1/models").status_code == 200
    error_of(call(app, "GET", "/v1/models"), 429)


def test_tokens_a_minute_are_charged_and_what_is_unused_given_back() -> None:
    clock, generator = FakeClock(), FakeGenerator()
    app = limited(clock, generator, tokens_per_minute=100)
    body = {"prompt": "x" * 10, "max_tokens": 60}
    # 70 are charged, 10 + 13 used
    assert post(app, "/v1/completions", body).status_code == 200
    assert post(app, "/v1/completions", body).status_code == 200
    response = post(app, "/v1/completions", body)
    error_of(response, 429)
    # 54 are left of 70: 16 are short, at 100 a minute
    assert response.headers["retry-after"] == "10"
    clock.now += 10
    assert post(app, "/v1/completions", body).status_code == 200


def test_attack_8_each_answer_is_charged() -> None:
    clock, generator = FakeClock(), FakeGenerator()
    app = limited(clock, generator, tokens_per_minute=200)
    body = {"prompt": "x" * 10, "max_tokens": 60}
    error = error_of(post(app, "/v1/completions", body | {"n": 3}), 400)
    assert "200 a minute" in error["message"]
    error_of(post(app, "/v1/completions", {**body, "prompt": ["x" * 10] * 3}), 400)
    assert generator.requests == []
    assert post(app, "/v1/completions", body | {"n": 2}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_answer_gives_its_charge_back(stream: bool) -> None:
    clock, generator = FakeClock(), FakeGenerator()
    app = limited(clock, generator, tokens_per_minute=100)
    generator.error = RuntimeError("x")
    body = {"prompt": "x", "max_tokens": 90, "stream": stream}
    error_of(post(app, "/v1/completions", body), 500)
    generator.error = None
    assert post(app, "/v1/completions", body).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_requests_at_once(stream: bool) -> None:
    async def work() -> None:
        generator = FakeGenerator()
        generator.gate = asyncio.Event()
        app = limited(FakeClock(), generator, concurrency=2)
        callers = [Caller(app, {"messages": HELLO, "stream": stream}) for _ in range(3)]
        tasks = [asyncio.create_task(caller()) for caller in callers[:2]]
        while generator.running < 2:
            await asyncio.sleep(0)
        await callers[2]()
        assert callers[2].status == 429
        callers[0].disconnect()
        await tasks[0]
        generator.gate.set()
        again = Caller(app, {"messages": HELLO})
        await asyncio.gather(tasks[1], again())
        assert callers[1].status == again.status == 200

    run(work())


def test_a_place_is_free_again_after_an_error() -> None:
    generator = FakeGenerator()
    generator.error = RuntimeError("x")
    app = limited(FakeClock(), generator, concurrency=1)
    for _ in range(3):
        error_of(chat(app), 500)
        error_of(chat(app, n=0), 400)


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 1200), st.booleans()), max_size=30),
)
def test_a_bucket_never_gives_more_than_it_gets(rate: int, steps: Any) -> None:
    clock = FakeClock()
    bucket = TokenBucket(rate, clock)
    taken, elapsed = 0.0, 0.0
    for seconds, amount, waits in steps:
        clock.now += seconds
        elapsed += seconds
        wait_s = bucket.take(amount)
        if wait_s and waits and amount <= rate:
            clock.now += wait_s + 1e-6
            elapsed += wait_s + 1e-6
            wait_s = bucket.take(amount)
            assert wait_s == 0
        if not wait_s:
            taken += amount
        assert taken <= rate + elapsed * rate / 60 + 1e-3


def test_a_clock_that_goes_back_gives_nothing() -> None:
    clock = FakeClock()
    bucket = TokenBucket(60, clock)
    assert bucket.take(60) == 0
    clock.now -= 500
    assert bucket.take(1) > 0
    clock.now += 1
    assert bucket.take(1) == 0


def test_a_response_in_the_background_is_charged_when_it_comes(tmp_path: Path) -> None:
    clock = FakeClock()
    app = limited(clock, tokens_per_minute=200)
    database = open_database(tmp_path / "state.sqlite")
    files = FileStore(database, tmp_path / "files")
    add_state(app, files=files, batches=BatchStore(files), responses=ResponseStore(database))
    asked = {"model": "tiny", "input": "Hi", "background": True, "max_output_tokens": 120}
    first = post(app, "/v1/responses", asked).json()
    assert first["status"] == "queued"
    error = error_of(post(app, "/v1/responses", asked), 429)
    assert error["code"] == "rate_limit_exceeded"
    other = {"Authorization": f"Bearer {OTHER_KEY}"}
    assert post(app, "/v1/responses", asked, headers=other).json()["status"] == "queued"
    call(app, "POST", f"/v1/responses/{first['id']}/cancel")  # it had not begun: nothing was used
    assert post(app, "/v1/responses", asked).json()["status"] == "queued"
    wrong = asked | {"model": "another"}
    assert error_of(post(app, "/v1/responses", wrong, headers=other), 404)
    long = asked | {"input": "x" * 5000}
    assert error_of(post(app, "/v1/responses", long, headers=other), 400)
    database.close()
