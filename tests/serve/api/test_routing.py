"""A callable chooses who answers; the event of the answer says who it was."""

from __future__ import annotations

from deepseek.records import Asked, Event
from tests.serve.api.support import HELLO, chat, make_app, post
from tests.serve.fakes import FakeGenerator


def by_user(asked: Asked) -> str:
    """Send half of the users to an adapter."""
    return "new" if asked.model == "tiny" and asked.user == "bob" else asked.model


def test_a_router_splits_users_between_versions_and_events_say_which() -> None:
    events: list[Event] = []
    generator = FakeGenerator()
    app = make_app(
        generator, adapters=lambda: ("new", "other"), router=by_user, on_event=events.append
    )
    for fields in ({"user": "ann"}, {"user": "bob"}, {"user": "bob", "model": "other"}):
        answer = chat(app, **fields)
        assert answer.status_code == 200
        assert answer.json()["model"] == fields.get("model", "tiny")
    body = {"model": "tiny", "prompt": "x", "user": "bob"}
    assert post(app, "/v1/completions", body).status_code == 200
    assert [request.adapter for request in generator.requests] == [None, "new", "other", "new"]
    assert [event.answered_by for event in events] == ["tiny", "new", "other", "new"]
    assert [event.model for event in events] == ["tiny", "tiny", "other", "tiny"]


def test_an_unknown_model_is_told_before_the_router_is_asked() -> None:
    asked: list[Asked] = []

    def note(request: Asked) -> str:
        asked.append(request)
        return request.model

    app = make_app(FakeGenerator(), router=note)
    assert chat(app, model="nobody").status_code == 404
    assert asked == []
    assert chat(app).status_code == 200
    assert asked == [Asked(tenant="ann", model="tiny")]


def test_a_router_that_names_nobody_is_the_servers_fault() -> None:
    app = make_app(FakeGenerator(), router=lambda asked: "nobody")
    answer = post(app, "/v1/chat/completions", {"messages": HELLO})
    assert answer.status_code == 500 and "nobody" not in answer.text
