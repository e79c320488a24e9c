"""Responses in the background end once, are bounded, and survive whoever answers them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete

from deepseek.serve.state.background import BackgroundStore
from deepseek.serve.state.database import Database, open_database
from deepseek.serve.state.errors import NotFoundError, QuotaError, RequestError
from deepseek.serve.state.responses import ResponseLimits, ResponseStore
from deepseek.serve.state.tables import ResponseRow


def name(number: int) -> str:
    return f"resp_{number:032x}"


def queued(number: int, after: int | None = None) -> dict[str, Any]:
    return {
        "id": name(number),
        "previous_response_id": None if after is None else name(after),
        "background": True,
        "status": "queued",
        "output": [],
    }


def ended(number: int, size: int = 0) -> dict[str, Any]:
    return {**queued(number), "status": "completed", "output": [{"text": "x" * size}]}


def enter(store: BackgroundStore, tenant: str, number: int, size: int = 0) -> None:
    store.enter(tenant, queued(number), [{"id": f"in-{number}"}], {"model": "m" * size})


def stores(
    database: Database, limits: ResponseLimits | None = None
) -> tuple[ResponseStore, BackgroundStore]:
    responses = ResponseStore(database, limits)
    return responses, BackgroundStore(responses)


def test_a_response_is_queued_in_progress_and_ended_once(database: Database) -> None:
    responses, store = stores(database)
    enter(store, "a", 1, size=3)
    assert responses.get("a", name(1)).response["status"] == "queued"
    begun = store.begin(name(1))
    assert begun is not None and begun.request == {"model": "mmm"}
    assert begun.input_items == [{"id": "in-1"}]
    assert responses.get("a", name(1)).response["status"] == "in_progress"
    assert [one.id for one in store.unfinished()] == [name(1)]
    assert store.finish(name(1), ended(1))
    assert not store.finish(name(1), {**ended(1), "status": "failed"})
    assert responses.get("a", name(1)).response["status"] == "completed"
    assert store.unfinished() == [] and store.begin(name(1)) is None


def test_what_has_not_ended_is_there_after_a_restart(tmp_path: Path) -> None:
    database = open_database(tmp_path / "state.db")
    _, store = stores(database)
    for number, tenant in enumerate("aba"):
        enter(store, tenant, number)
    store.begin(name(0))
    store.finish(name(2), ended(2))
    database.close()
    database = open_database(tmp_path / "state.db")
    _, store = stores(database)
    assert [(one.id, one.tenant) for one in store.unfinished()] == [(name(0), "a"), (name(1), "b")]
    begun = store.begin(name(0))
    assert begun is not None and begun.response["status"] == "in_progress"
    database.close()


def test_a_cancelled_response_stays_cancelled(database: Database) -> None:
    responses, store = stores(database)
    enter(store, "a", 1)
    with pytest.raises(NotFoundError):
        store.cancel("b", name(1))
    assert store.cancel("a", name(1))["status"] == "cancelled"
    assert store.cancel("a", name(1))["status"] == "cancelled"
    assert not store.finish(name(1), ended(1)) and store.unfinished() == []
    responses.put("a", {"id": name(2), "output": []}, [])
    with pytest.raises(RequestError, match="Cannot cancel a synchronous response"):
        store.cancel("a", name(2))


def test_a_deleted_response_cannot_end(database: Database) -> None:
    responses, store = stores(database)
    enter(store, "a", 1)
    responses.delete("a", name(1))
    assert store.begin(name(1)) is None and not store.finish(name(1), ended(1))


def test_what_has_not_ended_cannot_be_continued(database: Database) -> None:
    responses, store = stores(database)
    enter(store, "a", 1)
    with pytest.raises(RequestError, match="one that has ended"):
        responses.history("a", name(1))
    store.finish(name(1), ended(1))
    assert [item.get("id") for item in responses.history("a", name(1))] == ["in-1", None]


def test_a_flood_is_bounded_and_leaves_room_for_others(database: Database) -> None:
    limits = ResponseLimits(tenant_unfinished=3, total_unfinished=5)
    _, store = stores(database, limits)
    for number in range(3):
        enter(store, "flood", number)
    with pytest.raises(QuotaError, match="at most 3; got 4") as caught:
        enter(store, "flood", 3)
    assert caught.value.is_passing
    enter(store, "b", 10)
    enter(store, "c", 11)
    with pytest.raises(QuotaError, match="of all keys must be at most 5"):
        enter(store, "d", 12)
    store.cancel("flood", name(0))
    enter(store, "d", 12)


def test_what_has_not_ended_is_never_dropped_for_room(database: Database) -> None:
    responses, store = stores(database, ResponseLimits(tenant_count=3, tenant_bytes=2000))
    enter(store, "a", 1)
    enter(store, "a", 2)
    responses.put("a", {"id": name(3), "output": []}, [])
    enter(store, "a", 4)
    assert len(store.unfinished()) == 3
    with pytest.raises(NotFoundError):
        responses.get("a", name(3))
    with pytest.raises(QuotaError, match="leave no room"):
        responses.put("a", {"id": name(5), "output": []}, [])
    with pytest.raises(QuotaError, match="at most 2000 bytes"):
        store.finish(name(1), ended(1, size=2000))
    assert store.finish(name(1), {**ended(1), "output": []})


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("enter", "begin", "finish", "cancel", "delete", "put")),
        st.sampled_from("ab"),
        st.integers(0, 7),
        st.integers(0, 600),
    ),
    max_size=25,
)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=STEPS)
def test_bounds_hold_and_nothing_ends_twice(
    database: Database, steps: list[tuple[str, str, int, int]]
) -> None:
    with database.write() as session:
        session.execute(delete(ResponseRow))
    limits = ResponseLimits(
        tenant_count=4, tenant_bytes=2500, total_bytes=4000, tenant_unfinished=2
    )
    responses, store = stores(database, limits)
    unfinished: dict[int, str] = {}
    for place, (step, tenant, target, size) in enumerate(steps, 100):
        number = list(unfinished)[target % len(unfinished)] if unfinished else place
        owner = unfinished.get(number)
        try:
            if step == "enter":
                enter(store, tenant, place, size)
                unfinished[place] = tenant
            elif step == "put":
                responses.put(tenant, {"id": name(place), "output": ["x" * size]}, [])
            elif owner is not None and step == "begin":
                assert store.begin(name(number)) is not None
            elif owner is not None and step == "finish":
                assert store.finish(name(number), ended(number, size))
                del unfinished[number]
            elif owner is not None:
                (store.cancel if step == "cancel" else responses.delete)(owner, name(number))
                del unfinished[number]
        except QuotaError:
            pass
        assert [one.id for one in store.unfinished()] == [name(each) for each in unfinished]
        with database.read() as session:
            rows = session.query(ResponseRow).all()
        assert sum(row.size_bytes for row in rows) <= 4000
        for one in "ab":
            mine = [row for row in rows if row.tenant == one]
            assert len(mine) <= 4 and sum(row.size_bytes for row in mine) <= 2500
            assert sum(row.request is not None for row in mine) <= 2
