"""The tiny model and its fits, as the library's tests have them."""

from tests.posterior.conftest import few_resamples, model, one_thread, run_fit, tiny_base

__all__ = ["few_resamples", "model", "one_thread", "run_fit", "tiny_base"]
