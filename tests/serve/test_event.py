"""The record of an answer that has ended."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.errors import FormatError
from deepseek.records import Event

EVENT = Event(
    request_id="req-1",
    tenant="ann",
    model="tiny",
    route="chat",
    started=1.5,
    total_s=0.25,
    num_prompt_tokens=3,
    num_cached_tokens=0,
    num_tokens=2,
    finish_reason="stop",
)


def test_there_and_back() -> None:
    assert Event.from_dict(json.loads(json.dumps(EVENT.to_dict()))) == EVENT
    assert EVENT.text is None and EVENT.prompt is None


@given(st.builds(Event, mean_logprob=st.none() | st.floats(allow_nan=True)))
def test_every_event_is_json(event: Event) -> None:
    values = json.loads(json.dumps(event.to_dict(), allow_nan=False))
    back = Event.from_dict(values)
    is_finite = event.mean_logprob is None or math.isfinite(event.mean_logprob)
    assert back.mean_logprob == (event.mean_logprob if is_finite else None)
    assert (back.request_id, back.num_tokens) == (event.request_id, event.num_tokens)


@pytest.mark.parametrize("change", [{"strange": 1}, {"tenant": ...}])
def test_missing_and_unknown_fields(change: dict[str, Any]) -> None:
    values = {**EVENT.to_dict(), **change}
    given_values = {name: value for name, value in values.items() if value is not ...}
    with pytest.raises(FormatError, match="event of a record file must be an object with"):
        Event.from_dict(given_values)


def test_events_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EVENT.tenant = "bob"  # type: ignore[misc]
