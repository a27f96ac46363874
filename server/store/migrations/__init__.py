"""The schema, step by step: Alembic applies those of versions/ that a database does not have yet."""
