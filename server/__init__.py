"""Posterior Server: OpenAI's API over a posterior on LoRA weights."""
