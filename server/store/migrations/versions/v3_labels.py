"""Answers whose label is asked for, and indices that find the newest answers and outcomes of a posterior, and a reply
of whatever key."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "3"
down_revision = "2"


def upgrade() -> None:
    op.add_column("posterior_answers", sa.Column("requested", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("posterior_outcomes", sa.Column("requested", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("posterior_outcomes", sa.Column("hash", sa.String))
    op.execute(
        "UPDATE posterior_outcomes SET hash = (SELECT hash FROM posterior_replies "
        "WHERE posterior_replies.owner = posterior_outcomes.owner AND posterior_replies.id = posterior_outcomes.id)"
    )
    op.create_index("posterior_outcomes_newest", "posterior_outcomes", ["hash", "requested", "reported"])
    op.create_index("posterior_replies_newest", "posterior_replies", ["hash", "created"])
    op.create_index("posterior_replies_id", "posterior_replies", ["id"])
