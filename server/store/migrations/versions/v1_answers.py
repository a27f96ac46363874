"""Replies, their answers, and the outcomes of these."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "1"
down_revision: str | None = None


def upgrade() -> None:
    op.create_table(
        "posterior_replies",
        sa.Column("owner", sa.String(64), primary_key=True),
        sa.Column("id", sa.String(256), primary_key=True),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("posterior", sa.String),
        sa.Column("hash", sa.String),
        sa.Column("base", sa.String, nullable=False),
    )
    op.create_index("posterior_replies_created", "posterior_replies", ["created"])
    op.create_table(
        "posterior_answers",
        sa.Column("owner", sa.String(64), primary_key=True),
        sa.Column("id", sa.String(256), primary_key=True),
        sa.Column("item", sa.Integer, primary_key=True),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("predictive", sa.String, nullable=False),
        sa.Column("particles", sa.Integer, nullable=False),
        sa.Column("dtype", sa.String, nullable=False),
        sa.Column("key", sa.JSON),
        sa.Column("options", sa.JSON),
        sa.Column("probability", sa.JSON),
        sa.Column("best", sa.Integer),
        sa.Column("confidence", sa.Double),
        sa.Column("calibrated", sa.Boolean, nullable=False),
        sa.Column("max_risk", sa.Double),
        sa.Column("refusal", sa.String),
        sa.Column("familiarity", sa.Double),
        sa.Column("total", sa.Double),
        sa.Column("epistemic", sa.Double),
        sa.Column("prediction_set", sa.JSON),
        sa.Column("coverage", sa.Double),
        sa.Column("features", sa.JSON),
        sa.ForeignKeyConstraint(
            ["owner", "id"], ["posterior_replies.owner", "posterior_replies.id"], ondelete="CASCADE"
        ),
    )
    op.create_table(
        "posterior_outcomes",
        sa.Column("owner", sa.String(64), primary_key=True),
        sa.Column("id", sa.String(256), primary_key=True),
        sa.Column("item", sa.Integer, primary_key=True),
        sa.Column("reported", sa.Double, nullable=False),
        sa.Column("truth", sa.Integer),
        sa.Column("correct", sa.Boolean, nullable=False),
        sa.ForeignKeyConstraint(
            ["owner", "id", "item"],
            ["posterior_answers.owner", "posterior_answers.id", "posterior_answers.item"],
            ondelete="CASCADE",
        ),
    )
