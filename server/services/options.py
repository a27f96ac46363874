"""What a request may ask of a posterior, with its limits: the object `uncertainty`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from posterior.data.candidates import MAX_CANDIDATES
from posterior.predictive.decoding import Mixing

MAX_ANSWERS = MAX_CANDIDATES  # per request
MAX_SEQUENCES = 8192  # sequences of one request: prompts x particles x reads of the candidates, or x n for text
MAX_SAMPLES = 64  # of a prompt
MAX_COMPARISONS = 8192  # of two samples by a model, in one request: prompts x pairs of samples
MAX_SAMPLED = 2**20  # tokens of one request: prompts x samples x particles x max_tokens
MAX_OPTIONS = 8192  # of all questions of a request for decisions
MAX_BACKWARD = 256  # backward passes of one request's decisions (posterior/laplace/linearized.py)
MAX_ORDERS = 8  # of the options of a question
MAX_NUMBERS = 2**20  # entries of all covariances in one response
MAX_INTEGER = 2**63 - 1

PredictiveName = Literal["mixture", "linearized", "map"]
MeaningName = Literal["exact", "embedding", "nli", "judge"]
Returned = Literal["meaning", "greedy"]
Reason = Literal["ambiguous", "unfamiliar"]


class Uncertainty(BaseModel):
    """The object `uncertainty` that all requests have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    predictive: PredictiveName | None = Field(
        default=None, description="how the posterior is averaged; the model's first"
    )
    particles: Annotated[int, Field(ge=1, le=MAX_INTEGER)] | Literal["auto"] | None = Field(
        default=None, description="of the mixture; all. 'auto': as many as the answer needs"
    )
    answers: Annotated[list[str], Field(min_length=2, max_length=MAX_ANSWERS)] | None = Field(
        default=None, description="candidate answers, each with its leading space if it has one"
    )
    coverage: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.9, description="of intervals and prediction sets"
    )
    per_particle: bool = Field(default=False, description="also what each particle says")
    mixing: Mixing | None = Field(default=None, description="of text: 'sequence' (exact, the default) or 'token'")
    tokens: bool | None = Field(
        default=None, description="of text: a record for each token; by default on streams only"
    )

    @field_validator("particles", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "auto":
            raise ValueError(f"must be an integer or 'auto'; got {value[:20]!r}")
        return value


class TextUncertainty(Uncertainty):
    """The object `uncertainty` of chat and completion requests."""

    samples: Annotated[int, Field(ge=2, le=MAX_SAMPLES)] | None = Field(
        default=None, description="of text: draw so many, and say how probable each meaning is"
    )
    returned: Returned | None = Field(
        default=None,
        alias="return",
        description="with samples: the text of the most probable 'meaning' (the default), or the 'greedy' one",
    )
    meaning: MeaningName | None = Field(
        default=None,
        description="with samples: what tells meanings apart. 'exact' (the default): equal short answers. 'embedding' "
        "and 'nli': a model that the server was started with. 'judge': the base",
    )
    max_risk: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        default=None,
        description="of text: abstain where more than this share of the texts that do not abstain could be wrong; "
        "needs a calibration",
    )
    fields: bool | None = Field(
        default=None, description="of text that is JSON: how probable each of its values is; needs a JSON grammar"
    )


class DecisionUncertainty(Uncertainty):
    """The object `uncertainty` of requests for decisions."""

    max_risk: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        default=None,
        description="answer only where the error among answered questions is at most this, else refuse; needs a "
        "calibration",
    )
    orders: Annotated[int, Field(ge=1, le=MAX_ORDERS)] = Field(
        default=1, description="average over so many orders of a question's options, or over all there are"
    )
