"""vLLM's real scheduler and our mixer around a language model that is a hash: gangs in milliseconds, under any
pressure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.engine.config import set_environment

set_environment("cpu")  # before vLLM, as the server does

from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.sampling_params import SamplingParams, StructuredOutputsParams  # noqa: E402
from vllm.utils.hashing import sha256  # noqa: E402
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec  # noqa: E402
from vllm.v1.outputs import ModelRunnerOutput  # noqa: E402
from vllm.v1.request import Request, RequestStatus  # noqa: E402
from vllm.v1.structured_output import StructuredOutputManager  # noqa: E402

from posterior.predictive.decoding import Mixing  # noqa: E402
from server.engine import Adapter  # noqa: E402
from server.engine.compat.client import MixingLLM  # noqa: E402, F401
from server.engine.compat.mixing import Mixer  # noqa: E402
from server.engine.compat.runner import token_seed  # noqa: E402, F401
from server.engine.compat.scheduler import GangScheduler  # noqa: E402
from server.engine.gang import NOTE, Trace  # noqa: E402

VOCABULARY = 23
BLOCK = 4


def logits_of(adapter: str, tokens: Sequence[int]) -> Tensor:
    """Logits [V] of the next token after `tokens` under `adapter`."""
    digest = hashlib.sha256(f"{adapter}|{','.join(map(str, tokens))}".encode()).digest()
    return 3 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))


def alone(
    adapters: Sequence[str], weights: Sequence[float], mixing: Mixing, prompt: list[int], tokens: int
) -> list[int]:
    """The greedy text of the mixture by brute force."""
    w = torch.tensor(weights, dtype=torch.float64)
    w = w / w.sum()
    text: list[int] = []
    for _ in range(tokens):
        p = torch.stack([logits_of(adapter, prompt + text).double().softmax(0) for adapter in adapters])
        text.append(int((w @ p).argmax()))
        if mixing == "sequence":
            w = w * p[:, text[-1]]
            w = w / w.sum()
    return text


def make_scheduler(
    model: Path,
    *,
    blocks: int,
    sequences: int,
    batched_tokens: int,
    loras: int,
    chunked: bool = True,
    second: tuple[int | None] | None = None,
) -> GangScheduler:
    """`second`: the window of a second group of layers, (None,) for one of all tokens."""
    args = EngineArgs(
        model=str(model), block_size=32, max_num_seqs=sequences, max_num_batched_tokens=batched_tokens,
        max_model_len=64, enable_lora=True, max_loras=loras, max_lora_rank=8, async_scheduling=False,
        enable_chunked_prefill=chunked, enable_prefix_caching=True, enforce_eager=True,
    )  # fmt: skip
    config = args.create_engine_config()
    config.cache_config.num_gpu_blocks = blocks
    config.cache_config.block_size = BLOCK
    init_none_hash(sha256)
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    groups = [KVCacheGroupSpec(["layer"], spec)]
    if second is not None:
        sizes: dict[str, Any] = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
        window = second[0]
        more = FullAttentionSpec(**sizes) if window is None else SlidingWindowSpec(**sizes, sliding_window=window)
        groups.append(KVCacheGroupSpec(["another"], more))
    cache = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
    return GangScheduler(
        vllm_config=config, kv_cache_config=cache, structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK, log_stats=False,
    )  # fmt: skip


@dataclass
class Runner:
    """What the mixer sees of vLLM's model runner, with `logits_of` for a model. `fault` may change a sibling's
    token."""

    fault: Callable[[str, int], int] = lambda request_id, token: token
    requests: dict[str, Any] = field(default_factory=dict)
    mixer: Mixer = field(default_factory=Mixer)

    def step(self, scheduled: Any) -> ModelRunnerOutput:
        for request_id in scheduled.finished_req_ids:
            self.requests.pop(request_id, None)
            self.mixer.forget(request_id)
        for new in scheduled.scheduled_new_reqs:
            self.requests[new.req_id] = SimpleNamespace(
                sampling_params=new.sampling_params, tokens=list(new.prompt_token_ids),
                computed=new.num_computed_tokens, adapter=new.lora_request.lora_name if new.lora_request else "base",
            )  # fmt: skip
        cached = scheduled.scheduled_cached_reqs
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self.requests[request_id].computed = computed
        ids = sorted(
            scheduled.num_scheduled_tokens, key=lambda i: hashlib.md5(i.encode()).digest()
        )  # any order will do
        states = [self.requests[i] for i in ids]
        reach = [state.computed + scheduled.num_scheduled_tokens[i] for i, state in zip(ids, states, strict=True)]
        length = [len(state.tokens) for state in states]
        self.input_batch = SimpleNamespace(req_ids=ids, num_tokens_no_spec=np.array(length))
        mask = np.array([r < n for r, n in zip(reach, length, strict=True)], dtype=bool)
        self.discard_request_mask = SimpleNamespace(np=mask)
        sampled: list[list[int]] = []
        if ids:
            logits = torch.stack([logits_of(s.adapter, s.tokens[:r]) for s, r in zip(states, reach, strict=True)])
            drawn = self.mixer.before(self, logits).argmax(1, keepdim=True).int()
            self.mixer.after(drawn)
            sampled = [[] if mask[row] else [self.fault(i, token)] for row, (i, token) in enumerate(
                zip(ids, drawn[:, 0].tolist(), strict=True))]  # fmt: skip
        for state, new_tokens in zip(states, sampled, strict=True):
            state.tokens += new_tokens
        output = ModelRunnerOutput(
            req_ids=ids, req_id_to_index={i: row for row, i in enumerate(ids)}, sampled_token_ids=sampled
        )
        setattr(output, NOTE, self.mixer.notes if ids else {})
        return output


@dataclass
class Written:
    """A request as its client sees it."""

    tokens: list[int] = field(default_factory=list)
    notes: int = 0
    resumed: int = 0
    finished: bool = False
    admitted: int | None = None  # step of its first token


class Engine:
    """Scheduler and runner in a loop, as vLLM's engine core runs them."""

    def __init__(self, scheduler: GangScheduler, runner: Runner | None = None) -> None:
        self.scheduler, self.runner = scheduler, runner or Runner()
        self.written: dict[str, Written] = {}
        self.steps = 0
        self.hasher = get_request_block_hasher(BLOCK, sha256)

    def add(
        self,
        name: str,
        prompt: list[int],
        tokens: int,
        trace: Trace | None = None,
        lora: Adapter | None = None,
        structured: bool = False,
    ) -> None:
        if trace is not None:
            lora = trace.adapters[0]
        params = SamplingParams(
            max_tokens=tokens,
            temperature=0,
            ignore_eos=True,
            extra_args=trace.extra_args(name) if trace else None,
            structured_outputs=StructuredOutputsParams(regex=".*") if structured else None,
        )
        request = Request(
            request_id=name, prompt_token_ids=prompt, sampling_params=params, pooling_params=None,
            arrival_time=float(len(self.written)), block_hasher=self.hasher,
            lora_request=LoRARequest(lora.name, lora.number, str(lora.path)) if lora else None,
        )  # fmt: skip
        self.written[name] = Written()
        self.scheduler.add_request(request)

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self.written[name].finished = True

    def step(self) -> None:
        self.steps += 1
        scheduled = self.scheduler.schedule()
        outputs = self.scheduler.update_from_output(scheduled, self.runner.step(scheduled))
        for client in outputs.values():
            for output in client.outputs:
                written = self.written[output.request_id]
                written.tokens += output.new_token_ids
                written.finished |= output.finish_reason is not None
                note = (output.kv_transfer_params or {}).get(NOTE)
                if note is not None:
                    written.notes += 1
                    written.resumed += note["resumed"]
                if written.admitted is None and output.new_token_ids:
                    written.admitted = self.steps
        self._check()

    def _check(self) -> None:
        """What must hold after every step."""
        scheduler = self.scheduler
        live = {member.request_id for members in scheduler.gangs.values() for member in members}
        assert live == set(scheduler._leaders) and live <= set(scheduler.requests)
        for members in scheduler.gangs.values():
            assert len({tuple(member.all_token_ids) for member in members}) == 1, "siblings agree after every step"

    def run(self, limit: int = 3000) -> None:
        while any(not written.finished for written in self.written.values()):
            assert self.steps < limit, "a request hangs"
            self.step()
        self.step()  # tells the runner who finished last

    def assert_nothing_left(self) -> None:
        scheduler = self.scheduler
        assert not scheduler.requests and not scheduler.running and not scheduler.waiting
        assert not scheduler.gangs and not scheduler._leaders and not scheduler._broken and not scheduler._resumed
        assert not self.runner.requests and not self.runner.mixer.gangs and not self.runner.mixer._members
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "every KV block is free again"
