"""Responses are kept with their tenant, chained, and bounded in every direction."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete

from deepseek.serve.state.database import Database
from deepseek.serve.state.errors import NotFoundError, QuotaError, RequestError
from deepseek.serve.state.files import DAY_S
from deepseek.serve.state.responses import ResponseLimits, ResponseStore
from deepseek.serve.state.tables import ResponseRow
from tests.serve.state.clock import Clock

COUNT = ResponseLimits(tenant_count=3)


def name(number: int) -> str:
    return f"resp_{number:032x}"


def put(
    store: ResponseStore, tenant: str, number: int, after: int | None = None, size: int = 0
) -> str:
    """Keep a response with one item of input and one of output, which say its number."""
    response = {
        "id": name(number),
        "previous_response_id": None if after is None else name(after),
        "output": [{"id": f"out-{number}", "text": "x" * size}],
    }
    store.put(tenant, response, [{"id": f"in-{number}"}])
    return name(number)


def kept(store: ResponseStore, tenant: str, most: int = 30) -> list[int]:
    """Return the numbers that are still there."""
    found = []
    for number in range(most):
        try:
            store.get(tenant, name(number))
        except NotFoundError:
            continue
        found.append(number)
    return found


def ids(items: list[dict[str, Any]]) -> list[str]:
    return [item["id"] for item in items]


def test_a_conversation_is_read_from_its_end(database: Database) -> None:
    store = ResponseStore(database)
    for number, after in ((1, None), (2, 1), (3, 2), (4, 2)):
        put(store, "a", number, after)
    assert ids(store.history("a", name(4))) == ["in-1", "out-1", "in-2", "out-2", "in-4", "out-4"]
    found = store.get("a", name(3))
    assert found.input_items == [{"id": "in-3"}] and found.previous_id == name(2)


def test_another_tenants_response_is_not_there(database: Database) -> None:
    store = ResponseStore(database)
    put(store, "a", 1)
    for wrong in (name(1), "", "resp_", "resp_\0", "resp_" + "\ud800" * 32, "x" * 10_000):
        for ask in (store.get, store.delete, store.history):
            with pytest.raises(NotFoundError, match="No such response"):
                ask("b", wrong)
    assert kept(store, "a") == [1]


def test_a_deleted_response_ends_the_history_of_later_ones(database: Database) -> None:
    store = ResponseStore(database)
    for number, after in ((1, None), (2, 1), (3, 2)):
        put(store, "a", number, after)
    store.delete("a", name(1))
    with pytest.raises(RequestError, match="one whose history is whole") as caught:
        store.history("a", name(3))
    assert caught.value.param == "previous_response_id"
    assert store.get("a", name(3)).response["id"] == name(3)


def test_the_oldest_that_nothing_refers_to_goes_first(database: Database) -> None:
    store = ResponseStore(database, COUNT)
    put(store, "a", 1)
    put(store, "a", 2)
    put(store, "a", 3, after=1)
    put(store, "b", 9)
    put(store, "a", 4)
    assert kept(store, "a") == [1, 3, 4], "1 is older, but 3 continues it"
    put(store, "a", 5, after=3)
    assert kept(store, "a") == [1, 3, 5]
    assert ids(store.history("a", name(5)))[0] == "in-1"
    put(store, "a", 6, after=5)
    assert kept(store, "a") == [3, 5, 6], "all are continued, so the oldest goes"
    assert kept(store, "b") == [9]


def test_bytes_are_bounded(database: Database) -> None:
    store = ResponseStore(database, ResponseLimits(tenant_bytes=1000))
    for number in range(4):
        put(store, "a", number, size=300)
    assert kept(store, "a") == [2, 3]
    with pytest.raises(QuotaError, match="size of the response must be at most 1000 bytes"):
        put(store, "a", 5, size=1000)
    assert kept(store, "a") == [2, 3]


def test_who_holds_most_gives_way_when_the_server_is_full(database: Database) -> None:
    store = ResponseStore(database, ResponseLimits(total_bytes=2500))
    put(store, "small", 1, size=300)
    for number in range(10, 20):
        put(store, "flood", number, size=300)
    put(store, "small", 2, size=300)
    assert kept(store, "small") == [1, 2]
    assert kept(store, "flood") == [17, 18, 19]


def test_responses_go_when_their_time_has_passed(database: Database, clock: Clock) -> None:
    store = ResponseStore(database, clock=clock)
    put(store, "a", 1)
    clock.now += 30 * DAY_S - 1
    put(store, "a", 2, after=1)
    clock.now += 1
    assert kept(store, "a") == [2]
    store.sweep()
    with database.read() as session:
        assert session.query(ResponseRow).count() == 1


def test_chains_are_bounded(database: Database) -> None:
    store = ResponseStore(database, ResponseLimits(chain=3))
    for number in range(4):
        put(store, "a", number, number - 1 if number else None)
    assert len(store.history("a", name(2))) == 6
    with pytest.raises(RequestError, match="at most 3 responses long"):
        store.history("a", name(3))


STEPS = st.lists(
    st.tuples(st.sampled_from("ab"), st.none() | st.integers(0, 11), st.integers(0, 900)),
    max_size=12,
)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=STEPS)
def test_bounds_hold_after_every_step(
    database: Database, steps: list[tuple[str, int | None, int]]
) -> None:
    with database.write() as session:
        session.execute(delete(ResponseRow))
    limits = ResponseLimits(tenant_count=4, tenant_bytes=2000, total_bytes=3000)
    store = ResponseStore(database, limits)
    for number, (tenant, after, size) in enumerate(steps):
        put(store, tenant, number, after, size)
        store.get(tenant, name(number))
        with database.read() as session:
            rows = session.query(ResponseRow).all()
        assert sum(row.size_bytes for row in rows) <= 3000
        for one in "ab":
            mine = [row for row in rows if row.tenant == one]
            assert len(mine) <= 4 and sum(row.size_bytes for row in mine) <= 2000
