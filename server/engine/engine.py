"""vLLM behind the protocol of `server.engine`: candidates scored in one go, text by vLLM's own serving classes."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from posterior.data.candidates import Candidates
from posterior.errors import PosteriorError, first_line
from server import logs, tracing
from server.engine import Adapter, Call, Kind, Room, Scores, Usage
from server.engine.compat.client import MixingLLM
from server.engine.compat.starting import serving_classes, start_llm
from server.engine.config import EngineConfig
from server.engine.fields import check_fields
from server.engine.gang import CURRENT, GIVEN, STATE, Trace
from server.engine.grammars import check_grammars
from server.engine.refusals import refusal, refusals, result
from server.engine.scoring import Prefix, reads, sum_over_tokens
from server.errors import EngineLost, Fault, Refused, first

STOP_SECONDS = 5  # for vLLM's processes to end by themselves


class _Read(NamedTuple):
    """Log-probabilities, over the whole vocabulary, of the tokens that were asked for; the most probable token; how
    many tokens before them came from the prefix cache; and the state as bytes, empty where it was not asked for."""

    logprobs: dict[int, float]
    top: int
    cached: int
    state: bytes


class VllmEngine:
    """One MixingLLM and the serving classes vLLM builds on it."""

    def __init__(
        self,
        llm: MixingLLM,
        classes: Any,
        fields: Mapping[Kind, Set[str]],
        refused: Mapping[Adapter, str],
        room: Room,
        *,
        tools: bool,
    ) -> None:
        self.refused = refused
        self.room = room
        self._llm = llm
        self._classes = classes
        self._fields = fields
        self._tools = tools
        self.max_model_len: int = llm.model_config.max_model_len
        self.vocab_size: int = llm.model_config.get_vocab_size()
        self.dtype = str(llm.model_config.dtype).removeprefix("torch.")

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        public: Mapping[str, Adapter],
        adapters: Sequence[Adapter],
        fields: Mapping[Kind, Set[str]],
    ) -> VllmEngine:
        """The engine with the base and every adapter loaded.

        Args:
            public: the model names that generate text, with their adapters.
            fields: what requests may hold of vLLM's own fields, by the kind of request.

        An adapter that vLLM does not load is listed in `refused` with vLLM's reason. Raises ValueError for what vLLM
        cannot start with.
        """
        llm, args = start_llm(config)
        try:
            classes = await serving_classes(llm, args)
            refused = await _load_adapters(llm, adapters)
            loras = {name: _lora(adapter) for name, adapter in public.items()}
            classes.openai_serving_models.lora_requests.update(loras)
        except BaseException:
            llm.shutdown()
            raise
        return cls(llm, classes, fields, refused, config.room, tools=config.tool_call_parser is not None)

    async def score(
        self,
        prompts: Sequence[Sequence[int]],
        candidates: Candidates,
        adapters: Sequence[Adapter | None],
        *,
        states: bool = False,
    ) -> Scores:
        """As Engine.score: a request for each prompt, adapter and read of the candidates, all at once."""
        plan = reads(candidates)
        try:
            async with asyncio.TaskGroup() as group:  # one failure, or a client that has left, aborts all siblings
                tasks = [
                    [
                        [
                            group.create_task(
                                self._read([*prompt, *prefix], children, adapter, state=states and number == part == 0)
                            )
                            for part, (prefix, children) in enumerate(plan)
                        ]
                        for number, adapter in enumerate(adapters)
                    ]
                    for prompt in prompts
                ]
        except ExceptionGroup as errors:
            raise first(errors) from errors
        found = [[[task.result() for task in each] for each in row] for row in tasks]
        log_p = torch.stack([torch.stack([_joint(candidates, plan, each) for each in row]) for row in found])
        top = torch.tensor([[each[0].top for each in row] for row in found])
        cached = [min(read.cached for each in row for read in each) for row in found]  # by the one that came first
        return Scores(log_p, top, cached, _states([row[0][0].state for row in found]) if states else None)

    async def _read(
        self, tokens: list[int], children: list[int], adapter: Adapter | None, *, state: bool = False
    ) -> _Read:
        """What may stand right after `tokens`, of which the tokens `children` are asked for."""
        key = uuid.uuid4().hex
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprob_token_ids=children,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={STATE: key} if state else None,
        )
        outputs = self._llm.generate(
            tokens_input(tokens),
            params,
            _named("read", key),
            lora_request=_lora(adapter) if adapter else None,
            trace_headers=tracing.headers() or None,
        )
        if state:
            self._llm.states[key] = b""
        try:
            async for output in outputs:
                logprobs = output.outputs[0].logprobs
                if output.finished and logprobs:
                    found = {token: logprobs[0][token].logprob for token in children}
                    cached, note = output.num_cached_tokens or 0, self._llm.states.get(key, b"")
                    return _Read(found, output.outputs[0].token_ids[0], cached, note)
        except EngineDeadError as error:
            raise EngineLost from error
        except (VLLMClientError, GracefulHTTPError) as error:
            raise refusal(error) from error
        finally:
            self._llm.states.pop(key, None)
        raise Fault  # a read without result is never averaged away

    async def score_texts(
        self, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], trace: Trace
    ) -> list[list[list[float]]]:
        """As Engine.score_texts: a gang for each prompt, all at once, which reads prompt and text as a prompt that is
        scored. The token that vLLM then writes is not looked at."""
        token = CURRENT.set(trace)
        try:
            gangs = [self._scored(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        finally:
            CURRENT.reset(token)
        try:
            async with asyncio.TaskGroup() as group:  # one failure, or a client that has left, aborts all siblings
                for each in gangs:
                    group.create_task(_read_through(each))
        except ExceptionGroup as errors:
            raise first(errors) from errors
        rows = [each[0].prompt for each in trace.texts]
        if [len(each) for each in rows] != [len(text) for text in texts]:
            raise Fault  # a text is scored as a whole or not at all
        return rows

    def _scored(self, prompt: Sequence[int], text: Sequence[int]) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of the current trace's gang that scores a text. Raises Refused for what can never fit."""
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={GIVEN: len(prompt)},
        )
        return self._llm.generate(
            tokens_input([*prompt, *text]),
            params,
            _named("text", uuid.uuid4().hex),
            trace_headers=tracing.headers() or None,
        )

    async def render(self, kind: Kind, body: dict[str, Any]) -> list[list[int]]:
        parsed, longest = self._parsed(kind, body), self.max_model_len
        with refusals(body, longest):
            if kind == "chat":
                _, found = result(await self._classes.openai_serving_chat.render_chat_request(parsed), body, longest)
            else:
                found = result(
                    await self._classes.openai_serving_completion.render_completion_request(parsed), body, longest
                )
        return [list(prompt["prompt_token_ids"]) for prompt in found]

    async def chat(
        self, body: dict[str, Any], call: Call | None, trace: Trace | None = None
    ) -> dict[str, Any] | AsyncIterator[str]:
        create = self._classes.openai_serving_chat.create_chat_completion
        return await self._serve(create, self._parsed("chat", body), body, call, trace)

    async def complete(
        self, body: dict[str, Any], call: Call | None, trace: Trace | None = None
    ) -> dict[str, Any] | AsyncIterator[str]:
        create = self._classes.openai_serving_completion.create_completion
        return await self._serve(create, self._parsed("completion", body), body, call, trace)

    def _parsed(self, kind: Kind, body: dict[str, Any]) -> Any:
        """The body as vLLM's request. Raises Refused for whatever vLLM or this server does not take."""
        model = ChatCompletionRequest if kind == "chat" else CompletionRequest
        check_fields(body, model, self._fields[kind])
        check_grammars(body)
        if body.get("tools") and body.get("tool_choice") != "none" and not self._tools:
            raise Refused(
                "tools are not served here; start the server with --tool-call-parser NAME (how this base writes calls)",
                "tools",
            )
        with refusals(body, self.max_model_len):
            return model.model_validate(body)

    async def _serve(
        self, create: Any, parsed: Any, body: dict[str, Any], call: Call | None, trace: Trace | None
    ) -> dict[str, Any] | AsyncIterator[str]:
        """What vLLM's `create` answers, with `trace` as the one being handed to it."""
        token = CURRENT.set(trace)
        try:
            with refusals(body, self.max_model_len):
                answer = result(await create(parsed, call), body, self.max_model_len)
        finally:
            CURRENT.reset(token)
        return answer.model_dump() if isinstance(answer, BaseModel) else answer

    async def load(self, adapters: Sequence[Adapter], public: Mapping[str, Adapter]) -> None:
        """As Engine.load. vLLM copies an adapter into one of its slots when a batch needs it, and keeps the others in
        the CPU's memory: with no more adapters than it has places, it reads none a second time."""
        try:
            refused = await _load_adapters(self._llm, adapters)
            if refused:
                await self.unload(adapters, ())
        except EngineDeadError as error:
            raise EngineLost from error
        for adapter, reason in refused.items():
            raise PosteriorError(f"vLLM does not load the adapter {adapter.path}: {reason}")
        self._classes.openai_serving_models.lora_requests.update(
            {name: _lora(adapter) for name, adapter in public.items()}
        )

    async def unload(self, adapters: Sequence[Adapter], public: Iterable[str]) -> None:
        for name in public:
            self._classes.openai_serving_models.lora_requests.pop(name, None)
        try:
            for adapter in adapters:
                await self._llm.remove_lora(adapter.number)
        except EngineDeadError as error:
            raise EngineLost from error

    async def warm_up(self, prompt: list[int]) -> None:
        """Two tokens of the bare base with log-probabilities."""
        params = SamplingParams(max_tokens=2, temperature=1.0, seed=0, logprobs=2, ignore_eos=True)
        async for _ in self._llm.generate(tokens_input(prompt), params, "warm-up"):
            pass

    def usage(self, call: Call) -> Usage | None:
        final = getattr(getattr(call.state, "request_metadata", None), "final_usage_info", None)
        return None if final is None else Usage(final.prompt_tokens, final.completion_tokens or 0)

    def alive(self) -> bool:
        return not self._llm.errored

    def stop(self) -> None:
        self._llm.shutdown(timeout=STOP_SECONDS)


