"""`posterior doctor`: whether this machine can serve. It imports neither torch nor vLLM, which may be missing."""
