"""The one exception of this package."""


class PosteriorError(Exception):
    """One clear line for the user: what was wrong, what was expected, what to do."""
