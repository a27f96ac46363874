from tests.server.running import server  # noqa: F401 - started once, for whichever tests ask for it
