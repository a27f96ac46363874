"""`posterior serve`: load everything, listen, warm up, serve, drain, stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import posterior
from posterior.cli.arguments import check_numbers
from posterior.errors import PosteriorError, first_line
from posterior.files import objects
from posterior.meaning.embedding import THRESHOLD
from posterior.models import lora
from posterior.models.base import Base, cache_folder, load_tokenizer, resolve
from posterior.settings import Range
from server.access.keys import Keys, secret
from server.console import quiet, say
from server.engine.compat import contract
from server.engine.config import EngineConfig, lora_targets, set_environment
from server.http.auth import check_exposure
from server.http.lobby import Lobby
from server.metrics import Metrics
from server.services.lifecycle import Lifecycle
from server.services.loaded import places
from server.services.registry import Registry, Source
from server.workers.comparer import Comparer
from server.workers.linearized import Linearizer

if TYPE_CHECKING:
    from server.store.store import Store

SHIPPED = Path(posterior.__file__).parent / "shipped"
NUMBERS = {
    "port": Range(0, 65535),
    "particles": Range(2, 1000),  # one sample has no spread
    "max_model_len": Range(2, 2**31),
    "max_num_seqs": Range(1, 2**16),
    "kv_cache_gib": Range(0, 2**20, above=True),
    "gpu_memory_utilization": Range(0, 1, above=True),
    "meaning_threshold": Range(-1, 1),
    "hot_load_gib": Range(0, 2**20),
    "answers_days": Range(0, 36500, above=True),
}
LONGEST_DEFAULT = 8192  # tokens: many models claim far more than a small machine can hold


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `posterior serve`."""
    add = parser.add_argument
    text = "base model: a local HF folder, a .gguf file, or a Hugging Face id@revision (default: SmolLM2-135M-Instruct)"
    add("--base", help=text)
    text = "folder of posterior folders; each is served under its folder's name (default: the shipped ones)"
    add("--posteriors", type=Path, default=SHIPPED, help=text)
    text = (
        "samples of each Laplace posterior for the mixture: more mean less Monte-Carlo error and more work (default: 8)"
    )
    add("--particles", type=int, default=8, help=text)
    add("--host", default="127.0.0.1", help="address to listen on; any but loopback needs a key (default: 127.0.0.1)")
    add("--port", type=int, default=8000, help="port to listen on; 0: any that is free (default: 8000)")
    text = "ask clients for this key (default: $POSTERIOR_API_KEY, which other users of the machine cannot see)"
    add("--api-key", type=str, default=os.environ.get("POSTERIOR_API_KEY"), help=text)  # an empty one is none
    text = "TOML file of several keys, each with its rights (default: $POSTERIOR_KEYS); SIGHUP reads it again"
    add("--keys", type=Path, default=os.environ.get("POSTERIOR_KEYS") or None, metavar="FILE", help=text)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where models run (default: cuda if present)")
    dtypes = ("auto", "bfloat16", "float16", "float32")
    add("--dtype", choices=dtypes, default="auto", help="precision of vLLM (default: auto, the base's own)")
    text = f"longest prompt plus answer in tokens (default: the base's own, at most {LONGEST_DEFAULT})"
    add("--max-model-len", type=int, help=text)
    text = "sequences in one batch of vLLM; a mixture takes one a particle (default: 64)"
    add("--max-num-seqs", type=int, default=64, help=text)
    text = "compile the model on a CPU: faster text, a slower start (minutes at first), needs g++; a GPU always does"
    add("--compile", action="store_true", help=text)
    text = "let chats use tools: vLLM's name for how this base writes calls (hermes, llama3_json, mistral, ...)"
    add("--tool-call-parser", metavar="NAME", help=text)
    text = "KV cache in GiB; a mixture fills it K times as fast (default: 1 on a CPU, what the share leaves on a GPU)"
    add("--kv-cache-gib", type=float, help=text)
    text = "memory in GiB for the adapters of posteriors that are loaded later, while the server runs (default: 1)"
    add("--hot-load-gib", type=float, default=1.0, metavar="GIB", help=text)
    text = "share of the GPU's memory for vLLM; the linearised predictive needs its own copy of the base (default: 0.7)"
    add("--gpu-memory-utilization", type=float, default=0.7, help=text)
    text = "let samples be told apart by embeddings: a folder of sentence-transformers (default: none)"
    add("--meaning-embedding", type=Path, metavar="FOLDER", help=text)
    text = f"cosine of two embeddings from which texts mean the same (default: {THRESHOLD})"
    add("--meaning-threshold", type=float, metavar="COSINE", default=THRESHOLD, help=text)
    text = "let samples be told apart by entailment: a folder with a sequence classifier for it (default: none)"
    add("--meaning-nli", type=Path, metavar="FOLDER", help=text)
    text = (
        "keep answers, so that POST /v1/outcomes can say what turned out to be true of them: in a file "
        "(sqlite:///FILE), in PostgreSQL (postgresql://USER:PASSWORD@HOST/DATABASE), or without a URL in "
        "~/.local/state/posterior-server/outcomes.db (default: $POSTERIOR_OUTCOMES, which other users of the machine "
        "cannot see; else nothing is kept)"
    )
    outcomes = os.environ.get("POSTERIOR_OUTCOMES") or None
    add("--outcomes", metavar="URL", nargs="?", const="", type=str, default=outcomes, help=text)
    text = "with --outcomes, days that an answer waits for its outcome before it is deleted (default: 30)"
    add("--answers-days", type=float, metavar="N", default=30.0, help=text)
    add("--keep-requests", action="store_true", help="with --outcomes, keep the bodies of requests too: the prompts")
    text = "on a terminal, show what vLLM and torch say; else it goes to a log file there, and is shown elsewhere"
    add("--verbose", action="store_true", help=text)


