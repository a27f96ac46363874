"""Answers, and what turned out to be true of them, in a SQL database: the only place that imports SQLAlchemy."""
