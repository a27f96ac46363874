"""What Alembic runs: the migrations on the connection that database.py hands it, in its transaction."""

from __future__ import annotations

from alembic import context

from server.store.tables import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
context.run_migrations()
