"""vLLM's engine as its serving classes see it, with the one difference that a request may be a gang."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from server.engine.compat.blocks import Group, longest, needed
from server.engine.gang import CURRENT, MAX_SCORED, NOTE, Text, Trace
from server.errors import Refused


class MixingLLM(AsyncLLM):
    """AsyncLLM whose `generate` makes a gang of a request when a Trace is `CURRENT`, and fills in that Trace.

    states: those of prompts, by the key in a request's `extra_args`, for whoever put the key there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.groups: list[Group] = []  # of the KV cache; set when the engine runs
        self._texts: dict[str, tuple[Trace, list[Text]]] = {}  # by the key of `extra_args`
        self.states: dict[str, bytes] = {}  # by the key of `extra_args`: empty until the note has come
        self._process_outputs = self.output_processor.process_outputs
        self.output_processor.process_outputs = self._take_notes  # type: ignore[method-assign]

    def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        lora_request: LoRARequest | None = None,
        **kwargs: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of a request, of a gang if there is a trace. Raises Refused for a gang that can never fit."""
        trace = CURRENT.get()
        if trace is None:
            return super().generate(prompt, sampling_params, request_id, lora_request=lora_request, **kwargs)
        self._fit(trace, len(prompt["prompt_token_ids"]), sampling_params)
        key = uuid.uuid4().hex  # request ids are the client's to choose, so they may repeat
        sampling_params.extra_args = {**(sampling_params.extra_args or {}), **trace.extra_args(key)}
        texts = [Text(context=prompt["prompt_token_ids"]) for _ in range(sampling_params.n)]
        trace.texts.append(texts)
        first = trace.adapters[0]
        lora = None if first is None else LoRARequest(first.name, first.number, str(first.path))
        outputs = super().generate(prompt, sampling_params, request_id, lora_request=lora, **kwargs)
        return self._traced(outputs, key, trace, texts, sampling_params.output_kind)

    async def _traced(
        self,
        outputs: AsyncGenerator[RequestOutput, None],
        key: str,
        trace: Trace,
        texts: list[Text],
        kind: RequestOutputKind,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The same outputs, while the notes of this gang go to `texts`; keeps what has been delivered."""
        self._texts[key] = (trace, texts)
        try:
            async for output in outputs:
                for part in output.outputs:
                    text = texts[part.index]
                    if kind != RequestOutputKind.DELTA:
                        text.tokens.clear()
                    text.tokens += part.token_ids
                yield output
        finally:
            await outputs.aclose()
            del self._texts[key]

    def _fit(self, trace: Trace, prompt_tokens: int, params: SamplingParams) -> None:
        """Refuse, or (when the client left the length to us) shorten, what K times the KV cache cannot hold."""
        scheduler = self.vllm_config.scheduler_config
        k = len(trace.adapters)
        blocks = (self.vllm_config.cache_config.num_gpu_blocks or 1) - 1  # vLLM keeps one for itself
        room = longest(self.groups, blocks // k, self.vllm_config.model_config.max_model_len) - prompt_tokens
        if k > scheduler.max_num_seqs:
            raise Refused(
                f"{k} particles need {k} sequences in one batch; this server has {scheduler.max_num_seqs}: "
                "ask for fewer 'particles', or start it with a larger --max-num-seqs",
                "uncertainty.particles",
            )
        wanted = params.max_tokens or 1
        if room < 1 or (trace.explicit and wanted > room):
            raise Refused(
                f"{k} particles x ({prompt_tokens} prompt + {wanted} new tokens) need "
                f"{k * needed(self.groups, prompt_tokens + wanted)} blocks; the KV cache has {blocks}: "
                "ask for fewer tokens or 'particles'",
                "max_tokens",
            )
        if params.prompt_logprobs is not None and k * prompt_tokens > MAX_SCORED:
            raise Refused(
                f"{k} particles x {prompt_tokens} tokens of an echoed prompt are {k * prompt_tokens}; at most "
                f"{MAX_SCORED} are scored: send a shorter prompt, or ask for fewer 'particles'",
                "echo",
            )
        params.max_tokens = min(wanted, room)

    def _take_notes(self, engine_core_outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        """What vLLM makes of the engine's outputs, after each gang's notes have been moved from them to its texts."""
        for output in engine_core_outputs:
            note = (output.kv_transfer_params or {}).get(NOTE)
            state = self.output_processor.request_states.get(output.request_id)
            if note is not None:
                output.kv_transfer_params = None
            if note is not None and note["key"] in self.states:
                self.states[note["key"]] = note["state"]
            if note is not None and state is not None and note["key"] in self._texts:
                trace, texts = self._texts[note["key"]]
                texts[state.request_index].rows.append(note["row"])
                texts[state.request_index].prompt += note.get("prompt", [])
                trace.resumed += note["resumed"]
        return self._process_outputs(engine_core_outputs, *args, **kwargs)
