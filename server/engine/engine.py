"""vLLM behind the protocol of `server.engine`: candidates scored in one go, text by vLLM's own serving classes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from fastapi import Request
from jinja2 import TemplateError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import State
from vllm.config import CompilationMode, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import GenerationError, GracefulHTTPError, VLLMClientError
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tool_parsers import ToolParserManager
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from posterior.data.candidates import Candidates
from server.engine import Adapter, Usage
from server.engine.compat.client import MixingLLM
from server.engine.config import EngineConfig
from server.engine.fields import check_fields
from server.engine.gang import CURRENT, Trace
from server.engine.grammars import FIELDS, check_grammars
from server.engine.scoring import Prefix, prefix_tree, sum_over_tokens
from server.errors import ApiError, bad_request, from_validation, internal_error, model_not_found, unavailable
from server.schemas import Kind

STOP_SECONDS = 5  # for vLLM's processes to end by themselves


class VllmEngine:
    """One MixingLLM and the serving classes vLLM builds on it."""

    def __init__(self, llm: AsyncLLM, state: State, tools: bool, refused: Mapping[Adapter, str]) -> None:
        self.refused = refused
        self._llm = llm
        self._state = state
        self._tools = tools
        self.max_model_len: int = llm.model_config.max_model_len
        self.vocab_size: int = llm.model_config.get_vocab_size()
        self.dtype = str(llm.model_config.dtype).removeprefix("torch.")

    @classmethod
    async def start(
        cls, config: EngineConfig, public: Mapping[str, Adapter], adapters: Sequence[Adapter]
    ) -> VllmEngine:
        """Load the base and every adapter; `public` maps the model names that generate text to their adapters. An
        adapter that vLLM does not load is listed in `refused` with vLLM's reason.

        Raises ValueError for what vLLM cannot start with.
        """
        if config.tool_call_parser not in (None, *(parsers := ToolParserManager.list_registered())):
            raise ValueError(f"no tool-call parser {config.tool_call_parser!r}; there are {', '.join(sorted(parsers))}")
        parser = make_arg_parser(FlexibleArgumentParser())  # type: ignore[no-untyped-call]
        args = parser.parse_args(config.arguments())
        engine_config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
        if config.device == "cpu" and config.compiled:  # vLLM switches it off for LoRA, whose products it cannot trace
            engine_config.compilation_config.mode = CompilationMode.DYNAMO_TRACE_ONCE
        _choose_runner(engine_config, config.device)
        with _threads(engine_config, config.device):
            started = MixingLLM.from_vllm_config(engine_config, usage_context=UsageContext.OPENAI_API_SERVER)
            llm = cast(MixingLLM, started)
        try:
            state = State()
            await init_app_state(llm, state, args, await llm.get_supported_tasks())
            llm.groups = [tuple(group) for group in (await llm.collective_rpc("kv_groups"))[0]]
            refused = await _load_adapters(llm, adapters)
            state.openai_serving_models.lora_requests.update({name: _lora(adapter) for name, adapter in public.items()})
        except BaseException:
            llm.shutdown()
            raise
        return cls(llm, state, config.tool_call_parser is not None, refused)

    async def score(
        self, prompts: Sequence[Sequence[int]], candidates: Candidates, adapters: Sequence[Adapter | None]
    ) -> torch.Tensor:
        tree = prefix_tree(candidates)
        try:
            async with asyncio.TaskGroup() as group:  # one failure, or a client that has left, aborts all siblings
                reads = [
                    [
                        {
                            prefix: group.create_task(self._read([*prompt, *prefix], children, adapter))
                            for prefix, children in tree.items()
                        }
                        for adapter in adapters
                    ]
                    for prompt in prompts
                ]
        except ExceptionGroup as errors:
            raise _first(errors) from errors
        return torch.stack([torch.stack([_joint(candidates, read) for read in row]) for row in reads])

    async def _read(self, tokens: list[int], children: list[int], adapter: Adapter | None) -> dict[int, float]:
        """Log-probabilities over the whole vocabulary of the tokens `children` right after `tokens`."""
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprob_token_ids=children,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        outputs = self._llm.generate(
            tokens_input(tokens), params, f"read-{uuid.uuid4().hex}", lora_request=_lora(adapter) if adapter else None
        )
        try:
            async for output in outputs:
                logprobs = output.outputs[0].logprobs
                if output.finished and logprobs:
                    return {token: logprobs[0][token].logprob for token in children}
        except EngineDeadError as error:
            raise unavailable("the engine has stopped; the server needs a restart") from error
        except (VLLMClientError, GracefulHTTPError) as error:
            raise _refusal(error) from error
        raise internal_error()  # a read without result is never averaged away

    async def render(self, kind: Kind, body: dict[str, Any]) -> list[list[int]]:
        parsed = self._parsed(kind, body)
        with _refusals(body):
            if kind == "chat":
                _, found = _result(await self._state.openai_serving_chat.render_chat_request(parsed), body)
            else:
                found = _result(await self._state.openai_serving_completion.render_completion_request(parsed), body)
        return [list(prompt["prompt_token_ids"]) for prompt in found]

    async def chat(
        self, body: dict[str, Any], request: Request | None, trace: Trace | None = None
    ) -> dict[str, Any] | AsyncIterator[str]:
        create = self._state.openai_serving_chat.create_chat_completion
        return await self._serve(create, self._parsed("chat", body), body, request, trace)

    async def complete(
        self, body: dict[str, Any], request: Request | None, trace: Trace | None = None
    ) -> dict[str, Any] | AsyncIterator[str]:
        create = self._state.openai_serving_completion.create_completion
        return await self._serve(create, self._parsed("completion", body), body, request, trace)

    def _parsed(self, kind: Kind, body: dict[str, Any]) -> Any:
        """The body as vLLM's request. Raises ApiError 400 for whatever vLLM or this server does not take."""
        model = ChatCompletionRequest if kind == "chat" else CompletionRequest
        check_fields(kind, body, model)
        check_grammars(body)
        if body.get("tools") and body.get("tool_choice") != "none" and not self._tools:
            raise bad_request(
                "tools are not served here; start the server with --tool-call-parser NAME (how this base writes calls)",
                "tools",
            )
        with _refusals(body):
            return model.model_validate(body)

    async def _serve(
        self, create: Any, parsed: Any, body: dict[str, Any], request: Request | None, trace: Trace | None
    ) -> dict[str, Any] | AsyncIterator[str]:
        token = CURRENT.set(trace)
        try:
            with _refusals(body):
                answer = _result(await create(parsed, request), body)
        finally:
            CURRENT.reset(token)
        return answer.model_dump() if isinstance(answer, BaseModel) else answer

    async def warm_up(self, prompt: list[int]) -> None:
        """Two tokens of the bare base with log-probabilities."""
        params = SamplingParams(max_tokens=2, temperature=1.0, seed=0, logprobs=2, ignore_eos=True)
        async for _ in self._llm.generate(tokens_input(prompt), params, "warm-up"):
            pass

    def usage(self, request: Request) -> Usage | None:
        final = getattr(getattr(request.state, "request_metadata", None), "final_usage_info", None)
        return None if final is None else Usage(final.prompt_tokens, final.completion_tokens or 0)

    def alive(self) -> bool:
        return not self._llm.errored

    def stop(self) -> None:
        self._llm.shutdown(timeout=STOP_SECONDS)


