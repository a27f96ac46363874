"""What turned out to be true of earlier answers: `POST /v1/outcomes`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict
from urllib.parse import quote

from openai import AsyncOpenAI, OpenAI

from posterior_client._decisions import Value
from posterior_client._exceptions import ResponseError, translated
from posterior_client._request import body
from posterior_client._types import PredictiveName
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Promised:
    """The means of what requests asked for: coverage of prediction sets, and max_risk."""

    coverage: float | None = None
    max_risk: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomesFigures:
    """What `n` outcomes say: `accuracy`; of the confidence `nll` (nats), `brier`, `ece` and `gap`, its mean less the
    accuracy; `coverage` of prediction sets; `risk`, the share of wrong answers among those that max_risk let pass."""

    n: int
    promised: Promised
    accuracy: Figure | None = None
    nll: Figure | None = None
    brier: Figure | None = None
    ece: Figure | None = None
    gap: Figure | None = None
    coverage: Figure | None = None
    risk: Figure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """How many outcomes the server asked for among the newest answers, and how many of these came."""

    requested: int
    reported: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """How far `n` answers are from the `held` rows of the calibration: `distance` is the largest difference of shares,
    `p_value` the probability of one as large where nothing has changed."""

    n: int
    held: int
    distance: float
    p_value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchangeability:
    """Evidence, after `n` labels, that answers are no longer like the rows of the calibration: log10 of a gambler's
    capital, `now` and at most. `rejected`: what the calibration promises no longer holds."""

    n: int
    now: float
    largest: float
    rejected: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomesOfKind:
    """What outcomes say of the answers of one posterior, predictive and kind of question.

    `outcomes` is by sample: "all", and "requested", those that the server asked for. `drift` is of "confidence",
    "entropy" and "familiarity". `missing` says why there is no "drift" or no "exchangeability".
    """

    posterior: str
    predictive: PredictiveName
    kind: Literal["answers", "predicate", "choice", "score", "text"]
    outcomes: Mapping[Literal["all", "requested"], OutcomesFigures]
    labels: Labels
    drift: Mapping[Literal["confidence", "entropy", "familiarity"], Drift]
    exchangeability: Exchangeability | None
    missing: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomesReport:
    """Answer of `GET /v1/outcomes/report`. `window`: how many of the newest answers and outcomes of each posterior
    count, or of how many days ("30d")."""

    window: str
    data: tuple[OutcomesOfKind, ...]


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

    def summary(self) -> OutcomesReport:
        """What the outcomes of this key's answers say, with the key of an admin those of all keys.

        Raises: as `report`.
        """
        with translated(self._base_url):
            return read(OutcomesReport, self._openai.get("/outcomes/report", cast_to=object))

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

    async def summary(self) -> OutcomesReport:
        """`Outcomes.summary`, awaited."""
        with translated(self._base_url):
            return read(OutcomesReport, await self._openai.get("/outcomes/report", cast_to=object))

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
