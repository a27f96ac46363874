"""Every error this package raises.

PosteriorClientError
├── InputError                  the request cannot be sent: a text, number, base URL, key or proxy that is none
├── UnreachableError            nothing answers at the base URL, or not in time
├── ResponseError               an answer came, but not a whole one with the fields this client reads
└── StatusError                 the server refused; the message is the server's own, unchanged
    ├── AuthenticationError     401: missing or wrong API key
    ├── ModelNotFoundError      404: no such model or posterior
    ├── RateLimitError          429: the key has used up what it may use a minute, also after the SDK's retries
    ├── AnswerNotFoundError     404: no such answer, of those that the server keeps for this key
    ├── InvalidRequestError     any other 4xx: the request is wrong
    └── ServerError             5xx: the server failed, or is not ready yet
"""

from collections.abc import Iterator
from contextlib import contextmanager

import openai


class PosteriorClientError(Exception):
    """Any error of this client."""


class InputError(PosteriorClientError, ValueError):
    """The request cannot be sent: a text that is none, or a number that is not finite."""


class UnreachableError(PosteriorClientError):
    """Nothing answers at the base URL, or not in time."""


class ResponseError(PosteriorClientError):
    """An answer came, but not a whole one with the fields this client reads."""


class StatusError(PosteriorClientError):
    """The server refused. `str(error)` is the server's own message.

    Attributes: `status` (HTTP), and `code`, `param`, `type` as in OpenAI's error object.
    """

    def __init__(self, message: str, status: int, code: str | None, param: str | None, type: str | None) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.type = status, code, param, type


class AuthenticationError(StatusError):
    """401: missing or wrong API key."""


class ModelNotFoundError(StatusError):
    """404: no such model or posterior."""


class RateLimitError(StatusError):
    """429: the key has used up what it may use a minute, also after the SDK's retries."""


class AnswerNotFoundError(StatusError):
    """404: no such answer, of those that the server keeps for this key."""


class InvalidRequestError(StatusError):
    """Any other 4xx: the request is wrong."""


class ServerError(StatusError):
    """5xx: the server failed, or is not ready yet."""


@contextmanager
def translated(base_url: str) -> Iterator[None]:
    """Turn the SDK's errors into this package's; the SDK's own stays as `__cause__`."""
    try:
        yield
    except openai.APIStatusError as error:
        raise _status_error(error) from error
    except openai.APITimeoutError as error:
        raise UnreachableError(f"the server at {base_url} did not answer in time") from error
    except openai.APIConnectionError as error:
        raise UnreachableError(f"no server answers at {base_url}") from error
    except openai.APIError as error:  # in the midst of a stream
        raise ResponseError(f"the server broke off its answer: {error.message}") from error
    except PosteriorClientError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # what reading another server's answer leads to
        raise ResponseError(f"what answers at {base_url} is no Posterior Server") from error


@contextmanager
def proxied() -> Iterator[None]:
    """What keeps the SDK from being made as InputError: the URL and the key are checked, so that it is a proxy of the
    environment."""
    try:
        yield
    except Exception as error:  # of several libraries below it
        raise InputError(
            f"a proxy in the environment cannot be used ({str(error).split('. ')[0]}); unset HTTP_PROXY, HTTPS_PROXY "
            "and ALL_PROXY, or name the server's host in NO_PROXY"
        ) from error


def _status_error(error: openai.APIStatusError) -> StatusError:
    known = {401: AuthenticationError, 404: ModelNotFoundError, 429: RateLimitError}
    if error.code == "answer_not_found":
        known[404] = AnswerNotFoundError
    kind = known.get(error.status_code, InvalidRequestError if error.status_code < 500 else ServerError)
    # The SDK prefixes "Error code: 400 - " to its message; the server's sentence is in the body.
    message = error.body.get("message") if isinstance(error.body, dict) else None
    return kind(message or error.message, error.status_code, error.code, error.param, error.type)
