"""Mixing in the process that samples: K rows of logits, one per particle, become the posterior predictive of one token.

For each gang whose K rows all stand at the same position:
- before anything else of vLLM's sampling the leader's row is replaced by log sum_k w_k p_k, the mixture. So grammar
  masks, allowed and forbidden tokens, penalties, temperature, top-k, top-p, min-p and log-probabilities all act on
  the mixture as on any one model's distribution;
- after it every sibling's row is given the leader's token, and the particles' weights are updated (posterior.decoding).
Rows of a gang that is not complete in this step are discarded, as vLLM discards those of a prompt read in part.

State: K numbers a gang, dropped with the leader; logits [gangs, K, vocabulary] only within a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.engine.compat.prompts import PromptStates, score
from server.engine.distributions import mix
from server.engine.gang import GIVEN, LEADER, SIBLING


@dataclass
class Gang:
    """The weights of a gang: `log_weights` [K] float64 on the CPU, normalised, of the next token, `start` of the first;
    `sequence`: whether tokens update them; `given`: how many tokens of a prompt that is scored stand before those that
    are."""

    start: Tensor
    log_weights: Tensor
    sequence: bool
    given: int


@dataclass
class Step:
    """The complete gangs of one step that have the same K; rows [G, K] of the batch, the leader's first."""

    leaders: list[str]
    rows: Tensor
    logits: Tensor  # [G, K, V]
    log_z: Tensor  # [G, K], log sum_v exp(logits)
    entropies: Tensor  # [G, 2]: total and aleatoric, nats


class Mixer:
    """The gangs of one model runner."""

    def __init__(self) -> None:
        self.gangs: dict[str, Gang] = {}
        self._members: dict[str, tuple[str, int] | None] = {}  # (leader, number of the particle) by request id
        self._steps: list[Step] = []
        self.notes: dict[
            str, dict[str, Any]
        ] = {}  # by leader: {"row": log p_1 .. log p_K of the step's token, entropies}
        self.prompts = PromptStates()

    def before(self, runner: Any, logits: Tensor) -> Tensor:
        """Logits [rows, V] with the mixture in each complete gang's leader's row; float32 if there is any."""
        found: dict[str, dict[int, int]] = {}
        for row, request_id in enumerate(runner.input_batch.req_ids):
            member = self._member(runner, request_id)
            if member is not None:
                found.setdefault(member[0], {})[member[1]] = row
        complete: dict[int, list[tuple[str, list[int]]]] = {}
        for leader, rows in found.items():
            if self._is_complete(runner, leader, rows):
                complete.setdefault(len(rows), []).append((leader, [rows[k] for k in sorted(rows)]))
            else:
                runner.discard_request_mask.np[list(rows.values())] = True
        self._steps, self.notes = [], {}
        given = logits
        if complete:
            logits = logits.float()
        for group in complete.values():
            leaders, members = [leader for leader, _ in group], [each for _, each in group]
            index = torch.tensor(members, device=logits.device)
            log_weights = torch.stack([self.gangs[leader].log_weights for leader in leaders])
            particles = _copied(given, members)
            mixture, log_z, entropies = mix(particles, log_weights)
            logits[index[:, 0]] = mixture
            self._steps.append(Step(leaders, index, particles, log_z, entropies))
        return logits

    def _member(self, runner: Any, request_id: str) -> tuple[str, int] | None:
        """(leader, number of the particle) of a request; None for one that is in no gang. A leader is noted."""
        if request_id not in self._members:
            params = runner.requests[request_id].sampling_params
            extra = (params and params.extra_args) or {}
            if LEADER in extra:
                weights = torch.tensor(extra[LEADER]["weights"], dtype=torch.float64)
                start = (weights / weights.sum()).log()
                self.gangs[request_id] = Gang(start, start, extra[LEADER]["mixing"] == "sequence", extra.get(GIVEN, 1))
                self._members[request_id] = (request_id, 0)
            else:
                self._members[request_id] = tuple(extra[SIBLING]) if SIBLING in extra else None
        return self._members[request_id]

    def _is_complete(self, runner: Any, leader: str, rows: dict[int, int]) -> bool:
        """Whether all K rows are in this step, at the same position, and none is to be discarded."""
        batch, gang = runner.input_batch, self.gangs.get(leader)
        if gang is None or len(rows) != len(gang.log_weights):
            return False
        positions = {int(batch.num_tokens_no_spec[row]) for row in rows.values()}
        return len(positions) == 1 and not any(runner.discard_request_mask.np[list(rows.values())])

    def after(self, sampled: Tensor) -> None:
        """Give siblings their leader's token, in place in `sampled` [rows, 1], and update the weights."""
        for step in self._steps:
            tokens = sampled[step.rows[:, 0]]  # [G, 1]
            sampled[step.rows] = tokens[:, None]
            chosen = (
                step.logits.gather(2, tokens.long()[:, None].expand(-1, step.rows.shape[1], 1))[..., 0] - step.log_z
            )
            self.notes |= {
                leader: {"row": [*log_p, *entropies]}
                for leader, log_p, entropies in zip(step.leaders, chosen.tolist(), step.entropies.tolist(), strict=True)
            }
            for leader, log_p in zip(step.leaders, chosen.double().cpu(), strict=True):
                gang = self.gangs[leader]
                if gang.sequence:
                    gang.log_weights = (gang.log_weights + log_p).log_softmax(0)
        self._steps = []

    def score_prompts(self, runner: Any, hidden: Tensor, scheduled: Mapping[str, int]) -> dict[str, Any]:
        """Prompt log-probabilities of the gangs whose prompt has been read by all; keeps the states of the others.

        hidden [tokens of the step, d]. Takes those gangs out of `runner.num_prompt_logprobs` for good.
        """
        asked = {leader: top for leader, top in runner.num_prompt_logprobs.items() if leader in self.gangs}
        for row, request_id in enumerate(runner.input_batch.req_ids):
            leader, particle = self._members.get(request_id) or ("", 0)
            if leader in asked:
                start = runner.requests[request_id].num_computed_tokens
                last = len(runner.requests[leader].prompt_token_ids) - 1  # after it comes the first new token
                count = min(scheduled[request_id], last - start)
                if count > 0:
                    offset = int(runner.query_start_loc.np[row])
                    self.prompts.take(leader, particle, start, hidden[offset : offset + count])
        results = {}
        for leader, top in asked.items():
            if leader in self.notes:
                del runner.num_prompt_logprobs[leader]
                gang, before = self.gangs[leader], self.gangs[leader].given - 1
                tokens = runner.requests[leader].prompt_token_ids[before:]
                states = [each[before:] for each in self.prompts.pop(leader)]
                results[leader], rows = score(runner, states, tokens, gang.start, gang.sequence, top)
                self.notes[leader]["prompt"] = rows
        return results

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a request that has ended."""
        self.prompts.forget(request_id)
        self._members.pop(request_id, None)
        self.gangs.pop(request_id, None)


def _copied(logits: Tensor, rows: list[list[int]]) -> Tensor:
    """These rows [G, K] of logits [rows, V] as a new float32 [G, K, V]; in one pass where they are all there are, in
    order."""
    if [row for members in rows for row in members] == list(range(len(logits))):
        return logits.view(len(rows), -1, logits.shape[1]).to(torch.float32, copy=True)
    return logits[torch.tensor(rows, device=logits.device)].float()
