"""vLLM's scheduler with gangs: K requests that are admitted, preempted, resumed, finished and aborted as one.

Correctness does not rest on scheduling. The sampler keeps a token only when all K rows of a gang stand at the same
position in the same step; otherwise it discards theirs, and here they step back by one token and try again. What
scheduling adds is that this is rare, and that nobody waits for ever:
- requests are admitted strictly in order of arrival, a gang only when all of it fits: whatever comes after one that
  does not fit waits too. So a request waits for those that came before it and for nothing else, be it plain or a
  gang;
- when vLLM preempts one member, the rest follows in the next step, before anything is scheduled;
- should members ever disagree about the text, the leader's, which the client has, stands: the others start again from
  it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from server.engine.compat.blocks import groups_of, needed
from server.engine.gang import LEADER, NOTE, SIBLING
from server.engine.orphan import die_with_parent


class GangScheduler(Scheduler):
    """`gangs` has the members of each gang by its leader's id, the leader first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        die_with_parent()
        super().__init__(*args, **kwargs)
        if self.has_mamba_layers:
            raise ValueError("a mixture of particles needs attention layers only: a recurrent state cannot step back")
        self.gangs: dict[str, list[Request]] = {}
        self._leaders: dict[str, str] = {}  # of every member's id, the leader's own included
        self._broken: set[str] = set()  # leaders of gangs with a member preempted since the last step
        self._resumed: Counter[str] = Counter()
        self._groups = groups_of(self.kv_cache_config, self.vllm_config)

    # Joining and leaving

    def add_request(self, request: Request) -> None:
        """Take a request in; with a leader come its siblings."""
        super().add_request(request)
        gang = _gang(request)
        if gang:
            self.gangs[request.request_id] = members = [request]
            self._leaders[request.request_id] = request.request_id
            for number in range(1, len(gang["adapters"])):
                members.append(self._sibling(request, number))
                super().add_request(members[-1])

    def _sibling(self, leader: Request, number: int, generation: int = 0) -> Request:
        """Particle `number` of the gang, from the text as far as the leader has it. It neither stops nor shows by
        itself."""
        name, adapter, path = _gang(leader)["adapters"][number]
        sibling = Request(
            request_id=f"{SIBLING}:{leader.request_id}:{number}.{generation}",
            prompt_token_ids=list(leader.all_token_ids),
            sampling_params=SamplingParams(
                max_tokens=self.max_model_len,
                temperature=0.0,
                ignore_eos=True,
                detokenize=False,
                extra_args={SIBLING: [leader.request_id, number]},
                skip_reading_prefix_cache=leader.skip_reading_prefix_cache,  # a prompt to be scored must be read
            ),
            pooling_params=None,
            client_index=leader.client_index,
            arrival_time=leader.arrival_time,
            lora_request=LoRARequest(name, adapter, path),
            cache_salt=leader.cache_salt,
            priority=leader.priority,
            block_hasher=leader._block_hasher,
        )
        self._leaders[sibling.request_id] = leader.request_id
        return sibling

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """The requests that were ended; siblings end with their leader (see `_free_request`) and only so."""
        if isinstance(request_ids, str):
            request_ids = [request_ids]
        ids = list(self.requests) if request_ids is None else list(request_ids)
        visible = [request_id for request_id in ids if self._leaders.get(request_id, request_id) == request_id]
        return super().finish_requests(visible, finished_status)

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        leader = self._leaders.pop(request.request_id, None)
        if leader == request.request_id:
            siblings = [member.request_id for member in self.gangs.pop(leader)[1:]]
            self._broken.discard(leader)
            self._resumed.pop(leader, None)
            super().finish_requests(siblings, RequestStatus.FINISHED_ABORTED)
        return super()._free_request(request, delay_free_blocks)

    # Before a step

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """The next step, in which gangs are admitted whole and what is left of a broken one is preempted."""
        if not self.gangs:
            return super().schedule(throttle_prefills)
        self._preempt_broken()
        held = self._held()
        self.waiting.remove_requests(held)
        try:
            return super().schedule(throttle_prefills)
        finally:
            for request in held:
                self.waiting.add_request(request)

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        super()._preempt_request(request, timestamp, drop_stale_output)
        if request.request_id in self._leaders:
            self._broken.add(self._leaders[request.request_id])

    def _preempt_broken(self) -> None:
        """Preempt what still runs of a gang that lost a member; its members then stand together at the queue's head."""
        for request in reversed(list(self.running)):
            if self._leaders.get(request.request_id) in self._broken:
                self.running.remove(request)
                super()._preempt_request(request, time.monotonic())
        self._broken.clear()

    def _held(self) -> list[Request]:
        """The waiting requests that may not be admitted in this step: those from the first on that does not fit, and
        the siblings of a leader whose grammar is still being compiled."""
        slots, blocks = self.max_num_running_reqs - len(self.running), self._spare_blocks()
        loras = {request.lora_request.lora_int_id for request in self.running if request.lora_request}
        running = {self._leaders.get(request.request_id) for request in self.running}
        admitted: set[str] = set()
        queue = list(self.waiting)
        held: list[Request] = []
        for position, request in enumerate(queue):
            leader = self._leaders.get(request.request_id, request.request_id)
            members = self.gangs.get(leader, [request])
            if leader not in admitted:
                new = [member for member in members if member.status != RequestStatus.RUNNING]
                slots -= len(new)
                blocks -= sum(needed(self._groups, member.num_tokens + 1) for member in new)
                loras |= {member.lora_request.lora_int_id for member in new if member.lora_request}
                fits = slots >= 0 and blocks >= 0 and (not self.lora_config or len(loras) <= self.lora_config.max_loras)
                if not fits and leader not in running and (self.running or admitted):
                    return [*held, *queue[position:]]
                admitted.add(leader)
            if members[0] is not request and self._is_blocked_waiting_status(members[0].status):
                held.append(request)
        return held

    def _spare_blocks(self) -> int:
        """KV blocks that are free and that no running request needs for its next token."""
        free: int = self.kv_cache_manager.block_pool.get_num_free_blocks()
        for request in self.running:
            owned = self.kv_cache_manager.get_block_ids(request.request_id)
            for (size, _), ids in zip(self._groups, owned, strict=True):
                free -= max(0, cdiv(request.num_tokens + 1, size) - len(ids))
        return free

    # After a step

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """What clients get of a step: nothing of siblings, and the notes on the outputs of leaders and of prompts whose
        state is asked for."""
        stepped = {self._leaders[i] for i in scheduler_output.num_scheduled_tokens if i in self._leaders}
        keys = {leader: _gang(self.gangs[leader][0])["key"] for leader in stepped}

        def own(request_id: str) -> dict[str, Any]:
            """What only the scheduler knows of a gang."""
            if request_id not in keys:
                return {}
            return {"key": keys[request_id], "resumed": self._resumed.pop(request_id, 0)}

        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for leader in stepped & self.gangs.keys():
            self._settle(leader)
        notes: dict[str, dict[str, Any]] = getattr(model_runner_output, NOTE, {})
        if stepped or notes:
            for client in outputs.values():
                client.outputs = [o for o in client.outputs if not o.request_id.startswith(SIBLING)]
                for output in client.outputs:
                    if output.request_id in notes:
                        output.kv_transfer_params = {NOTE: {**notes[output.request_id], **own(output.request_id)}}
        return outputs

    def _settle(self, leader: str) -> None:
        """Members whose token was discarded step back; members that disagree with the leader start again from its
        text."""
        members = self.gangs[leader]
        length, last = members[0].num_tokens, members[0].all_token_ids[-1]
        for number, member in enumerate(members):
            if member.is_finished() or (member.num_tokens, member.all_token_ids[-1]) != (length, last):
                self._replace(members, number)
            elif member.status == RequestStatus.RUNNING:
                member.num_computed_tokens = min(member.num_computed_tokens, member.num_tokens - 1)

    def _replace(self, members: list[Request], number: int) -> None:
        leader, old = members[0], members[number]
        self._resumed[leader.request_id] += 1
        self._broken.add(leader.request_id)
        generation = int(old.request_id.rpartition(".")[2]) + 1
        super().finish_requests([old.request_id], RequestStatus.FINISHED_ABORTED)
        members[number] = self._sibling(leader, number, generation)
        super().add_request(members[number])
        self.waiting.remove_request(members[number])
        self.waiting.prepend_request(members[number])


def _gang(request: Request) -> dict[str, Any]:
    """What a leader carries of its gang; empty for any other request."""
    extra = (request.sampling_params and request.sampling_params.extra_args) or {}
    return extra.get(LEADER) or {}
