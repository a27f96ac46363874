"""`PosteriorClient` and its async twin: thin wrappers whose transport (retries, timeouts, auth) is the SDK's own."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from posterior_client._exceptions import InputError, proxied, translated
from posterior_client._types import PredictiveName, PredictiveResponse
from posterior_client._uncertainty import predictive_response

BASE_URL = "http://127.0.0.1:8000/v1"


class PosteriorClient:
    """A Posterior Server, with `.openai` as the stock SDK client for chat, completions and models.

    Args:
        base_url: default $POSTERIOR_BASE_URL, else http://127.0.0.1:8000/v1.
        api_key: default $POSTERIOR_API_KEY, else none.
        timeout: seconds a request may take.
        max_retries: how often a lost connection, 408, 409, 429 or 5xx is tried again (the SDK honours Retry-After).

    Raises:
        InputError: the base URL is none, the API key cannot stand in a header, or a proxy of the environment is none.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 600.0,
        max_retries: int = 2,
    ) -> None:
        self.base_url, key = _settings(base_url, api_key)
        with proxied():
            self.openai = OpenAI(base_url=self.base_url, api_key=key, timeout=timeout, max_retries=max_retries)

    def predictive(
        self,
        *,
        model: str,
        inputs: Sequence[Mapping[str, str]] | None = None,
        prompts: Sequence[str] | None = None,
        messages: Sequence[Sequence[ChatCompletionMessageParam]] | None = None,
        answers: Sequence[str] | None = None,
        predictive: PredictiveName | None = None,
        particles: int | Literal["auto"] | None = None,
        per_particle: bool | None = None,
        coverage: float | None = None,
    ) -> PredictiveResponse:
        """The posterior predictive over the answers, for many inputs in one call. What is None, the server decides.

        Args:
            model: a posterior's name.
            inputs, prompts, messages: exactly one. The task's own fields, rendered with the template the
                posterior was fitted with; raw text; or chats. The answers continue them.
            answers: candidate answers, exactly as they continue the prompt; default the task's own.
            predictive: which predictive; default the posterior's best.
            particles: how many particles a mixture uses; "auto": as many as each answer needs.
            per_particle: also return each particle's distribution.
            coverage: of the credible intervals, in (0, 1).

        Raises:
            InputError: a text that is none (half of a character), or a number that is not finite; nothing was sent.
            StatusError: the server refused, with its own message.
            UnreachableError: no server there, or too slow.
            ResponseError: the answer is not a Posterior Server's.
        """
        body = _body(locals())
        with translated(self.base_url):
            return predictive_response(self.openai.post("/predictive", cast_to=object, body=body))

    def close(self) -> None:
        """Close the connections."""
        self.openai.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncPosteriorClient:
    """`PosteriorClient` for asyncio: the same arguments, methods and errors."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 600.0,
        max_retries: int = 2,
    ) -> None:
        self.base_url, key = _settings(base_url, api_key)
        with proxied():
            self.openai = AsyncOpenAI(base_url=self.base_url, api_key=key, timeout=timeout, max_retries=max_retries)

    async def predictive(
        self,
        *,
        model: str,
        inputs: Sequence[Mapping[str, str]] | None = None,
        prompts: Sequence[str] | None = None,
        messages: Sequence[Sequence[ChatCompletionMessageParam]] | None = None,
        answers: Sequence[str] | None = None,
        predictive: PredictiveName | None = None,
        particles: int | Literal["auto"] | None = None,
        per_particle: bool | None = None,
        coverage: float | None = None,
    ) -> PredictiveResponse:
        """`PosteriorClient.predictive`, awaited."""
        body = _body(locals())
        with translated(self.base_url):
            return predictive_response(await self.openai.post("/predictive", cast_to=object, body=body))

    async def close(self) -> None:
        """Close the connections."""
        await self.openai.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _settings(base_url: str | None, api_key: str | None) -> tuple[str, str]:
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


def _body(arguments: dict[str, Any]) -> dict[str, Any]:
    body = {name: value for name, value in arguments.items() if name != "self" and value is not None}
    for name, value in body.items():
        _check(name, value)
    return body


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
