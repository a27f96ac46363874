"""HTTP: the only layer that knows FastAPI, status codes and JSON."""
