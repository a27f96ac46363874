"""What lies on disk: atomic writes (atomic.py), posterior.json (record.py), the cache of draws (draws.py), JSON objects
(objects.py)."""
