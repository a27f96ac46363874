"""Who can reach the server where it listens."""

from __future__ import annotations

import ipaddress

from posterior.errors import PosteriorError
from server.access.keys import Keys


def check_exposure(host: str, keys: Keys) -> None:
    """Raises PosteriorError if `host` is reachable from other machines and no key protects it."""
    if keys or host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise PosteriorError(
            f"refusing to listen on {host} without a key: set --api-key (or POSTERIOR_API_KEY) or --keys, or use "
            "--host 127.0.0.1"
        )
