"""Client of Posterior Server: the official `openai` SDK plus posterior predictive distributions."""

from posterior_client._client import AsyncPosteriorClient, PosteriorClient
from posterior_client._exceptions import (
    AuthenticationError,
    InputError,
    InvalidRequestError,
    ModelNotFoundError,
    PosteriorClientError,
    ResponseError,
    ServerError,
    StatusError,
    UnreachableError,
)
from posterior_client._types import (
    Answer,
    Entropy,
    LeftOut,
    Particles,
    Prediction,
    PredictiveResponse,
    Text,
    TextPart,
    TextSummary,
    Token,
    Uncertainty,
    Usage,
    Variance,
)
from posterior_client._uncertainty import uncertainty_of

__all__ = [
    "Answer",
    "AsyncPosteriorClient",
    "AuthenticationError",
    "Entropy",
    "InputError",
    "InvalidRequestError",
    "LeftOut",
    "ModelNotFoundError",
    "Particles",
    "PosteriorClient",
    "PosteriorClientError",
    "Prediction",
    "PredictiveResponse",
    "ResponseError",
    "ServerError",
    "StatusError",
    "Text",
    "TextPart",
    "TextSummary",
    "Token",
    "Uncertainty",
    "UnreachableError",
    "Usage",
    "Variance",
    "uncertainty_of",
]
