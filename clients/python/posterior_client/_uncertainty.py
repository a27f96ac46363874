"""From the server's JSON to the frozen types."""

from typing import TypeVar, overload

from openai.types import Completion, CompletionChoice
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from pydantic import TypeAdapter, ValidationError

from posterior_client._exceptions import ResponseError
from posterior_client._types import Prediction, PredictiveResponse, Text, TextPart, Uncertainty

AnyResponse = ChatCompletion | ChatCompletionChunk | Completion
AnyChoice = Choice | ChunkChoice | CompletionChoice
T = TypeVar("T")


@overload
def uncertainty_of(response: AnyResponse) -> list[Uncertainty]: ...
@overload
def uncertainty_of(response: AnyChoice) -> Uncertainty: ...
def uncertainty_of(response: AnyResponse | AnyChoice) -> list[Uncertainty] | Uncertainty:
    """Read `uncertainty` from a stock `openai` response, stream chunk or choice.

    Args:
        response: A response or chunk gives one entry for each choice that carries an `uncertainty`
            (none for the base model's text, nor for a chunk without tokens); a choice gives its own.

    Returns: a `Prediction` where the request named `answers`, a `Text` for text under the mixture (a `TextPart` for a
        chunk before the last), a plain `Uncertainty` for text by the MAP.

    Raises:
        ResponseError: the choice carries no `uncertainty`, or one this client cannot read.
    """
    if isinstance(response, AnyResponse):
        return [uncertainty_of(choice) for choice in response.choices if hasattr(choice, "uncertainty")]
    record = getattr(response, "uncertainty", None)
    if record is None:
        raise ResponseError("this choice carries no `uncertainty`: was it asked of a posterior?")
    kinds = {"answers": Prediction, "mixing": Text, "tokens": TextPart}
    return _read(next((kind for field, kind in kinds.items() if field in record), Uncertainty), record)


def predictive_response(body: object) -> PredictiveResponse:
    """Read the JSON answer of `POST /v1/predictive`. Raises ResponseError when a field is missing or wrong."""
    if not isinstance(body, dict) or not isinstance(body.get("data"), list):
        raise ResponseError("the answer is not a predictive response: is the base URL a Posterior Server's?")
    # What holds for all rows is said once on the wire; each Prediction also stands alone.
    shared = {key: body.get(key) for key in ("posterior", "predictive", "particles")}
    return _read(PredictiveResponse, {**body, "data": [{**shared, **row} for row in body["data"]]})


def _read(kind: type[T], record: object) -> T:
    try:
        return TypeAdapter(kind).validate_python(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ResponseError(f"the server's answer has an unreadable `{where}`: {first['msg']}") from error
