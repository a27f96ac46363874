"""The bodies of requests, where the server was asked to keep them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "2"
down_revision = "1"


def upgrade() -> None:
    op.add_column("posterior_replies", sa.Column("request", sa.JSON))
