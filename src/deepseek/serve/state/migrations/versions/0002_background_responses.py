"""Responses that are answered in the background."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Give responses the request that they have yet to answer."""
    op.add_column("responses", sa.Column("request", sa.Text(), nullable=True))


def downgrade() -> None:
    """Forget the requests; their responses stay as they are."""
    op.drop_column("responses", "request")
