"""`PosteriorClient` and its async twin: thin wrappers whose transport (retries, timeouts, auth) is the SDK's own."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Literal, Self

from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam
from openai.types.decision_create_params import InputUnionMember1, Question

from posterior_client._decisions import DecisionResponse, UncertaintyOptions
from posterior_client._exceptions import proxied, translated
from posterior_client._outcomes import AsyncOutcomes, Outcomes
from posterior_client._request import body, settings
from posterior_client._types import PredictiveName, PredictiveResponse, ScoredTexts
from posterior_client._uncertainty import decision_response, predictive_response, scored_texts

DecisionInput = str | Sequence[InputUnionMember1]


class PosteriorClient:
    """A Posterior Server, with `.openai` as the stock SDK client for all of OpenAI's routes, and `.outcomes` to report
    what turned out to be true of answers.

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
        self.base_url, key = settings(base_url, api_key)
        with proxied():
            self.openai = OpenAI(base_url=self.base_url, api_key=key, timeout=timeout, max_retries=max_retries)
        self.outcomes = Outcomes(self.openai, self.base_url)

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
        sent = body(locals())
        with translated(self.base_url):
            return predictive_response(self.openai.post("/predictive", cast_to=object, body=sent))

    def score_texts(
        self,
        *,
        model: str,
        texts: Sequence[str],
        inputs: Sequence[Mapping[str, str]] | None = None,
        prompts: Sequence[str] | None = None,
        messages: Sequence[Sequence[ChatCompletionMessageParam]] | None = None,
        predictive: PredictiveName | None = None,
        particles: int | None = None,
        mixing: Literal["sequence", "token"] | None = None,
        tokens: bool | None = None,
        per_particle: bool | None = None,
    ) -> ScoredTexts:
        """How probable each text is after its prompt, for many prompts in one call. What is None, the server decides.

        Args:
            model: a posterior's name.
            texts: one for each prompt, exactly as it continues it.
            inputs, prompts, messages: exactly one, as `predictive`.
            predictive: which predictive; default the mixture.
            particles: how many particles a mixture uses.
            mixing: whether the text's tokens change the particles' weights ("sequence", the default).
            tokens: also return a record for each token.
            per_particle: also return each particle's log-probability and weight.

        Raises: as `predictive`.
        """
        sent = body(locals())
        with translated(self.base_url):
            return scored_texts(self.openai.post("/predictive", cast_to=object, body=sent))

    def decisions(
        self,
        *,
        model: str,
        input: DecisionInput,
        questions: Sequence[Question],
        uncertainty: UncertaintyOptions | None = None,
    ) -> DecisionResponse:
        """The answer to typed questions about one input. What is None, the server decides.

        Args:
            model: a posterior's name.
            input: a text, or messages, tool calls and their outputs, as OpenAI has them.
            questions: predicates, choices and scores, as OpenAI has them.
            uncertainty: how the posterior is averaged, and when a question is not to be answered.

        Raises: as `predictive`.
        """
        sent = body(locals())
        with translated(self.base_url):
            return decision_response(self.openai.post("/decisions", cast_to=object, body=sent), len(questions))

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
        self.base_url, key = settings(base_url, api_key)
        with proxied():
            self.openai = AsyncOpenAI(base_url=self.base_url, api_key=key, timeout=timeout, max_retries=max_retries)
        self.outcomes = AsyncOutcomes(self.openai, self.base_url)

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
        sent = body(locals())
        with translated(self.base_url):
            return predictive_response(await self.openai.post("/predictive", cast_to=object, body=sent))

    async def score_texts(
        self,
        *,
        model: str,
        texts: Sequence[str],
        inputs: Sequence[Mapping[str, str]] | None = None,
        prompts: Sequence[str] | None = None,
        messages: Sequence[Sequence[ChatCompletionMessageParam]] | None = None,
        predictive: PredictiveName | None = None,
        particles: int | None = None,
        mixing: Literal["sequence", "token"] | None = None,
        tokens: bool | None = None,
        per_particle: bool | None = None,
    ) -> ScoredTexts:
        """`PosteriorClient.score_texts`, awaited."""
        sent = body(locals())
        with translated(self.base_url):
            return scored_texts(await self.openai.post("/predictive", cast_to=object, body=sent))

    async def decisions(
        self,
        *,
        model: str,
        input: DecisionInput,
        questions: Sequence[Question],
        uncertainty: UncertaintyOptions | None = None,
    ) -> DecisionResponse:
        """`PosteriorClient.decisions`, awaited."""
        sent = body(locals())
        with translated(self.base_url):
            return decision_response(await self.openai.post("/decisions", cast_to=object, body=sent), len(questions))

    async def close(self) -> None:
        """Close the connections."""
        await self.openai.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
