"""`posterior serve`: load everything, listen, warm up, serve, drain, stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posterior.errors import PosteriorError, first_line
from posterior.files import objects
from posterior.models import devices, lora
from posterior.models.base import Base, cache_folder, load_tokenizer, resolve
from posterior.settings import SettingError
from server import logs, tracing
from server.access.exposure import check_exposure
from server.access.keys import Keys, secret
from server.configuration import reading
from server.configuration.schema import LONGEST_DEFAULT, ServeSettings
from server.configuration.window import Window
from server.console import quiet, say
from server.engine.compat import contract
from server.engine.config import EngineConfig, lora_targets, set_environment
from server.http.lobby import Lobby
from server.http.place import Place
from server.metrics import Metrics
from server.services.lifecycle import Lifecycle
from server.services.loaded import places
from server.services.registry import Registry, Source
from server.workers.comparer import Comparer
from server.workers.inside import Folder
from server.workers.linearized import Linearizer

if TYPE_CHECKING:
    from server.store.store import Store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `posterior serve`."""
    reading.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises PosteriorError for whatever the user can fix."""
    settings = reading.read(args)
    logs.choose(settings.log_format)
    contract.check_version()
    if settings.compile and shutil.which("g++") is None:
        raise PosteriorError("--compile needs a C++ compiler: install g++, or leave it out")
    exposed = reading.exposed(reading.config(args))
    if exposed is not None:
        say(f"warning: {exposed}")
    keys = Keys(secret(settings.api_key), settings.keys)
    place = Place.of(settings)
    if settings.uds is None:
        check_exposure(settings.host, keys)
    signal.signal(signal.SIGTERM, _interrupt)  # until uvicorn runs; it ends the engine's processes on the way out
    with contextlib.suppress(KeyboardInterrupt), Lobby(place) as lobby, _quiet(settings, lobby):
        logs.start()
        asyncio.run(_serve(settings, keys, lobby))


def _quiet(settings: ServeSettings, lobby: Lobby) -> contextlib.AbstractContextManager[None]:
    """What puts everything but our own lines into the log of the port or the socket."""
    return quiet(cache_folder() / "logs" / f"serve-{lobby.name}.log", settings.verbose)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


async def _serve(settings: ServeSettings, keys: Keys, lobby: Lobby) -> None:
    from server.http.app import create_app
    from server.http.listening import listen
    from server.services import renewing
    from server.services.monitor import Monitor
    from server.services.predictive import Service

    start = time.monotonic()
    window = Window() if settings.outcomes_window is None else Window.parsed(settings.outcomes_window)
    if settings.keys is not None:
        follow(keys)
    with contextlib.ExitStack() as stack:
        traces = tracing.collector(settings.otlp_endpoint)
        if traces is not None:
            stack.callback(tracing.start(traces).shutdown)
        device = checked_device(settings.device, settings.dtype)
        set_environment(device, cache_folder() / "compiled" if settings.compile else None)
        linearized = checked_linearized(settings.linearized, device)
        base = resolve(settings.base)
        say(f"base {base.id} on {device}, linearised predictive {f'on {linearized}' if linearized else 'off'}")
        source = Source(settings.posteriors, base, settings.particles, cache_folder(), linearized is not None)
        served = source.all()
        calibrations, known = renewing.looks(served), served.refused
        _say_refused(known)
        say(f"posteriors {', '.join(f'{p.name} ({p.family})' for p in served.posteriors)}")
        metrics = Metrics()
        store = _store(settings, metrics)
        if store is not None:
            stack.callback(store.close)
        make = partial(Linearizer, base, device=linearized or device, metrics=metrics)
        shared = device == "cuda" and linearized in ("cuda", "cuda:0")
        promised = settings.gpu_memory_utilization if shared else 0.0
        linearizer, comparer = _workers(settings, partial(make, promised=promised), served, metrics, stack)
        if shared and linearizer is not None:
            say("loading the base for the linearised predictive")
            await linearizer.start()  # first: vLLM takes what vanishes while it measures for its own
        say("starting vLLM (up to a minute)")
        engine = await start_engine(settings, base, device, served, traces)
        stack.callback(engine.stop)
        served = served.without(engine.refused)
        served.check(settings.posteriors)
        service = Service(served, engine, linearizer, load_tokenizer(base), metrics, comparer, store)
        if store is not None:
            service.monitor = Monitor(service, store, window)
            service.monitor.start()
            stack.callback(service.monitor.close)
        service.lifecycle = lifecycle = Lifecycle(service, source, make, say)
        stack.callback(lifecycle.stop)
        _say_refused({name: why for name, why in service.registry.refused.items() if name not in known})
        for line in (*service.unapplied(), lifecycle.arithmetic):
            say(line)
        for line in keys.warnings(service.registry.served):
            say(f"warning: {line}")
        app = create_app(
            service,
            keys,
            origins=settings.cors_origin or (),
            most=settings.max_requests,
            log_prompts=settings.log_prompts,
        )
        watching = asyncio.create_task(renewing.watch(service, calibrations, lifecycle.recalibrate))
        stack.callback(watching.cancel)
        command = _curl(service.registry, lobby, keyed=bool(keys))
        await listen(
            app,
            lobby.leave(),
            service,
            lambda: say(f"ready in {time.monotonic() - start:.0f} s. Try:\n\n{command}\n"),
            place=lobby.place,
            drain_seconds=settings.drain_seconds,
        )


def _workers(
    settings: ServeSettings,
    make: Callable[[Mapping[str, Folder]], Linearizer],
    served: Registry,
    metrics: Metrics,
    stack: contextlib.ExitStack,
) -> tuple[Linearizer | None, Comparer | None]:
    """The processes beside the engine that these posteriors and settings need; they end with the stack."""
    linearizer = make(served.laplace) if served.laplace else None
    folders = comparers(settings.meaning_embedding, settings.meaning_nli)
    comparer = Comparer(folders, settings.meaning_threshold, metrics) if folders else None
    for worker in (linearizer, comparer):
        if worker is not None:
            stack.callback(worker.stop)
    return linearizer, comparer


def follow(keys: Keys) -> None:
    """From now on, SIGHUP reads the file of the keys again. One that comes while the loop is busy is not lost."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _read_again, keys)


