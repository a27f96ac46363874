"""What we believe about the weights: fit, store, sample, predict and evaluate posteriors. No HTTP, no vLLM."""

__version__ = "0.1.0"
