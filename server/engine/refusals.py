"""What vLLM says against a request, as our kinds of error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from jinja2 import TemplateError
from pydantic import ValidationError
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import GenerationError, GracefulHTTPError, VLLMClientError
from vllm.v1.engine.exceptions import EngineDeadError

from posterior.errors import first_line
from server.engine.grammars import FIELDS
from server.errors import EngineLost, Fault, NotFound, Refused, RequestError, Unavailable
from server.validation import from_validation

LENGTHS = ("max_tokens", "max_completion_tokens")


@contextlib.contextmanager
def refusals(body: dict[str, Any], longest: int) -> Iterator[None]:
    """What vLLM raises about a request, raised as our kinds of error. longest: tokens of the context."""
    try:
        yield
    except ValidationError as error:
        raise from_validation(error, body) from error
    except EngineDeadError as error:
        raise EngineLost from error
    except TemplateError as error:
        said = _line(str(error))
        raise Refused(f"the base's chat template refuses these messages: {said}", "messages") from error
    except RecursionError as error:
        raise Refused("the request is nested too deeply") from error
    except GenerationError as error:  # also of a grammar that vLLM's compiler refuses
        if not any(body.get(name) for name in FIELDS):
            raise
        raise Refused("the grammar of this request cannot be used; simplify it", "structured_outputs") from error
    except (VLLMClientError, GracefulHTTPError, ValueError) as error:  # vLLM also raises bare ValueErrors
        raise _of_full(refusal(error), body, longest) from error


def result(answer: Any, body: dict[str, Any], longest: int) -> Any:
    """What vLLM answered. Raises RequestError where it is an error."""
    if isinstance(answer, ErrorResponse):
        raise _of_full(_from_response(answer, body), body, longest)
    return answer


def _of_full(error: RequestError, body: dict[str, Any], longest: int) -> RequestError:
    """The error; of a prompt that leaves no room for a token, where vLLM speaks of a `max_tokens` of 0 that nobody
    gave, one that says so."""
    if error.param != "max_tokens" or "got 0" not in error.message or 0 in (body.get(name) for name in LENGTHS):
        return error
    return Refused(f"the prompt fills the context of {longest} tokens, and an answer needs one of them; shorten it")


def refusal(error: Exception) -> RequestError:
    """vLLM's complaint about a request, one line of it."""
    if isinstance(error, GracefulHTTPError):
        return Unavailable("the engine's queue is full; try again later")
    return Refused(_line(str(error)), getattr(error, "parameter", None))


def _from_response(answer: ErrorResponse, body: dict[str, Any]) -> RequestError:
    """vLLM's error as ours."""
    error = answer.error
    if error.code == 404:
        return NotFound(body.get("model"))
    if error.code == 503:
        return Unavailable("the engine could not take this request; try again later")
    return Fault() if error.code >= 500 else Refused(_line(error.message), error.param)


def _line(message: str) -> str:
    return first_line(message, "the request is not valid")