async def _load_adapters(llm: AsyncLLM, adapters: Sequence[Adapter]) -> dict[Adapter, str]:
    """The adapters that vLLM refuses, with its reason: each is loaded once, so that no request finds out."""
    refused: dict[Adapter, str] = {}
    for adapter in adapters:
        try:
            await llm.add_lora(_lora(adapter))
        except Exception as error:
            if llm.errored:
                raise
            said = str(error).removeprefix("Call to add_lora method failed: ")
            refused[adapter] = first_line(said, type(error).__name__)
            await llm.remove_lora(adapter.number)  # what was loaded of it
    return refused


async def _read_through(outputs: AsyncGenerator[RequestOutput, None]) -> None:
    """Waits for the end of a request whose result is elsewhere. Raises RequestError."""
    try:
        async for _ in outputs:
            pass
    except EngineDeadError as error:
        raise EngineLost from error
    except (VLLMClientError, GracefulHTTPError) as error:
        raise refusal(error) from error


def _named(kind: str, key: str) -> str:
    """vLLM's id of a request of ours: of what kind it is, and for which client's request."""
    return "-".join([kind, *filter(None, [logs.REQUEST.get()]), key])


def _states(found: Sequence[bytes]) -> torch.Tensor:
    """[prompts, hidden size] of the notes. Raises Fault where one is missing."""
    if not all(found):
        raise Fault
    return torch.stack([torch.frombuffer(bytearray(each), dtype=torch.float32) for each in found])


def _lora(adapter: Adapter) -> LoRARequest:
    """The adapter as vLLM's request for it."""
    return LoRARequest(adapter.name, adapter.number, str(adapter.path))


def _joint(candidates: Candidates, plan: Sequence[tuple[Prefix, list[int]]], found: Sequence[_Read]) -> torch.Tensor:
    """log p(candidate | prompt) from the reads of the plan, [candidates]."""
    logprobs = {
        (*prefix, token): logprob
        for (prefix, _), read in zip(plan, found, strict=True)
        for token, logprob in read.logprobs.items()
    }
    return sum_over_tokens(candidates, logprobs)
