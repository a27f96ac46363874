"""From the server's JSON to the frozen types."""

from typing import Any, TypeVar, overload

from openai.types import Completion, CompletionChoice
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.decision import (
    AnswerAnswerResourceChoice,
    AnswerAnswerResourcePredicate,
    AnswerAnswerResourceRefusal,
    AnswerAnswerResourceScore,
    Decision,
)
from pydantic import TypeAdapter, ValidationError

from posterior_client._decisions import DecisionResponse, DecisionUncertainty
from posterior_client._exceptions import ResponseError
from posterior_client._types import Prediction, PredictiveResponse, ScoredTexts, Text, TextPart, Uncertainty

AnyResponse = ChatCompletion | ChatCompletionChunk | Completion
AnyChoice = Choice | ChunkChoice | CompletionChoice
AnyDecided = (
    AnswerAnswerResourcePredicate | AnswerAnswerResourceChoice | AnswerAnswerResourceScore | AnswerAnswerResourceRefusal
)
T = TypeVar("T")


@overload
def uncertainty_of(response: Decision) -> list[DecisionUncertainty]: ...
@overload
def uncertainty_of(response: AnyDecided) -> DecisionUncertainty: ...
@overload
def uncertainty_of(response: AnyResponse) -> list[Uncertainty]: ...
@overload
def uncertainty_of(response: AnyChoice) -> Uncertainty: ...
def uncertainty_of(
    response: AnyResponse | AnyChoice | Decision | AnyDecided,
) -> list[Uncertainty] | list[DecisionUncertainty] | Uncertainty:
    """Read `uncertainty` from a stock `openai` response, stream chunk or choice, or from a decision or its answer.

    Args:
        response: A response or chunk gives one entry for each choice that carries an `uncertainty`
            (none for the base model's text, nor for a chunk without tokens); a choice gives its own. A decision gives
            one entry for each answer, an answer its own.

    Returns: a `DecisionUncertainty` of decisions. Else a `Prediction` where the request named `answers`, a `Text` for
        text under the mixture (a `TextPart` for a chunk before the last), a plain `Uncertainty` for text by the MAP.

    Raises:
        ResponseError: there is no `uncertainty`, or one this client cannot read.
    """
    if isinstance(response, Decision):
        return [read(DecisionUncertainty, _record(answer)) for answer in response.answers]
    if isinstance(response, AnyDecided):
        return read(DecisionUncertainty, _record(response))
    if isinstance(response, AnyResponse):
        return [uncertainty_of(choice) for choice in response.choices if _given(choice) is not None]
    record = _record(response)
    kinds = {"answers": Prediction, "mixing": Text, "tokens": TextPart}
    return read(next((kind for field, kind in kinds.items() if field in record), Uncertainty), record)


def _given(part: AnyChoice | AnyDecided) -> dict[str, Any] | None:
    """`uncertainty` as the server put it, or where LiteLLM puts what it does not know."""
    fields = [getattr(part, "uncertainty", None), getattr(part, "provider_specific_fields", None)]
    found: dict[str, Any] | None = fields[0] or (fields[1] or {}).get("uncertainty")
    return found


def _record(part: AnyChoice | AnyDecided) -> dict[str, Any]:
    record = _given(part)
    if record is None:
        what = "choice" if isinstance(part, AnyChoice) else "answer"
        raise ResponseError(f"this {what} carries no `uncertainty`: was it asked of a posterior?")
    return record


def predictive_response(body: object) -> PredictiveResponse:
    """Read the JSON answer of `POST /v1/predictive`. Raises ResponseError when a field is missing or wrong."""
    return _predictive(PredictiveResponse, body)


def scored_texts(body: object) -> ScoredTexts:
    """Read the JSON answer to a request with `texts`. Raises ResponseError when a field is missing or wrong."""
    return _predictive(ScoredTexts, body)


def _predictive(kind: type[T], body: object) -> T:
    if not isinstance(body, dict) or not isinstance(body.get("data"), list):
        raise ResponseError("the answer is not a predictive response: is the base URL a Posterior Server's?")
    # What holds for all rows is said once on the wire; each row also stands alone.
    shared = {key: body.get(key) for key in ("posterior", "predictive", "particles")}
    return read(kind, {**body, "data": [{**shared, **row} for row in body["data"]]})


def decision_response(body: object, asked: int) -> DecisionResponse:
    """Read the JSON answer of `POST /v1/decisions` to so many questions. Raises ResponseError when a field is missing
    or wrong."""
    if not isinstance(body, dict) or not isinstance(body.get("answers"), list):
        raise ResponseError("the answer is no decision: is the base URL a Posterior Server's?")
    if len(body["answers"]) != asked:
        raise ResponseError(f"{asked} questions were asked, and {len(body['answers'])} answers came")
    return read(DecisionResponse, body)


def read(kind: type[T], record: object) -> T:
    """The record as the type has it. Raises ResponseError when a field is missing or wrong."""
    try:
        return TypeAdapter(kind).validate_python(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ResponseError(f"the server's answer has an unreadable `{where}`: {first['msg']}") from error
