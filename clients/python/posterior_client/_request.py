"""What a request consists of, checked before it is sent."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from posterior_client._exceptions import InputError

BASE_URL = "http://127.0.0.1:8000/v1"


def settings(base_url: str | None, api_key: str | None) -> tuple[str, str]:
    """The base URL and the key, from the environment where they are not given. Raises InputError."""
    base_url = base_url or os.environ.get("POSTERIOR_BASE_URL") or BASE_URL
    # Without a key the SDK would send $OPENAI_API_KEY, a secret of someone else, to this server.
    key = api_key or os.environ.get("POSTERIOR_API_KEY") or "none"
    if not _is_url(base_url):
        raise InputError(f"the base URL {base_url!r} is none; write it like {BASE_URL}")
    if not (key.isascii() and key.isprintable()):
        raise InputError("the API key holds characters that no HTTP header may have; use ASCII letters and digits")
    return base_url, key


def _is_url(text: str) -> bool:
    try:
        text.encode()
        parts = urlsplit(text)
        (parts.hostname or "").encode("idna")
        return (
            not re.search(r"\s", text)
            and parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
        )
    except ValueError:  # also what has no UTF-8, no number as its port, or a host that no name server knows
        return False


def body(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that were given, as a request's body. Raises InputError for what JSON in UTF-8 cannot say."""
    given = {name: value for name, value in arguments.items() if name != "self" and value is not None}
    for name, value in given.items():
        _check(name, value)
    return given


def _check(name: str, value: object) -> None:
    """Raises InputError for what JSON in UTF-8 cannot say, inside `value` too."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start]
            raise InputError(
                f"{name} holds {half!r}, half of a character or a byte that is not UTF-8; write it in UTF-8"
            ) from None
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(f"{name} is {value}; give a finite number")
    elif isinstance(value, Mapping):
        for key, each in value.items():
            _check(name, key)
            _check(name, each)
    elif isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        for each in value:
            _check(name, each)
