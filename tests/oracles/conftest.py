"""The tiny model, as the library's tests have it."""

from tests.posterior.conftest import model, one_thread

__all__ = ["model", "one_thread"]
