"""Run by Alembic for every upgrade, on the connection that `database.open_database` hands over."""

from __future__ import annotations

from alembic import context

from deepseek.serve.state.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
