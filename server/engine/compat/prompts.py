"""Prompts scored under the mixture, or texts after them: teacher forcing by all particles at once.

vLLM scores a prompt while it reads it, request by request, so it cannot mix. Here the hidden states [T, d] of the K
members are kept until all have read the prompt. Then, some positions at a time, the K distributions are computed and
mixed, and only what was asked for is kept. The text counts as drawn from the mixture from its first token on: under
sequence mixing the weights start as the posterior's and follow it. Generation then starts from the posterior's weights
again: the prompt is given, not drawn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors

from server.engine.distributions import mix

NUMBERS = 2**24  # of the particles' logits held at a time: positions x particles x vocabulary


class PromptStates:
    """Hidden states of the prompts being read, by leader and particle: pieces in order, and how many positions they
    hold."""

    def __init__(self) -> None:
        self._pieces: dict[str, dict[int, list[Tensor]]] = {}

    def take(self, leader: str, particle: int, start: int, states: Tensor) -> None:
        """Add `states` [n, d] of positions from `start` on. Reading from 0 again (after a preemption) begins anew."""
        pieces = self._pieces.setdefault(leader, {}).setdefault(particle, [])
        if start == 0:
            pieces.clear()
        known = sum(map(len, pieces))
        pieces.append(states[known - start :].clone())

    def pop(self, leader: str) -> list[Tensor]:
        """[T - 1, d] of each particle, in order."""
        found = self._pieces.pop(leader, {})
        return [torch.cat(found[k]) for k in sorted(found)]

    def forget(self, leader: str) -> None:
        """Drop the states of a gang that has ended."""
        self._pieces.pop(leader, None)


@torch.inference_mode()
def score(
    runner: Any, hidden: list[Tensor], tokens: list[int], log_weights: Tensor, sequence: bool, top: int
) -> tuple[LogprobsTensors, list[list[float]]]:
    """vLLM's prompt log-probabilities (the token's and the `top` best, of the mixture), and a row [log p_1 .. log
    p_K, total, aleatoric] per token; for tokens[1:], from hidden states [T - 1, d] of each particle."""
    count = len(tokens) - 1
    result = LogprobsTensors.empty_cpu(count, top + 1)
    rows: list[list[float]] = []
    if count == 0:  # the first token of a text has no distribution to be scored under
        return result, rows
    target = torch.tensor(tokens[1:], device=log_weights.device)
    chunk = max(1, NUMBERS // (len(hidden) * runner.model_config.get_vocab_size()))
    for part in (slice(begin, begin + chunk) for begin in range(0, count, chunk)):
        logits = torch.stack([runner.model.compute_logits(states[part]).float() for states in hidden], 1)  # [c, K, V]
        index = target[part].to(logits.device)
        log_p = logits.log_softmax(-1)
        chosen = log_p.gather(2, index[:, None, None].expand(-1, len(hidden), 1))[..., 0].double().cpu()  # [c, K]
        gained = chosen.cumsum(0) if sequence else torch.zeros_like(chosen)
        before = torch.cat([torch.zeros_like(gained[:1]), gained[:-1]])
        mixture, _, entropies = mix(logits, (log_weights + before).log_softmax(1))
        ids, logprobs, ranks, *_ = runner.sampler.gather_logprobs(mixture, top, index)
        result.logprob_token_ids[part].copy_(ids)
        result.logprobs[part].copy_(logprobs)
        result.selected_token_ranks[part].copy_(ranks)
        rows += torch.cat([chosen, entropies.double().cpu()], 1).tolist()
        log_weights = (log_weights + gained[-1]).log_softmax(0)
    return result, rows
