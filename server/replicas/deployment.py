"""The application of Ray Serve: replicas, each an actor with a server of its own, and a front. Ray Serve starts and
ends them, checks their health, counts their requests, and replaces them one after the other. clients/ray/serve.yaml
configures it.

    client -> Ray's HTTP proxy -> Front -> (AffinityRouter) -> Replica -> posterior serve
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.applications import Starlette

from server.replicas.affinity import order
from server.replicas.child import Child
from server.replicas.front import create_front
from server.replicas.messages import Busy, Forwarded, Head, ReplicaLost, Whole

SECRETS = ("POSTERIOR_API_KEY", "POSTERIOR_KEYS")
ALL_SECONDS = 10.0  # for the answers of all replicas
END_SECONDS = 5.0  # for a server that broke off to be seen to have ended


class Settings(BaseModel):
    """The `args` of the application in the deployment file."""

    model_config = ConfigDict(extra="forbid")

    command: list[str] = ["posterior"]
    """How the command `posterior` is called on each machine."""
    serve: list[str] = []
    """Options of `posterior serve`. Keys and the URL of outcomes belong in the environment of each machine instead."""
    without_key: bool = False
    """Answer everybody. For an address that only this machine can reach."""


def build(args: dict[str, Any]) -> Any:
    """The application with these `args` of the deployment file. Raises ValueError for arguments that make no sense, and
    if everybody would get answers though nobody said so."""
    settings = Settings.model_validate(args)
    if not settings.without_key and not any(os.environ.get(name) for name in SECRETS):
        raise ValueError(
            f"no key protects the replicas: set {' or '.join(SECRETS)} where Ray is started, or, for an address that "
            "only this machine can reach, `without_key: true` in the deployment file"
        )
    replicas = serve.deployment(
        Replica,
        max_ongoing_requests=64,
        max_queued_requests=256,
        graceful_shutdown_timeout_s=90,
        request_router_config=RequestRouterConfig(request_router_class=f"{__name__}:AffinityRouter"),
    ).bind(settings.command, settings.serve)
    front = serve.deployment(serve.ingress(_front)(), name="Front", max_ongoing_requests=1000, max_surge_percent=100)
    return front.bind(replicas)


def _front() -> Starlette:
    return create_front(RayReplicas(serve.get_deployment_handle(Replica.__name__)))


class Replica:
    """An actor that runs a server. One does not outlive the other."""

    async def __init__(self, command: Sequence[str], options: Sequence[str]) -> None:  # type: ignore[misc]  # Ray awaits it
        self._name = serve.get_replica_context().replica_id.unique_id
        self._child = await Child.start(self._name, command, options)
        self._watch = asyncio.create_task(self._end_with_child())

    async def _end_with_child(self) -> None:
        await self._child.wait()
        os._exit(1)  # so that whoever waits learns it at once, and Ray starts another replica

    async def send(self, request: Forwarded, key: str, avoided: Collection[str]) -> AsyncGenerator[Head | bytes]:
        """The answer to the request. `key` and `avoided` are for the router."""
        try:
            async with aclosing(self._child.send(request)) as parts:
                async for part in parts:
                    yield part
        except ReplicaLost:
            await asyncio.wait((self._watch,), timeout=END_SECONDS)  # a server that has ended ends this process here
            raise

    async def ask(self, request: Forwarded) -> Whole:
        """The whole answer to the request."""
        return await self._child.ask(request)

    async def check_health(self) -> None:
        """Called by Ray, which replaces a replica that raises."""
        if not await self._child.healthy():
            raise RuntimeError("the server does not work; its log says why")

    async def __del__(self) -> None:
        """Called by Ray when no request is left, and before it ends the actor."""
        self._watch.cancel()
        await self._child.stop()


class AffinityRouter(RequestRouter):
    """Ray's choice of a replica, by posterior and prompt, and by load."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas in the order in which to ask them, each a rank of its own."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # else Ray asks again without a pause while all are full
        _, key, avoided = pending_request.args
        found = {each.replica_id.unique_id: each for each in candidate_replicas}
        known = self.replica_queue_len_cache
        loads = {name: known.get(each.replica_id) or 0 for name, each in found.items()}
        return [[found[name]] for name in order(key, loads, avoided)]


class RayReplicas:
    """The replicas behind a handle of Ray Serve."""

    def __init__(self, handle: Any) -> None:
        self._streams = handle.options(method_name="send", stream=True)
        self._handle = handle

    async def send(self, request: Forwarded, key: str, avoided: Collection[str]) -> AsyncGenerator[Head | bytes]:
        """See messages.Replicas."""
        answer = self._streams.remote(request, key, avoided)
        try:
            async for part in answer:
                yield part
        except BackPressureError as error:
            raise Busy from error
        except RayTaskError:  # what the actor raised: ReplicaLost, or a fault of ours
            raise
        except (RayError, DeploymentUnavailableError) as error:
            raise ReplicaLost from error
        except (asyncio.CancelledError, GeneratorExit):  # whoever asked has left
            answer.cancel()
            raise

    async def ask_all(self, request: Forwarded) -> Sequence[Whole]:
        """See messages.Replicas."""
        asked = self._handle.broadcast("ask", request)
        try:
            answers = await asked.results_async(timeout_s=ALL_SECONDS, return_exceptions=True)
        except (TimeoutError, RayError, DeploymentUnavailableError) as error:
            raise ReplicaLost from error
        return [each for each in answers if isinstance(each, Whole)]
