"""Answers of /v1/responses, kept for a while: bounded, each with its tenant, chained by id.

A response is entered once, when it is finished, so none is half there; one in the background is
entered before, by `BackgroundStore`, with the request that it has yet to answer. Where a tenant is
over its quota, its oldest response goes that no other refers to; where the server is full, those of
the tenant that holds most. One that has not ended stays.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session, aliased

from deepseek.errors import describe
from deepseek.serve.state.database import Database
from deepseek.serve.state.errors import NotFoundError, QuotaError, RequestError
from deepseek.serve.state.files import DAY_S
from deepseek.serve.state.tables import ResponseRow

_ID = re.compile(r"resp_[0-9a-f]{32}")
_ENDED = ResponseRow.request.is_(None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResponseLimits:
    """How much is kept, and for how long."""

    tenant_count: int = 1000
    tenant_bytes: int = 64 * 2**20
    total_bytes: int = 2**30
    ttl_s: int = 30 * DAY_S
    chain: int = 256
    """Responses that one may go back through."""
    tenant_unfinished: int = 32
    """Responses in the background that have not ended, of one tenant."""
    total_unfinished: int = 512
    """The same of all tenants."""


@dataclasses.dataclass(frozen=True)
class StoredResponse:
    """A response and what it answered."""

    response: dict[str, Any]
    input_items: list[dict[str, Any]]
    previous_id: str | None
    is_ended: bool = True


class ResponseStore:
    """The responses of all tenants."""

    def __init__(
        self,
        database: Database,
        limits: ResponseLimits | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Keep responses in a database, bounded as the limits say."""
        self.database = database
        self.limits = limits or ResponseLimits()
        self._clock = clock

    def put(
        self,
        tenant: str,
        response: Mapping[str, Any],
        input_items: Sequence[Mapping[str, Any]],
    ) -> None:
        """Keep a finished response; older ones make room for it.

        Args:
            tenant: whose.
            response: OpenAI's response object, with `id` and `previous_response_id`.
            input_items: what was new in its request, each with an `id`.

        Raises:
            QuotaError: it alone is larger than a tenant may have, or those that have not ended
                leave no room.
        """
        with self.database.write() as session:
            self.enter(session, tenant, response, input_items)

    def enter(
        self,
        session: Session,
        tenant: str,
        response: Mapping[str, Any],
        input_items: Sequence[Mapping[str, Any]],
        request: str | None = None,
    ) -> None:
        """Enter a response within a write, as `put` does.

        Args:
            session: of the write.
            tenant, response, input_items: as of `put`.
            request: what it has yet to answer, as JSON.
        """
        now = int(self._clock())
        answer, items = json.dumps(response), json.dumps(list(input_items))
        row = ResponseRow(
            id=response["id"],
            tenant=tenant,
            previous_id=response.get("previous_response_id"),
            size_bytes=len(answer) + len(items) + len(request or ""),
            created_at=now,
            expires_at=now + self.limits.ttl_s,
            input_items=items,
            response=answer,
            request=request,
        )
        session.execute(delete(ResponseRow).where(ResponseRow.expires_at <= now))
        self.make_room(session, row, row.size_bytes)
        session.add(row)

    def get(self, tenant: str, response_id: str) -> StoredResponse:
        """Return a response.

        Raises:
            NotFoundError: the tenant has no such response.
        """
        with self.database.read() as session:
            return _stored(self.row(session, tenant, response_id))

    def delete(self, tenant: str, response_id: str) -> None:
        """Remove a response. Those that refer to it stay, and cannot be continued.

        Raises:
            NotFoundError: the tenant has no such response.
        """
        with self.database.write() as session:
            self.row(session, tenant, response_id)
            session.execute(delete(ResponseRow).where(ResponseRow.id == response_id))

    def history(self, tenant: str, response_id: str) -> list[dict[str, Any]]:
        """Return the items of a conversation up to a response: inputs and outputs, oldest first.

        Raises:
            NotFoundError: the tenant has no such response.
            RequestError: a response before it is gone, it has not ended, or the conversation is too
                long.
        """
        turns: list[StoredResponse] = []
        previous: str | None = response_id
        with self.database.read() as session:
            while previous is not None:
                if len(turns) == self.limits.chain:
                    must = f"at most {self.limits.chain} responses long"
                    raise RequestError("previous_response_id", "the request", must, response_id)
                try:
                    turn = _stored(self.row(session, tenant, previous))
                except NotFoundError:
                    if not turns:
                        raise
                    must, step = "one whose history is whole", "A response before it is gone"
                    raise RequestError(
                        "previous_response_id", "the request", must, response_id, step
                    ) from None
                if not turn.is_ended:
                    must, step = "one that has ended", "Wait until it is completed"
                    raise RequestError("previous_response_id", "the request", must, previous, step)
                turns.append(turn)
                previous = turn.previous_id
        return [
            item
            for turn in reversed(turns)
            for item in (*turn.input_items, *turn.response["output"])
        ]

    def sweep(self) -> None:
        """Remove responses whose time has passed."""
        with self.database.write() as session:
            gone = ResponseRow.expires_at <= int(self._clock())
            session.execute(delete(ResponseRow).where(gone))

    def row(self, session: Session, tenant: str, response_id: str) -> ResponseRow:
        """Return the row of a response.

        Raises:
            NotFoundError: the tenant has no such response.
        """
        row = None
        if _ID.fullmatch(response_id):
            row = session.scalar(
                select(ResponseRow).where(
                    ResponseRow.id == response_id,
                    ResponseRow.tenant == tenant,
                    ResponseRow.expires_at > int(self._clock()),
                )
            )
        if row is None:
            raise NotFoundError("response", response_id)
        return row

    def make_room(
        self, session: Session, row: ResponseRow, size_bytes: int, num_new: int = 1
    ) -> None:
        """Remove other responses until one fits; within a write.

        Args:
            session: of the write.
            row: the response.
            size_bytes: what it needs beside what the database counts for it.
            num_new: 1 where it is not in the database, else 0.

        Raises:
            QuotaError: it alone is too large, or those that have not ended leave no room.
        """
        limits = self.limits
        most = min(limits.tenant_bytes, limits.total_bytes)
        if size_bytes > most:
            must = f"at most {most} bytes"
            raise QuotaError(describe("size", "the response", must, size_bytes))
        while True:
            count, held = self._held(session, row.tenant)
            if count + num_new <= limits.tenant_count and held + size_bytes <= limits.tenant_bytes:
                break
            _drop_one(session, row.tenant, row.previous_id)
        total = func.coalesce(func.sum(ResponseRow.size_bytes), 0)
        while int(session.scalar(select(total)) or 0) + size_bytes > limits.total_bytes:
            largest = select(ResponseRow.tenant).where(_ENDED).group_by(ResponseRow.tenant)
            largest = largest.order_by(total.desc(), ResponseRow.tenant).limit(1)
            _drop_one(session, session.scalar(largest), row.previous_id)

    def _held(self, session: Session, tenant: str) -> tuple[int, int]:
        columns = func.count(), func.coalesce(func.sum(ResponseRow.size_bytes), 0)
        query = select(*columns).where(ResponseRow.tenant == tenant)
        count, held = session.execute(query).one()
        return int(count), int(held)


def _stored(row: ResponseRow) -> StoredResponse:
    items = json.loads(row.input_items)
    return StoredResponse(json.loads(row.response), items, row.previous_id, row.request is None)


def _drop_one(session: Session, tenant: str | None, spared: str | None) -> None:
    """Remove a tenant's oldest ended response that nothing refers to; where all are referred to,
    the oldest."""
    later = aliased(ResponseRow)
    is_needed = select(later.number).where(
        later.previous_id == ResponseRow.id, later.tenant == tenant
    )
    oldest = select(ResponseRow.number).where(ResponseRow.tenant == tenant, _ENDED)
    oldest = oldest.order_by(ResponseRow.number).limit(1)
    free = oldest.where(~is_needed.exists())
    if spared is not None:
        free = free.where(ResponseRow.id != spared)
    number = session.scalar(free)
    if number is None:
        number = session.scalar(oldest)
    if number is None:
        text = "Responses that have not ended leave no room for another one. Try again later."
        raise QuotaError(text, is_passing=True)
    session.execute(delete(ResponseRow).where(ResponseRow.number == number))
