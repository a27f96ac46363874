"""Gangs, seeds and states of prompts in vLLM's model runner: four of its methods, each wrapped.

Seeded requests draw from a generator that is set anew for each token from (seed, position): the noise does not depend
on how the prompt was cut, on preemption, or on what else is in the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from server.engine.compat.mixing import Mixer
from server.engine.gang import NOTE, STATE


class PositionedGenerator(torch.Generator):
    """A generator that is set anew for every token: nothing to rewind when vLLM discards a draw (on a CPU it could
    not)."""

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        return self


def _seed_rows(runner: Any) -> None:
    """Set the generator of every seeded row from its seed and its position in the output."""
    batch = runner.input_batch
    for row, generator in batch.generators.items():
        request = runner.requests[batch.req_ids[row]]
        if not isinstance(generator, PositionedGenerator):
            generator = batch.generators[row] = request.generator = PositionedGenerator(device=generator.device)
        generator.manual_seed(token_seed(request.sampling_params.seed, len(request.output_token_ids)))


def token_seed(seed: int, position: int) -> int:
    """A 63-bit hash (SplitMix64's finaliser) of a request's seed and a position in its output."""
    x = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 1) % 2**64
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) % 2**64
    return (x ^ x >> 31) >> 1


def mixer_of(runner: Any) -> Mixer:
    """The runner's mixer, made when it is first asked for."""
    if not hasattr(runner, "posterior_mixer"):
        runner.posterior_mixer = Mixer()
    found: Mixer = runner.posterior_mixer
    return found


def _sample_tokens(original: Any) -> Any:
    """The step, with the mixture in each leader's row before it and the gangs' notes on what it gives."""

    def mixed(self: Any, grammar_output: Any) -> Any:
        state = self.execute_model_state
        if state is None or state.logits is None:
            return original(self, grammar_output)
        mixer = mixer_of(self)
        self.execute_model_state = state._replace(logits=mixer.before(self, state.logits))
        states = _states(self, state.sample_hidden_states)
        output = original(self, grammar_output)
        if mixer.notes or states:
            setattr(output, NOTE, mixer.notes | states)
        return output

    return mixed


def _states(runner: Any, hidden: Tensor) -> dict[str, dict[str, Any]]:
    """A note for each request that asks for its state and whose prompt this step ends; hidden [rows, d], whose rows are
    those of the logits."""
    found = {}
    for row, request_id in enumerate(runner.input_batch.req_ids):
        params = runner.requests[request_id].sampling_params
        key = ((params and params.extra_args) or {}).get(STATE)
        if key is not None and not runner.discard_request_mask.np[row]:
            found[request_id] = {"key": key, "state": hidden[row].float().cpu().numpy().tobytes()}
    return found


def _sample(original: Any) -> Any:
    """The draw, from generators set for this position, then handed to the siblings."""

    def shared(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        _seed_rows(self)
        output = original(self, logits, spec_decode_metadata)
        mixer_of(self).after(output.sampled_token_ids)
        return output

    return shared


def _on_request_state_removed(original: Any) -> Any:
    """The end of a request, which the mixer too forgets."""

    def forgotten(self: Any, req_id: str, req_state: Any) -> None:
        original(self, req_id, req_state)
        mixer_of(self).forget(req_id)

    return forgotten


def _get_prompt_logprobs_dict(original: Any) -> Any:
    """The prompts' log-probabilities: vLLM's of plain requests, ours of gangs."""

    def scored(self: Any, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        mixer = mixer_of(self)
        results = mixer.score_prompts(self, hidden_states, num_scheduled_tokens)
        waiting = {k: v for k, v in self.num_prompt_logprobs.items() if k in mixer.gangs}
        for leader in waiting:
            del self.num_prompt_logprobs[leader]
        results |= original(self, hidden_states, num_scheduled_tokens)
        self.num_prompt_logprobs |= waiting
        return results

    return scored


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "sample_tokens": _sample_tokens,
    "_get_prompt_logprobs_dict": _get_prompt_logprobs_dict,
    "_sample": _sample,
    "_on_request_state_removed": _on_request_state_removed,
}


def install() -> None:
    """Let every GPUModelRunner (the CPU's is one) of this process mix gangs."""
    for name, wrapped in WRAPPED.items():
        original = getattr(GPUModelRunner, name)
        setattr(GPUModelRunner, name, functools.wraps(original)(wrapped(original)))
