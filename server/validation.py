"""Pydantic's complaints about a request as a refusal."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from posterior.validation import complaint
from server.errors import Refused


def from_validation(error: ValidationError, body: Any) -> Refused:
    """The refusal of `body` that the first of pydantic's complaints comes to."""
    where, what = complaint(error, body)
    return Refused(what, where)
