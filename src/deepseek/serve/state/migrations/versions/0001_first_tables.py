"""First tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_TABLES = ("api_keys", "batch_lines", "batches", "files", "responses", "usage")


def upgrade() -> None:
    """Make the tables."""
    _keys_and_usage()
    _files()
    _batches()
    _responses()


def downgrade() -> None:
    """Drop them."""
    for table in _TABLES:
        op.drop_table(table)


def _text(name: str, length: int | None = None, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(length) if length else sa.Text(), nullable=nullable)


def _number(name: str, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name, _BIG, nullable=nullable)


def _order() -> tuple[sa.Column[int], sa.Column[str]]:
    return sa.Column("number", _BIG, autoincrement=True, nullable=False), _text("id", 64)


def _numbered(table: str) -> tuple[sa.Constraint, sa.Constraint]:
    key = sa.PrimaryKeyConstraint("number", name=f"pk_{table}")
    return key, sa.UniqueConstraint("id", name=f"uq_{table}_id")


def _index(table: str, *columns: str) -> None:
    op.create_index(f"ix_{table}_{'_'.join(columns)}", table, list(columns))


def _keys_and_usage() -> None:
    op.create_table(
        "api_keys",
        _text("id", 64),
        _text("tenant", 128),
        _text("name", 128),
        _text("hint", 32),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("is_admin", sa.Boolean(), nullable=False),
        _number("requests_per_minute", nullable=True),
        _number("tokens_per_minute", nullable=True),
        sa.Column("concurrency", sa.Integer(), nullable=True),
        _number("created_at"),
        _number("revoked_at", nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("digest", name="uq_api_keys_digest"),
    )
    _index("api_keys", "tenant")
    counts = ("prompt_tokens", "cached_tokens", "completion_tokens", "requests", "errors")
    op.create_table(
        "usage",
        _text("key_id", 64),
        _text("model", 256),
        _text("day", 10),
        *(_number(name) for name in counts),
        sa.PrimaryKeyConstraint("key_id", "model", "day", name="pk_usage"),
    )


def _files() -> None:
    op.create_table(
        "files",
        *_order(),
        _text("tenant", 128),
        _text("filename", 256),
        _text("purpose", 32),
        _number("size_bytes"),
        _number("created_at"),
        _number("expires_at"),
        *_numbered("files"),
    )
    _index("files", "tenant", "number")
    _index("files", "expires_at")


def _batches() -> None:
    reached = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling")
    op.create_table(
        "batches",
        *_order(),
        _text("tenant", 128),
        _text("endpoint", 64),
        _text("input_file_id", 64),
        _text("completion_window", 8),
        _text("status", 16),
        sa.Column("metadata", sa.JSON(), nullable=True),
        sa.Column("errors", sa.JSON(), nullable=True),
        _number("output_ttl_s", nullable=True),
        *(sa.Column(name, sa.Integer(), nullable=False) for name in ("total", "completed")),
        sa.Column("failed", sa.Integer(), nullable=False),
        _number("result_bytes"),
        _text("output_file_id", 64, nullable=True),
        _text("error_file_id", 64, nullable=True),
        _number("created_at"),
        _number("expires_at"),
        *(_number(f"{name}_at", nullable=True) for name in (*reached, "cancelled")),
        *_numbered("batches"),
    )
    _index("batches", "tenant", "number")
    _index("batches", "status")
    op.create_table(
        "batch_lines",
        _text("batch_id", 64),
        sa.Column("line", sa.Integer(), autoincrement=False, nullable=False),
        _text("state", 8),
        _text("custom_id"),
        _number("offset"),
        sa.Column("size_bytes", sa.Integer(), nullable=False),
        _text("result", nullable=True),
        sa.PrimaryKeyConstraint("batch_id", "line", name="pk_batch_lines"),
    )
    _index("batch_lines", "batch_id", "state", "line")


def _responses() -> None:
    op.create_table(
        "responses",
        *_order(),
        _text("tenant", 128),
        _text("previous_id", 64, nullable=True),
        _number("size_bytes"),
        _number("created_at"),
        _number("expires_at"),
        _text("input_items"),
        _text("response"),
        *_numbered("responses"),
    )
    _index("responses", "tenant", "number")
    _index("responses", "previous_id")
    _index("responses", "expires_at")
