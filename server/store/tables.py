"""The tables as they are now. migrations/ makes them; a test compares the two.

A reply has answers, one for each item, and an answer has at most one outcome. Whoever deletes a reply deletes them all.
Each belongs to the key that got the reply (`owner`), so that no key can name another one's by mistake. An outcome
repeats its posterior's hash and whether its label was asked for, so that one index finds the newest of either kind.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Double,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    false,
)

VERSION_TABLE = "posterior_schema"
OWNER, ID = 64, 256  # characters, at most

metadata = MetaData()


def _nullable_json(name: str) -> Column[JSON]:
    """A column of JSON, in which nothing is NULL and not the text "null"."""
    return Column(name, JSON(none_as_null=True))


replies = Table(
    "posterior_replies",
    metadata,
    Column("owner", String(OWNER), primary_key=True),
    Column("id", String(ID), primary_key=True),
    Column("created", Double, nullable=False),
    Column("model", String, nullable=False),
    Column("posterior", String),
    Column("hash", String),
    Column("base", String, nullable=False),
    _nullable_json("request"),
    Index("posterior_replies_created", "created"),
    Index("posterior_replies_newest", "hash", "created"),
    Index("posterior_replies_id", "id"),
)

answers = Table(
    "posterior_answers",
    metadata,
    Column("owner", String(OWNER), primary_key=True),
    Column("id", String(ID), primary_key=True),
    Column("item", Integer, primary_key=True),
    Column("kind", String, nullable=False),
    Column("predictive", String, nullable=False),
    Column("particles", Integer, nullable=False),
    Column("dtype", String, nullable=False),
    _nullable_json("key"),
    _nullable_json("options"),
    _nullable_json("probability"),
    Column("best", Integer),
    Column("confidence", Double),
    Column("calibrated", Boolean, nullable=False),
    Column("max_risk", Double),
    Column("refusal", String),
    Column("familiarity", Double),
    Column("total", Double),
    Column("epistemic", Double),
    _nullable_json("prediction_set"),
    Column("coverage", Double),
    _nullable_json("features"),
    Column("requested", Boolean, nullable=False, server_default=false()),
    ForeignKeyConstraint(["owner", "id"], [replies.c.owner, replies.c.id], ondelete="CASCADE"),
)

outcomes = Table(
    "posterior_outcomes",
    metadata,
    Column("owner", String(OWNER), primary_key=True),
    Column("id", String(ID), primary_key=True),
    Column("item", Integer, primary_key=True),
    Column("reported", Double, nullable=False),
    Column("truth", Integer),
    Column("correct", Boolean, nullable=False),
    Column("requested", Boolean, nullable=False, server_default=false()),
    Column("hash", String),
    Index("posterior_outcomes_newest", "hash", "requested", "reported"),
    ForeignKeyConstraint(["owner", "id", "item"], [answers.c.owner, answers.c.id, answers.c.item], ondelete="CASCADE"),
)
