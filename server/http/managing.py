"""/v1/posteriors and /v1/aliases: what is loaded, and which name leads where. Only admins may use them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from server.errors import Unavailable
from server.http import openapi
from server.http.body import read_json
from server.http.errors import ApiError
from server.http.schemas import AliasRequest, LoadRequest
from server.services.aliases import Alias
from server.services.lifecycle import Lifecycle
from server.services.loaded import Loaded
from server.validation import validated

ONE, ALL = "/v1/posteriors/{name}", "/v1/posteriors"
ALIAS, ALIASES = "/v1/aliases/{name}", "/v1/aliases"
PATHS = frozenset({ONE, ALL, ALIAS, ALIASES})


class SelfTest(BaseModel):
    """`difference`: the largest of a probability, on `rows` probes; null: not measured. `gap`: mean confidence minus
    the share of right answers on held-out probes, and `z` the same in standard errors."""

    rows: int
    difference: float | None
    tolerance: float | None
    gap: float | None
    z: float | None


class Memory(BaseModel):
    """What a posterior takes of the engine's memory: `adapters` x `bytes_per_adapter` = `bytes`."""

    adapters: int
    bytes_per_adapter: int
    bytes: int


class PosteriorCard(BaseModel):
    """A loaded posterior. `id`: name@hash; `models`: the names that lead to it; `requests`: that are being answered by
    it; `self_test`: null without probes; `notes`: what to look at."""

    id: str
    object: Literal["posterior"]
    name: str
    hash: str
    family: str
    state: Literal["loaded", "draining"]
    created: int
    models: list[str]
    particles: int
    memory: Memory
    requests: int
    self_test: SelfTest | None
    notes: list[str]


class Room(BaseModel):
    """`places`: adapters that there is memory for, of which `adapters` are taken; `slots`: in one batch."""

    slots: int
    places: int
    adapters: int
    bytes: int


class PosteriorList(BaseModel):
    """`refused`: why folders and aliases are not served, by name."""

    object: Literal["list"]
    data: list[PosteriorCard]
    room: Room
    refused: dict[str, str]


class AliasCard(BaseModel):
    """Where an alias leads, and led before; `loaded`: whether that posterior is."""

    id: str
    object: Literal["alias"]
    posterior: str
    previous: str | None
    loaded: bool


class AliasList(BaseModel):
    object: Literal["list"]
    data: list[AliasCard]


class PosteriorDeleted(BaseModel):
    """`requests`: those that still are answered by it."""

    id: str
    object: Literal["posterior.deleted"]
    deleted: Literal[True]
    requests: int


class AliasDeleted(BaseModel):
    id: str
    object: Literal["alias.deleted"]
    deleted: Literal[True]


def add(app: FastAPI) -> None:
    """Add the routes."""
    changing = (400, 401, 403, 404, 409, 413, 503)
    routes: tuple[tuple[str, str, Callable[..., Awaitable[Response]], str, type[BaseModel], tuple[int, ...]], ...] = (
        ("GET", ALL, _list, "The posteriors that are loaded", PosteriorList, (401, 403, 404, 503)),
        ("POST", ALL, _load, "Load the posterior of a folder", PosteriorCard, changing),
        ("DELETE", ONE, _unload, "Unload a posterior after its last request", PosteriorDeleted, changing),
        ("GET", ALIASES, _aliases, "Where aliases lead", AliasList, (401, 403, 404, 503)),
        ("PUT", ALIAS, _point, "Let an alias lead to a posterior", AliasCard, changing),
        ("DELETE", ALIAS, _unpoint, "Delete an alias", AliasDeleted, changing),
    )
    bodies: dict[tuple[str, str], type[BaseModel]] = {("POST", ALL): LoadRequest, ("PUT", ALIAS): AliasRequest}
    for method, path, handler, summary, reply, statuses in routes:
        body = bodies.get((method, path))
        app.add_api_route(
            path, handler, methods=[method], summary=summary, responses=openapi.replies(reply, *statuses),
            openapi_extra=None if body is None else openapi.body(body),
        )  # fmt: skip


async def _list(request: Request) -> Response:
    lifecycle = _lifecycle(request)
    cards = [_card(lifecycle, one) for one in lifecycle.loaded]
    room = request.app.state.service.engine.room
    taken = [card["memory"] for card in cards]
    total = {name: sum(each[name] for each in taken) for name in ("adapters", "bytes")}
    refused = dict(lifecycle.registry.refused)
    whole = {"object": "list", "data": cards, "room": {"slots": room.slots, "places": room.places, **total}}
    return JSONResponse({**whole, "refused": refused})


async def _load(request: Request) -> Response:
    lifecycle = _lifecycle(request)
    asked = validated(LoadRequest, await read_json(request))
    return JSONResponse(_card(lifecycle, await lifecycle.load(asked.name)))


async def _unload(request: Request, name: str) -> Response:
    one = await _lifecycle(request).unload(name)
    deleted = {"id": one.label, "object": "posterior.deleted", "deleted": True}
    return JSONResponse({**deleted, "requests": one.mixture.users.count})


async def _aliases(request: Request) -> Response:
    lifecycle = _lifecycle(request)
    cards = [_alias(lifecycle, name, alias) for name, alias in lifecycle.aliases.items()]
    return JSONResponse({"object": "list", "data": cards})


async def _point(request: Request, name: str) -> Response:
    lifecycle = _lifecycle(request)
    asked = validated(AliasRequest, await read_json(request))
    return JSONResponse(_alias(lifecycle, name, await lifecycle.point(name, asked.posterior)))


async def _unpoint(request: Request, name: str) -> Response:
    await _lifecycle(request).unpoint(name)
    return JSONResponse({"id": name, "object": "alias.deleted", "deleted": True})


def _lifecycle(request: Request) -> Lifecycle:
    """Raises Unavailable during the start, and ApiError 404 where nothing can be loaded."""
    if not request.app.state.ready:
        raise Unavailable("the server is warming up; try again shortly")
    found: Lifecycle | None = request.app.state.service.lifecycle
    if found is None:
        raise ApiError(404, "this server loads no posteriors while it runs", code="not_found")
    return found


def _card(lifecycle: Lifecycle, one: Loaded) -> dict[str, Any]:
    """The JSON of a loaded posterior."""
    mixture, n = one.mixture, len(one.adapters)
    posterior = mixture.posterior
    assert posterior is not None
    leading = lifecycle.registry.served.values()
    return {
        "id": one.label,
        "object": "posterior",
        "name": mixture.name,
        "hash": posterior.hash,
        "family": posterior.family,
        "state": one.state,
        "created": int(one.since),
        "models": [each.name for each in leading if each.map == mixture.map] if one.state == "loaded" else [],
        "particles": len(mixture.particles),
        "memory": {"adapters": n, "bytes_per_adapter": one.bytes, "bytes": n * one.bytes},
        "requests": mixture.users.count,
        "self_test": one.verdict.record,
        "notes": list(one.verdict.notes),
    }


def _alias(lifecycle: Lifecycle, name: str, alias: Alias) -> dict[str, Any]:
    """The JSON of an alias."""
    head = {"id": name, "object": "alias", "posterior": alias.posterior, "previous": alias.previous}
    return {**head, "loaded": lifecycle.is_loaded(alias.posterior)}
