"""vLLM's engine and its serving classes, started as vLLM's own server starts them, with our differences."""

from __future__ import annotations

import contextlib
import logging
import os
from argparse import Namespace
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

from prometheus_client import REGISTRY
from vllm.config import CompilationMode, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.tool_parsers import ToolParserManager
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.metrics.loggers import PrometheusStatLogger

from server.engine.compat.client import MixingLLM
from server.engine.config import EngineConfig


def start_llm(config: EngineConfig) -> tuple[MixingLLM, Namespace]:
    """The running engine, and vLLM's command line that it was started with.

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
        llm = MixingLLM.from_vllm_config(engine_config, usage_context=UsageContext.OPENAI_API_SERVER)
    _bound_series(llm)
    return cast(MixingLLM, llm), args


async def serving_classes(llm: MixingLLM, args: Namespace) -> Any:
    """vLLM's serving classes over `llm`, by the names that vLLM's own application gives them."""
    state: Any = SimpleNamespace()
    await init_app_state(llm, state, args, await llm.get_supported_tasks())
    llm.groups = [tuple(group) for group in (await llm.collective_rpc("kv_groups"))[0]]
    return state


def _bound_series(llm: AsyncLLM) -> None:
    """Switch off vLLM's metric that gets one more series for each combination of adapters that ever ran together: with
    K particles there is no end to them, neither in this process nor in Prometheus."""
    for logger in llm.logger_manager.stat_loggers if llm.logger_manager else ():
        if isinstance(logger, PrometheusStatLogger) and logger.gauge_lora_info is not None:
            REGISTRY.unregister(logger.gauge_lora_info)
            logger.gauge_lora_info = None


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