def _choose_runner(engine_config: VllmConfig, device: str) -> None:
    """The V1 model runner, which `set_environment` asks for; says so where vLLM would have used another.

    Raises ValueError if it is not to be had.
    """
    if engine_config.use_v2_model_runner:
        raise ValueError("vLLM insists on its V2 model runner here; mixtures of particles need V1")
    if device != "cpu":  # on a CPU there is no other
        wanted = os.environ.pop("VLLM_USE_V2_MODEL_RUNNER")
        if engine_config.use_v2_model_runner:
            logging.getLogger("posterior.server").warning(
                "vLLM's V1 model runner is used, not V2: mixtures of particles need it"
            )
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = wanted


@contextlib.contextmanager
def _threads(engine_config: VllmConfig, device: str) -> Iterator[None]:
    """On a CPU the model runs in the engine core's own process, which starts within, one thread bound to each core.

    vLLM would start a worker beside it, and keep a core for the engine core, which spins while it waits for the worker:
    of two cores one would be lost."""
    if device != "cpu":
        yield
        return
    engine_config.parallel_config.distributed_executor_backend = UniProcExecutor
    with OMPProcessManager(engine_config).configure_omp_envs(rank=0, local_rank=0):
        yield


async def _load_adapters(llm: AsyncLLM, adapters: Sequence[Adapter]) -> dict[Adapter, str]:
    """Load each adapter once, so that no request finds out that vLLM refuses it; those refused, with vLLM's reason."""
    refused: dict[Adapter, str] = {}
    for adapter in adapters:
        try:
            await llm.add_lora(_lora(adapter))
        except Exception as error:
            if llm.errored:
                raise
            refused[adapter] = _line(str(error).removeprefix("Call to add_lora method failed: "))
            await llm.remove_lora(adapter.number)  # what was loaded of it
    return refused


