"""What clients may send: our own objects, strict, with their limits. OpenAI's own fields are vLLM's to check."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from posterior.decoding import Mixing
from server.errors import bad_request

MAX_ANSWERS = 128  # per request: vLLM's logprob_token_ids takes no more
MAX_PROMPTS = 256  # per request
MAX_CHOICES = 128  # `n`, as OpenAI has it
MAX_SEQUENCES = 8192  # sequences of one request: prompts x particles x candidate prefixes, or x n for text
MAX_SCORED = 2**16  # tokens of an echoed prompt x particles: hidden states that are kept until all have read it
MAX_NUMBERS = 2**20  # entries of all covariances in one response
MAX_BODY_BYTES = 4 * 2**20

PredictiveName = Literal["mixture", "linearized", "map"]


def check_size(prompts: int, n: int, particles: int) -> None:
    """Raises ApiError 400 for a request of more texts than are written at a time."""
    sequences = prompts * n * particles
    if sequences > MAX_SEQUENCES:
        raise bad_request(
            f"{prompts} prompts x n = {n} x {particles} particles are {sequences} sequences; one request may have "
            f"{MAX_SEQUENCES}: send fewer prompts, or ask for fewer choices or 'particles'",
            "n",
        )


class Uncertainty(BaseModel):
    """The object `uncertainty` of chat and completion requests."""

    model_config = ConfigDict(extra="forbid", strict=True)

    predictive: PredictiveName | None = None
    particles: Annotated[int, Field(ge=1)] | None = None
    answers: Annotated[list[str], Field(min_length=2, max_length=MAX_ANSWERS)] | None = None
    coverage: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9
    per_particle: bool = False
    mixing: Mixing | None = None  # of text; "sequence" if not given
    tokens: bool | None = None  # of text: a record for each token; by default on streams only


class PredictiveRequest(Uncertainty):
    """The body of POST /v1/predictive."""

    model: str
    inputs: Annotated[list[dict[str, str]], Field(min_length=1, max_length=MAX_PROMPTS)] | None = None
    prompts: Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)] | None = None
    messages: Annotated[list[list[dict[str, Any]]], Field(min_length=1, max_length=MAX_PROMPTS)] | None = None

    @model_validator(mode="after")
    def _one_kind_of_prompt(self) -> PredictiveRequest:
        given = [name for name in ("inputs", "prompts", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of 'inputs', 'prompts' and 'messages'; got {given or 'none'}")
        return self