def run(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises PosteriorError for whatever the user can fix."""
    check_numbers(args, NUMBERS)
    contract.check_version()
    if args.compile and shutil.which("g++") is None:
        raise PosteriorError("--compile needs a C++ compiler: install g++, or leave it out")
    args.api_key = secret(args.api_key)
    keys = Keys(args.api_key, args.keys)
    check_exposure(args.host, keys)
    if args.keep_requests and args.outcomes is None:
        raise PosteriorError("--keep-requests keeps them beside answers; give --outcomes too, or leave it out")
    signal.signal(signal.SIGTERM, _interrupt)  # until uvicorn runs; it ends the engine's processes on the way out
    with contextlib.suppress(KeyboardInterrupt), Lobby(args.host, args.port) as lobby, _quiet(args, lobby):
        asyncio.run(_serve(args, keys, lobby))


def _quiet(args: argparse.Namespace, lobby: Lobby) -> contextlib.AbstractContextManager[None]:
    """What puts everything but our own lines into the port's log."""
    return quiet(cache_folder() / "logs" / f"serve-{lobby.port}.log", args.verbose)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


async def _serve(args: argparse.Namespace, keys: Keys, lobby: Lobby) -> None:
    from server.http.app import create_app
    from server.http.listening import listen
    from server.services.predictive import Service

    start = time.monotonic()
    if args.keys is not None:
        follow(keys)
    with contextlib.ExitStack() as stack:
        device = checked_device(args.device)
        set_environment(device, cache_folder() / "compiled" if args.compile else None)
        base = resolve(args.base)
        say(f"base {base.id} on {device}")
        source = Source(args.posteriors, base, args.particles, cache_folder())
        served = source.all()
        _say_refused(served.refused)
        say(f"posteriors {', '.join(f'{p.name} ({p.family})' for p in served.posteriors)}")
        metrics = Metrics()
        store = _store(args, metrics)
        if store is not None:
            stack.callback(store.close)
        make = partial(Linearizer, base, device=device, metrics=metrics)
        linearizer = make(laplace) if (laplace := served.laplace) else None
        if linearizer is not None:
            stack.callback(linearizer.stop)
        folders = comparers(args)
        comparer = Comparer(folders, args.meaning_threshold, metrics) if folders else None
        if comparer is not None:
            stack.callback(comparer.stop)
        say("starting vLLM (up to a minute)")
        engine = await start_engine(args, base, device, served)
        stack.callback(engine.stop)
        known, served = served.refused, served.without(engine.refused)
        _say_refused({name: reason for name, reason in served.refused.items() if name not in known})
        served.check(args.posteriors)
        service = Service(served, engine, linearizer, load_tokenizer(base), metrics, comparer, store)
        service.lifecycle = lifecycle = Lifecycle(service, source, make, say)
        stack.callback(lifecycle.stop)
        _say_refused({name: why for name, why in service.registry.refused.items() if name not in served.refused})
        for line in (*service.unapplied(), lifecycle.arithmetic):
            say(line)
        for line in keys.warnings(service.registry.served):
            say(f"warning: {line}")
        app = create_app(service, keys)
        await listen(app, lobby.leave(), service, lambda: _say_ready(service.registry, lobby.port, args, start))


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


async def start_engine(args: argparse.Namespace, base: Base, device: str, served: Registry) -> Any:
    """The engine with all that is served. Raises PosteriorError for what vLLM cannot start with."""
    contract.check()  # before the names are imported
    from server.engine.engine import VllmEngine
    from server.http.schemas import FIELDS

    config = EngineConfig(
        model=base.path,
        served_name=base.id,
        device=device,
        dtype=args.dtype,
        particles=max(args.particles, *(len(entry.particles) for entry in served.served.values())),
        adapters=places(len(served.adapters), max(lora.size(p.map_dir) for p in served.posteriors), args.hot_load_gib),
        lora_rank=served.rank,
        targets=lora_targets(served.modules),
        max_model_len=args.max_model_len or min(_own_length(base), LONGEST_DEFAULT),
        max_num_seqs=args.max_num_seqs,
        gpu_memory_utilization=args.gpu_memory_utilization,
        kv_cache_bytes=None if args.kv_cache_gib is None else int(args.kv_cache_gib * 2**30),
        compiled=args.compile,
        tool_call_parser=args.tool_call_parser,
    )
    try:
        return await VllmEngine.start(config, served.public, served.adapters, FIELDS)
    except (RuntimeError, ValueError) as error:
        raise PosteriorError(f"vLLM did not start: {first_line(error)}") from error


def comparers(args: argparse.Namespace) -> dict[str, Path]:
    """The folders of models that tell meanings apart, by the name of the way. Raises PosteriorError for none."""
    given = {"embedding": args.meaning_embedding, "nli": args.meaning_nli}
    folders = {name: folder for name, folder in given.items() if folder is not None}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise PosteriorError(f"--meaning-{name} {folder} is no folder; name the folder of a model")
    return folders


def _store(args: argparse.Namespace, metrics: Metrics) -> Store | None:
    """Where answers and outcomes are kept, if they are. Raises PosteriorError for a database that cannot be opened."""
    if args.outcomes is None:
        return None
    from server.store.store import Store

    store = Store(args.outcomes, metrics, days=args.answers_days, requests=args.keep_requests)
    say(f"answers and outcomes are kept in {store.name}")
    return store


def checked_device(wanted: str) -> str:
    """ "cpu" or "cuda". Raises PosteriorError for one that is not there."""
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise PosteriorError("--device cuda: torch sees no GPU here; use --device cpu")
    return wanted


def _own_length(base: Base) -> int:
    """The context length the base was made for, in tokens."""
    length = objects.read(base.path / "config.json").get("max_position_embeddings")
    return length if isinstance(length, int) else LONGEST_DEFAULT


def _say_ready(served: Registry, port: int, args: argparse.Namespace, start: float) -> None:
    say(f"ready in {time.monotonic() - start:.0f} s. Try:\n\n{_curl(served, port, args)}\n")


def _curl(served: Registry, port: int, args: argparse.Namespace) -> str:
    """A command that asks the first posterior."""
    name, task = next((each.name, each.posterior.task) for each in served.entries if each.posterior and each.particles)
    key = ' -H "Authorization: Bearer $POSTERIOR_API_KEY"' if args.api_key or args.keys else ""
    fields = {field: "The food was good, the service was slow." for field in task.fields}
    body = {"model": name, "inputs": [fields]}
    if task.answers is None:
        body["answers"] = [" yes", " no"]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(args.host, f"[{args.host}]" if ":" in args.host else args.host)
    data = shlex.quote(json.dumps(body))
    return f"  curl http://{host}:{port}/v1/predictive{key} -H 'Content-Type: application/json' -d {data}"


def _say_refused(refused: Mapping[str, str]) -> None:
    for name, why in refused.items():
        say(f"warning: {name} is not served: {why}")
