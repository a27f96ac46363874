"""`posterior doctor`: whether this machine can serve. It imports neither torch nor vLLM, and says if they are missing."""
