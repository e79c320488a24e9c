"""Responses that are answered in the background: entered when they are asked for, with what they
have yet to answer, and ended once.

A response that has not ended still has its request in the database, so one that was being answered
when the server was killed is answered again. Its end, its output and the removal of its request are
one transaction, and only the first end counts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from deepseek.errors import describe
from deepseek.serve.state.errors import QuotaError, RequestError
from deepseek.serve.state.responses import ResponseStore
from deepseek.serve.state.tables import ResponseRow

_UNFINISHED = ResponseRow.request.is_not(None)


@dataclasses.dataclass(frozen=True)
class Unfinished:
    """A response that has not ended."""

    id: str
    tenant: str


@dataclasses.dataclass(frozen=True)
class Begun:
    """A response that is being answered."""

    response: dict[str, Any]
    input_items: list[dict[str, Any]]
    request: dict[str, Any]


class BackgroundStore:
    """The responses of a `ResponseStore` that have not ended."""

    def __init__(self, responses: ResponseStore) -> None:
        """Keep them among the others."""
        self._responses, self._database = responses, responses.database

    def enter(
        self,
        tenant: str,
        response: Mapping[str, Any],
        input_items: Sequence[Mapping[str, Any]],
        request: Mapping[str, Any],
    ) -> None:
        """Keep a response that is to be answered.

        Args:
            tenant: whose.
            response: OpenAI's response object, `queued`.
            input_items: what is new in its request.
            request: what `begin` gives back.

        Raises:
            QuotaError: too many have not ended, or they are too large.
        """
        limits = self._responses.limits
        with self._database.write() as session:
            mine = _count(session, tenant)
            if mine >= limits.tenant_unfinished:
                must = f"at most {limits.tenant_unfinished}"
                raise _full("of this key", must, mine + 1)
            total = _count(session)
            if total >= limits.total_unfinished:
                raise _full("of all keys", f"at most {limits.total_unfinished}", total + 1)
            kept = json.dumps(request)
            self._responses.enter(session, tenant, response, input_items, kept)

    def unfinished(self) -> list[Unfinished]:
        """Return the responses that have not ended, oldest first."""
        query = select(ResponseRow.id, ResponseRow.tenant).where(_UNFINISHED)
        with self._database.read() as session:
            return [Unfinished(*row) for row in session.execute(query.order_by(ResponseRow.number))]

    def begin(self, response_id: str) -> Begun | None:
        """Mark a response as `in_progress` and return it; None where it has ended or is gone."""
        with self._database.write() as session:
            row = _row(session, response_id)
            if row is None or row.request is None:
                return None
            response = {**json.loads(row.response), "status": "in_progress"}
            row.response = json.dumps(response)
            return Begun(response, json.loads(row.input_items), json.loads(row.request))

    def finish(self, response_id: str, response: Mapping[str, Any]) -> bool:
        """Keep the end of a response and return True; False where it has ended or is gone.

        Raises:
            QuotaError: its output is larger than a tenant may have.
        """
        with self._database.write() as session:
            row = _row(session, response_id)
            if row is None or row.request is None:
                return False
            self._end(session, row, response)
        return True

    def cancel(self, tenant: str, response_id: str) -> dict[str, Any]:
        """Cancel a response and return it as it is then; one that has ended stays as it was.

        Raises:
            NotFoundError: the tenant has no such response.
            RequestError: it was not asked for in the background.
        """
        with self._database.write() as session:
            row = self._responses.row(session, tenant, response_id)
            response = json.loads(row.response)
            if not response.get("background"):
                must = "that of one in the background"
                step = "Cannot cancel a synchronous response"
                raise RequestError("response_id", "the request", must, response_id, step)
            if row.request is not None:
                response["status"] = "cancelled"
                self._end(session, row, response)
            return response

    def _end(self, session: Session, row: ResponseRow, response: Mapping[str, Any]) -> None:
        answer = json.dumps(response)
        size_bytes, row.size_bytes = len(answer) + len(row.input_items), 0
        session.flush()
        if response["output"]:  # an end without output is never refused
            self._responses.make_room(session, row, size_bytes, num_new=0)
        row.size_bytes, row.response, row.request = size_bytes, answer, None


def _row(session: Session, response_id: str) -> ResponseRow | None:
    return session.scalar(select(ResponseRow).where(ResponseRow.id == response_id))


def _count(session: Session, tenant: str | None = None) -> int:
    query = select(func.count()).where(_UNFINISHED)
    if tenant is not None:
        query = query.where(ResponseRow.tenant == tenant)
    return int(session.scalar(query) or 0)


def _full(whose: str, must: str, got: int) -> QuotaError:
    text = describe("unfinished responses", whose, must, got, "Wait until some have ended")
    return QuotaError(text, is_passing=True)
