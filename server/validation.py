"""Requests read by pydantic models, whose complaints are refusals."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from posterior.validation import complaint
from server.errors import Refused

Form = TypeVar("Form", bound=BaseModel)


def validated(form: type[Form], body: Any) -> Form:
    """The body as the form has it. Raises Refused."""
    try:
        return form.model_validate(body)
    except ValidationError as error:
        raise from_validation(error, body) from error


def from_validation(error: ValidationError, body: Any) -> Refused:
    """The refusal of `body` that the first of pydantic's complaints comes to."""
    where, what = complaint(error, body)
    return Refused(what, where)
