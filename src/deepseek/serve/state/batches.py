"""Batches as OpenAI's /v1/batches has them: what a tenant can ask for.

    validating ── failed
        │
    in_progress ── (24 h) ── expired
        │
    finalizing ── completed

`cancelling` and then `cancelled` is reached from `validating` and `in_progress`. What moves a batch
along is in `batch_work`.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Mapping
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from deepseek.errors import describe
from deepseek.serve.state.batch_lines import MOST_LINES
from deepseek.serve.state.errors import NotFoundError, QuotaError, RequestError
from deepseek.serve.state.files import DAY_S, UNFINISHED, FileStore, check_ttl
from deepseek.serve.state.tables import BatchRow

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
WINDOW = "24h"
_ID = re.compile(r"batch_[0-9a-f]{32}")
_TIMES = (
    "in_progress_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """How much work may lie here."""

    lines: int = MOST_LINES
    unfinished: int = 32
    """Batches of one tenant under way at the same time."""
    kept_s: int = 30 * DAY_S
    """How long a finished batch can be asked for."""


class BatchStore:
    """The batches of all tenants."""

    def __init__(self, files: FileStore, limits: BatchLimits | None = None) -> None:
        """Keep batches in the database of the files that they read and write."""
        self.files = files
        self.database = files.database
        self.clock = files.clock
        self.limits = limits or BatchLimits()

    def create(
        self,
        tenant: str,
        *,
        input_file_id: str,
        endpoint: str,
        completion_window: str = WINDOW,
        metadata: Mapping[str, str] | None = None,
        output_ttl_s: int | None = None,
    ) -> dict[str, Any]:
        """Enter a batch, to be validated and run by the worker, and return OpenAI's batch object.

        Args:
            tenant: who asks, and who owns the input file.
            input_file_id: a file with the purpose `batch`.
            endpoint: one of `ENDPOINTS`, which every line must name.
            completion_window: `24h`.
            metadata: at most 16 pairs.
            output_ttl_s: when its output files go; by default as other files.

        Raises:
            RequestError: a value is not one that can be used.
            NotFoundError: the tenant has no such file.
            QuotaError: too many of the tenant's batches are not finished.
        """
        if endpoint not in ENDPOINTS:
            raise RequestError("endpoint", "a batch", f"one of {', '.join(ENDPOINTS)}", endpoint)
        if completion_window != WINDOW:
            raise RequestError("completion_window", "a batch", f"'{WINDOW}'", completion_window)
        check_ttl(output_ttl_s)
        note = check_metadata(metadata)
        file = self.files.get(tenant, input_file_id)
        if file.purpose != "batch":
            must = "a file with the purpose 'batch'"
            raise RequestError("input_file_id", "a batch", must, file.purpose)
        now = int(self.clock())
        row = BatchRow(
            id=f"batch_{secrets.token_hex(16)}",
            tenant=tenant,
            endpoint=endpoint,
            input_file_id=input_file_id,
            completion_window=completion_window,
            status="validating",
            note=note,
            output_ttl_s=output_ttl_s,
            created_at=now,
            expires_at=now + DAY_S,
        )
        with self.database.write() as session:
            self._refuse_too_many(session, tenant)
            session.add(row)
            session.flush()
            return batch_object(row)

    def get(self, tenant: str, batch_id: str) -> dict[str, Any]:
        """Return OpenAI's batch object.

        Raises:
            NotFoundError: the tenant has no such batch.
        """
        with self.database.read() as session:
            return batch_object(_owned(session, tenant, batch_id))

    def list(
        self, tenant: str, *, after: str | None = None, limit: int = 20
    ) -> tuple[list[dict[str, Any]], bool]:
        """Return a page of a tenant's batches, newest first, and whether more follow it.

        Raises:
            NotFoundError: `after` is not a batch of the tenant.
        """
        query = select(BatchRow).where(BatchRow.tenant == tenant)
        query = query.order_by(BatchRow.number.desc()).limit(limit + 1)
        with self.database.read() as session:
            if after is not None:
                query = query.where(BatchRow.number < _owned(session, tenant, after).number)
            rows = session.scalars(query).all()
            return [batch_object(row) for row in rows[:limit]], len(rows) > limit

    def cancel(self, tenant: str, batch_id: str) -> dict[str, Any]:
        """Ask for the end of a batch and return it; what is done stays in its files.

        Raises:
            NotFoundError: the tenant has no such batch.
            RequestError: it is finished, or being finished.
        """
        with self.database.write() as session:
            row = _owned(session, tenant, batch_id)
            if row.status in ("validating", "in_progress"):
                row.status, row.cancelling_at = "cancelling", int(self.clock())
            elif row.status not in ("cancelling", "cancelled"):
                must = "'validating' or 'in_progress' to be cancelled"
                raise RequestError("status", f"batch {batch_id}", must, row.status)
            return batch_object(row)

    def _refuse_too_many(self, session: Session, tenant: str) -> None:
        query = select(func.count()).select_from(BatchRow)
        query = query.where(BatchRow.tenant == tenant, BatchRow.status.in_(UNFINISHED))
        if (count := session.scalar(query) or 0) >= self.limits.unfinished:
            must, step = f"at most {self.limits.unfinished}", "Wait until one is finished"
            message = describe("number", "your unfinished batches", must, count + 1, step)
            raise QuotaError(message, is_passing=True)


def check_metadata(metadata: Mapping[str, str] | None) -> dict[str, str] | None:
    """Return metadata that keep OpenAI's bounds.

    Raises:
        RequestError: more than 16 pairs, a key over 64 or a value over 512 characters.
    """
    if metadata is None:
        return None
    if len(metadata) > 16:
        raise RequestError("metadata", "the request", "at most 16 pairs", len(metadata))
    for key, value in metadata.items():
        if not 1 <= len(key) <= 64 or len(value) > 512:
            must = "keys of 1 to 64 and values of at most 512 characters"
            raise RequestError("metadata", "the request", must, {key: value})
    return dict(metadata)


def batch_object(row: BatchRow) -> dict[str, Any]:
    """Return OpenAI's batch object of a row."""
    problems = row.problems
    return {
        "id": row.id,
        "object": "batch",
        "endpoint": row.endpoint,
        "errors": {"object": "list", "data": problems} if problems else None,
        "input_file_id": row.input_file_id,
        "completion_window": row.completion_window,
        "status": row.status,
        "output_file_id": row.output_file_id,
        "error_file_id": row.error_file_id,
        "created_at": row.created_at,
        "expires_at": row.expires_at,
        **{name: getattr(row, name) for name in _TIMES},
        "request_counts": {"total": row.total, "completed": row.completed, "failed": row.failed},
        "metadata": row.note,
    }


def _owned(session: Session, tenant: str, batch_id: str) -> BatchRow:
    row = None
    if _ID.fullmatch(batch_id):
        query = select(BatchRow).where(BatchRow.id == batch_id, BatchRow.tenant == tenant)
        row = session.scalar(query)
    if row is None:
        raise NotFoundError("batch", batch_id)
    return row
