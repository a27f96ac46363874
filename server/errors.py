"""Why a request is not answered, by kind. server/http/errors.py maps each kind to a status code.

RequestError
  Refused        the client can change the request
    PromptRefused  one of its prompts
  NotFound       no such model
  Absent         no such posterior or alias
  Conflict       it contradicts what there is
  Unavailable    the same request may be answered later
    Busy           others are before it
    EngineLost     the engine has stopped
    Stopping       the server stops
  Fault          a fault of ours
"""

from __future__ import annotations

from typing import Any

from posterior.errors import shortened


class RequestError(Exception):
    """One clear line for the client, and the field at fault, if it is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        self.message = shortened(message)
        self.param = param
        super().__init__(self.message)


class Refused(RequestError):
    """The request is not valid, or asks for what is not served: the line says what to change."""


class PromptRefused(Refused):
    """The prompt of this number is at fault. `said` is about that prompt, so that a request whose prompts have other
    names can put its own in front of it."""

    def __init__(self, index: int, said: str) -> None:
        self.said = said
        super().__init__(f"prompt {index} {said}")


class NotFound(RequestError):
    """The model is not served here."""

    def __init__(self, name: object) -> None:
        super().__init__(f"the model {name!r} is not served here; GET /v1/models lists what is", "model")


class Absent(RequestError):
    """There is no posterior or alias of this name."""


class Conflict(RequestError):
    """It contradicts what is loaded, or what is in the folder: the line says what to change."""


class Unavailable(RequestError):
    """Something that the request needs is not there now."""


class Busy(Unavailable):
    """Too many others are before it."""


class Stopping(Unavailable):
    """The server was told to stop."""

    def __init__(self) -> None:
        super().__init__("the server is stopping; ask again shortly, when another one runs")


class Fault(RequestError):
    """The client learns nothing of what is inside. The log has the rest."""

    def __init__(self) -> None:
        super().__init__("the server failed to answer this request; its log says why")


class EngineLost(Unavailable):
    """The engine's processes have ended."""

    def __init__(self) -> None:
        super().__init__("the engine has stopped; the server needs a restart")


def first(errors: BaseExceptionGroup[Any]) -> BaseException:
    """The first error of a group, and of the groups within it: one cause is what a client can use."""
    error: BaseException = errors.exceptions[0]
    return first(error) if isinstance(error, BaseExceptionGroup) else error
