"""The tables. A change here needs a step in `migrations/versions`; a test compares the two.

Times are whole seconds since 1970, as the API shows them. `number` gives the order of making within
one second. Answers of models are kept as the JSON text that is sent, never taken apart by the
database.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Index, Integer, LargeBinary, MetaData, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Big = BigInteger().with_variant(Integer, "sqlite")
"""64 bits everywhere; SQLite numbers rows by itself only where the type is called INTEGER."""

_NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    """Gives every index and constraint a name that both databases share."""

    metadata = MetaData(naming_convention=_NAMES)


class KeyRow(Base):
    """An API key; of its secret only the digest."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(128), index=True)
    name: Mapped[str] = mapped_column(String(128))
    hint: Mapped[str] = mapped_column(String(32))
    digest: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    is_admin: Mapped[bool]
    requests_per_minute: Mapped[int | None] = mapped_column(Big)
    tokens_per_minute: Mapped[int | None] = mapped_column(Big)
    concurrency: Mapped[int | None]
    created_at: Mapped[int] = mapped_column(Big)
    revoked_at: Mapped[int | None] = mapped_column(Big)


class UsageRow(Base):
    """What one key used of one model on one day (UTC, `2026-11-27`)."""

    __tablename__ = "usage"
    key_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    model: Mapped[str] = mapped_column(String(256), primary_key=True)
    day: Mapped[str] = mapped_column(String(10), primary_key=True)
    prompt_tokens: Mapped[int] = mapped_column(Big)
    cached_tokens: Mapped[int] = mapped_column(Big)
    completion_tokens: Mapped[int] = mapped_column(Big)
    requests: Mapped[int] = mapped_column(Big)
    errors: Mapped[int] = mapped_column(Big)


class FileRow(Base):
    """A file whose content lies on disk under its id."""

    __tablename__ = "files"
    __table_args__ = (Index(None, "tenant", "number"),)
    number: Mapped[int] = mapped_column(Big, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    tenant: Mapped[str] = mapped_column(String(128))
    filename: Mapped[str] = mapped_column(String(256))
    purpose: Mapped[str] = mapped_column(String(32))
    size_bytes: Mapped[int] = mapped_column(Big)
    created_at: Mapped[int] = mapped_column(Big)
    expires_at: Mapped[int] = mapped_column(Big, index=True)


class BatchRow(Base):
    """A batch; its counts change in the same transaction as its lines."""

    __tablename__ = "batches"
    __table_args__ = (Index(None, "tenant", "number"),)
    number: Mapped[int] = mapped_column(Big, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    tenant: Mapped[str] = mapped_column(String(128))
    endpoint: Mapped[str] = mapped_column(String(64))
    input_file_id: Mapped[str] = mapped_column(String(64))
    completion_window: Mapped[str] = mapped_column(String(8))
    status: Mapped[str] = mapped_column(String(16), index=True)
    note: Mapped[dict[str, str] | None] = mapped_column("metadata", JSON)
    problems: Mapped[list[dict[str, Any]] | None] = mapped_column("errors", JSON)
    output_ttl_s: Mapped[int | None] = mapped_column(Big)
    total: Mapped[int] = mapped_column(default=0)
    completed: Mapped[int] = mapped_column(default=0)
    failed: Mapped[int] = mapped_column(default=0)
    result_bytes: Mapped[int] = mapped_column(Big, default=0)
    output_file_id: Mapped[str | None] = mapped_column(String(64))
    error_file_id: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[int] = mapped_column(Big)
    expires_at: Mapped[int] = mapped_column(Big)
    in_progress_at: Mapped[int | None] = mapped_column(Big)
    finalizing_at: Mapped[int | None] = mapped_column(Big)
    completed_at: Mapped[int | None] = mapped_column(Big)
    failed_at: Mapped[int | None] = mapped_column(Big)
    expired_at: Mapped[int | None] = mapped_column(Big)
    cancelling_at: Mapped[int | None] = mapped_column(Big)
    cancelled_at: Mapped[int | None] = mapped_column(Big)


class LineRow(Base):
    """A line of a batch that is not finished: where its request lies, and what came of it."""

    __tablename__ = "batch_lines"
    __table_args__ = (Index(None, "batch_id", "state", "line"),)
    batch_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    line: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """Counted from 1, as in the input file."""
    state: Mapped[str] = mapped_column(String(8))
    """`pending`, `done` or `failed`."""
    custom_id: Mapped[str] = mapped_column(Text)
    offset: Mapped[int] = mapped_column(Big)
    size_bytes: Mapped[int]
    result: Mapped[str | None] = mapped_column(Text)
    """The line of the output or error file."""


class ResponseRow(Base):
    """An answer of /v1/responses with what it answered."""

    __tablename__ = "responses"
    __table_args__ = (Index(None, "tenant", "number"),)
    number: Mapped[int] = mapped_column(Big, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    tenant: Mapped[str] = mapped_column(String(128))
    previous_id: Mapped[str | None] = mapped_column(String(64), index=True)
    size_bytes: Mapped[int] = mapped_column(Big)
    created_at: Mapped[int] = mapped_column(Big)
    expires_at: Mapped[int] = mapped_column(Big, index=True)
    input_items: Mapped[str] = mapped_column(Text)
    response: Mapped[str] = mapped_column(Text)
    request: Mapped[str | None] = mapped_column(Text)
    """What a response in the background has yet to answer; None once it has ended."""
