"""What turned out to be true of earlier answers: `POST /v1/outcomes`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict
from urllib.parse import quote

from openai import AsyncOpenAI, OpenAI

from posterior_client._decisions import Value
from posterior_client._exceptions import ResponseError, translated
from posterior_client._request import body
from posterior_client._uncertainty import read


class Outcome(TypedDict):
    """What turned out to be true of an answer; exactly one of `answer` and `correct`.

    id: of the reply.
    index: of the answer in the reply (default 0): its place in `data`, `answers` or `choices`.
    answer: the true option: one of the candidate answers, or of the question's values.
    correct: whether the answer was right.
    """

    id: str
    index: NotRequired[int]
    answer: NotRequired[Value]
    correct: NotRequired[bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomeResult:
    """What became of an outcome.

    `status`: "stored" now; "known", stored before; "unknown", there is no such answer (any more); "conflict", another
    outcome is stored; "invalid", the question had no such option. `correct`: whether the answer was right, by the
    outcome that is stored. `message`: why it was not stored.
    """

    id: str
    index: int
    status: Literal["stored", "known", "unknown", "conflict", "invalid"]
    correct: bool | None
    message: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomesResponse:
    """Answer of `POST /v1/outcomes`: one `OutcomeResult` for each outcome, in order."""

    data: tuple[OutcomeResult, ...]


class Outcomes:
    """`PosteriorClient.outcomes`."""

    def __init__(self, openai: OpenAI, base_url: str) -> None:
        self._openai, self._base_url = openai, base_url

    def report(self, outcomes: Sequence[Outcome]) -> OutcomesResponse:
        """What became of each outcome. Those that are "stored" survive whatever ends the server; a second report of
        the same is "known".

        Args:
            outcomes: 1 to 1000.

        Raises: as `PosteriorClient.predictive`; a server that keeps no answers refuses with 404.
        """
        sent = body({"outcomes": outcomes})
        with translated(self._base_url):
            return _response(self._openai.post("/outcomes", cast_to=object, body=sent), len(outcomes))

    def delete(self, id: str) -> None:
        """Delete the answers of the reply `id`, and their outcomes.

        Raises: as `report`, and AnswerNotFoundError.
        """
        with translated(self._base_url):
            self._openai.delete(f"/outcomes/{quote(id, safe='')}", cast_to=object)


class AsyncOutcomes:
    """`Outcomes` for asyncio."""

    def __init__(self, openai: AsyncOpenAI, base_url: str) -> None:
        self._openai, self._base_url = openai, base_url

    async def report(self, outcomes: Sequence[Outcome]) -> OutcomesResponse:
        """`Outcomes.report`, awaited."""
        sent = body({"outcomes": outcomes})
        with translated(self._base_url):
            return _response(await self._openai.post("/outcomes", cast_to=object, body=sent), len(outcomes))

    async def delete(self, id: str) -> None:
        """`Outcomes.delete`, awaited."""
        with translated(self._base_url):
            await self._openai.delete(f"/outcomes/{quote(id, safe='')}", cast_to=object)


def _response(body: object, sent: int) -> OutcomesResponse:
    """Read the JSON answer to so many outcomes. Raises ResponseError when a field is missing or wrong."""
    response = read(OutcomesResponse, body)
    if len(response.data) != sent:
        raise ResponseError(f"{sent} outcomes were sent, and {len(response.data)} answers came")
    return response