def _lora(adapter: Adapter) -> LoRARequest:
    return LoRARequest(adapter.name, adapter.number, str(adapter.path))


def _joint(candidates: Candidates, tasks: Mapping[Prefix, asyncio.Task[dict[int, float]]]) -> torch.Tensor:
    return sum_over_tokens(candidates, {prefix: task.result() for prefix, task in tasks.items()})


def _first(errors: BaseExceptionGroup[Any]) -> BaseException:
    """The first leaf of a group: one cause is what a client can use."""
    error: BaseException = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


@contextlib.contextmanager
def _refusals(body: dict[str, Any]) -> Iterator[None]:
    """What vLLM raises about a request as ApiError."""
    try:
        yield
    except ValidationError as error:
        raise from_validation(error, body) from error
    except EngineDeadError as error:
        raise unavailable("the engine has stopped; the server needs a restart") from error
    except TemplateError as error:
        raise bad_request(
            f"the base's chat template refuses these messages: {_line(str(error))}", "messages"
        ) from error
    except RecursionError as error:
        raise bad_request("the request is nested too deeply") from error
    except GenerationError as error:  # also of a grammar that vLLM's compiler refuses
        if not any(body.get(name) for name in FIELDS):
            raise
        raise bad_request("the grammar of this request cannot be used; simplify it", "structured_outputs") from error
    except (VLLMClientError, GracefulHTTPError, ValueError) as error:  # vLLM also raises bare ValueErrors
        raise _refusal(error) from error


def _result(answer: Any, body: dict[str, Any]) -> Any:
    """What vLLM answered. Raises ApiError where it is an error."""
    if isinstance(answer, ErrorResponse):
        raise _from_response(answer, body)
    return answer


def _refusal(error: Exception) -> ApiError:
    """vLLM's complaint about a request, one line of it."""
    if isinstance(error, GracefulHTTPError):
        return unavailable("the engine's queue is full; try again later")
    return bad_request(_line(str(error)), getattr(error, "parameter", None))


def _from_response(answer: ErrorResponse, body: dict[str, Any]) -> ApiError:
    error = answer.error
    if error.code == 404:
        return model_not_found(body.get("model"))
    if error.code >= 500:
        return (
            unavailable("the engine could not take this request; try again later")
            if error.code == 503
            else internal_error()
        )
    return ApiError(error.code, _line(error.message), param=error.param)


def _line(message: str) -> str:
    return message.strip().splitlines()[0] if message.strip() else "the request is not valid"
