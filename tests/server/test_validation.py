"""Which of pydantic's complaints a client gets to read."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import BaseModel, ValidationError
from typing_extensions import TypedDict

from server.validation import from_validation


class System(TypedDict):
    role: Literal["system"]
    name: str


class User(TypedDict):
    role: Literal["user"]
    name: str
    content: str | list[dict[str, str]]


class Body(BaseModel):
    messages: list[System | User]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "name": 5, "content": "x"}, "messages.0.name"),  # and not that it is no system's
        ({"role": "user", "name": "x", "content": [{"type": 1}]}, "messages.0.content.0.type"),
        ({"role": "user", "name": "x"}, "messages.0.content"),
        ({"role": "system"}, "messages.0.name"),
    ],
)
def test_the_form_that_fits_best_is_the_one_that_is_spoken_of(message: dict[str, Any], param: str) -> None:
    body = {"messages": [message]}
    with pytest.raises(ValidationError) as caught:
        Body.model_validate(body)
    assert from_validation(caught.value, body).param == param
