"""What is changed in vLLM, from outside, in the process that samples: gangs are mixed, and a fault is fixed.

When a batch holds a row that asks for `logprob_token_ids` (a candidate score of ours) and a row that asks for plain
`logprobs`, `Sampler.forward` returns only the tensors of the first kind: the plain row receives padding. Here every
plain row is given the ids of its own most probable tokens, so that the one gather serves both.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.sample import sampler
from vllm.v1.sample.sampler import Sampler

from server.engine.compat import contract, cpu_lora, runner
from server.engine.compat.blocks import Group, groups_of

COUNT = "batched_count_greater_than"  # the ranks of log-probabilities


def with_plain_rows(
    logits: torch.Tensor, logprob_token_ids: dict[int, list[int]], num_logprobs: int
) -> dict[int, list[int]]:
    """`logprob_token_ids` plus the `num_logprobs` most probable tokens of every other row of `logits` [rows, words]."""
    plain = [row for row in range(logits.shape[0]) if row not in logprob_token_ids]
    top = logits[plain].topk(num_logprobs, dim=-1).indices.tolist()
    return {**logprob_token_ids, **dict(zip(plain, top, strict=True))}


def _fixed(original: Any) -> Any:
    """`Sampler.forward` with the plain rows' own ids beside those that were asked for."""

    @functools.wraps(original)
    def forward(self: Sampler, logits: torch.Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        specific, plain = sampling_metadata.logprob_token_ids, sampling_metadata.max_num_logprobs
        if specific and plain is not None and plain > 0:  # the metadata outlives the step: copy, never change it
            ids = with_plain_rows(logits, specific, plain)
            sampling_metadata = dataclasses.replace(sampling_metadata, logprob_token_ids=ids)
        return original(self, logits, sampling_metadata, *args, **kwargs)

    return forward


def install() -> None:
    """Change vLLM in this process: gangs are mixed, LoRA on a CPU has our products, the sampler is fixed.

    Raises PosteriorError for a vLLM that was not tested.
    """
    contract.check_version()
    runner.install()
    cpu_lora.install()
    Sampler.forward = _fixed(Sampler.forward)  # type: ignore[method-assign]
    if current_platform.is_cpu():  # compiled, it makes the first log-probabilities wait 23 s for a C++ compiler
        setattr(sampler, COUNT, inspect.unwrap(getattr(sampler, COUNT)))


class WorkerExtension:
    """Named in vLLM's `worker_extension_cls`: importing this module in a worker installs the changes."""

    model_runner: Any
    vllm_config: Any

    def kv_groups(self) -> list[Group]:
        """The groups of the KV cache, which vLLM does not send to the front end."""
        return groups_of(self.model_runner.kv_cache_config, self.vllm_config)


install()