def _read_again(keys: Keys) -> None:
    try:
        keys.reload()
    except PosteriorError as error:
        say(f"warning: the keys stay as they were: {error}")
    else:
        say(f"the keys were read again; there are {len(keys)}")


async def start_engine(
    settings: ServeSettings, base: Base, device: str, served: Registry, traces: str | None = None
) -> Any:
    """The engine with all that is served; `traces`: the URL that its spans go to.

    Raises PosteriorError for what vLLM cannot start with.
    """
    contract.check()  # before the names are imported
    from server.engine.engine import VllmEngine
    from server.http.schemas import FIELDS

    config = EngineConfig(
        model=base.path,
        served_name=base.id,
        device=device,
        dtype=settings.dtype,
        particles=max(settings.particles, *(len(entry.particles) for entry in served.served.values())),
        adapters=places(
            len(served.adapters), max(lora.size(p.map_dir) for p in served.posteriors), settings.hot_load_gib
        ),
        lora_rank=served.rank,
        targets=lora_targets(served.modules),
        max_model_len=settings.max_model_len or min(_own_length(base), LONGEST_DEFAULT),
        max_num_seqs=settings.max_num_seqs or (64 if device == "cpu" else 256),
        gpu_memory_utilization=settings.gpu_memory_utilization,
        kv_cache_bytes=None if settings.kv_cache_gib is None else int(settings.kv_cache_gib * 2**30),
        compiled=settings.compile,
        tool_call_parser=settings.tool_call_parser,
        traces=traces,
    )
    try:
        return await VllmEngine.start(config, served.public, served.adapters, FIELDS)
    except (RuntimeError, ValueError) as error:
        raise PosteriorError(f"vLLM did not start: {first_line(error)}") from error


def comparers(embedding: Path | None, nli: Path | None) -> dict[str, Path]:
    """The folders of models that tell meanings apart, by the name of the way. Raises PosteriorError for none."""
    folders = {name: folder for name, folder in {"embedding": embedding, "nli": nli}.items() if folder is not None}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise PosteriorError(f"--meaning-{name} {folder} is no folder; name the folder of a model")
    return folders


def _store(settings: ServeSettings, metrics: Metrics) -> Store | None:
    """Where answers and outcomes are kept, if they are. Raises PosteriorError for a database that cannot be opened."""
    if settings.outcomes is False:
        return None
    from server.store.store import Store

    url = "" if settings.outcomes is True else settings.outcomes
    store = Store(
        url, metrics, days=settings.answers_days, requests=settings.keep_requests, share=settings.label_share
    )  # fmt: skip
    say(f"answers and outcomes are kept in {store.name}")
    return store


def checked_device(wanted: str, dtype: str = "auto") -> str:
    """ "cpu" or "cuda". Raises PosteriorError for one that is not there, or does not serve adapters of this dtype."""
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise PosteriorError("--device cuda: torch sees no GPU here; use --device cpu")
    found = ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
    if found == "cuda" and dtype == "float32":
        raise PosteriorError("--dtype float32: vLLM's adapters on a GPU are bfloat16 or float16; use one of these")
    return found


def checked_linearized(wanted: str, device: str) -> str | None:
    """The device of the linearised predictive, of which vLLM's is `device`; None where it is off. Raises PosteriorError
    for one that is not there."""
    if wanted == "off":
        return None
    try:
        return devices.check(device if wanted == "auto" else wanted)
    except SettingError as error:
        raise PosteriorError(error.named(lambda _: "--linearized")) from error


def _own_length(base: Base) -> int:
    """The context length the base was made for, in tokens."""
    length = objects.read(base.path / "config.json").get("max_position_embeddings")
    return length if isinstance(length, int) else LONGEST_DEFAULT


def _curl(served: Registry, lobby: Lobby, *, keyed: bool) -> str:
    """A command that asks the first posterior."""
    name, task = next((each.name, each.posterior.task) for each in served.entries if each.posterior and each.particles)
    key = ' -H "Authorization: Bearer $POSTERIOR_API_KEY"' if keyed else ""
    fields = {field: "The food was good, the service was slow." for field in task.fields}
    body = {"model": name, "inputs": [fields]}
    if task.answers is None:
        body["answers"] = [" yes", " no"]
    url = f"{lobby.place.curl(lobby.port)}/v1/predictive"
    return f"  {url}{key} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"


def _say_refused(refused: Mapping[str, str]) -> None:
    for name, why in refused.items():
        say(f"warning: {name} is not served: {why}")
