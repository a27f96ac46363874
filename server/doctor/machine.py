"""What a start needs of the machine: a compiler, keys, a place to listen, folders."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from posterior.errors import PosteriorError
from server.access.exposure import check_exposure
from server.access.keys import Keys, secret
from server.configuration import reading
from server.configuration.schema import ServeSettings
from server.doctor.line import Line
from server.http.place import Place

GIB = 2**30
SMALL_DISK = 2 * GIB  # bytes: a converted base and some samples


def secrets(config: Path | None) -> Iterator[Line]:
    """Whether others can read what only the server should."""
    with contextlib.suppress(PosteriorError):  # the settings' own line says so
        if (said := reading.exposed(config)) is not None:
            yield Line("settings", "warn", said)


def compiler(settings: ServeSettings) -> Iterator[Line]:
    if not settings.compile:
        yield Line("compiler", "ok", "not needed without --compile")
    elif shutil.which("g++") is None:
        yield Line("compiler", "fail", "--compile needs g++, which is not there", "install g++, or leave it out")
    else:
        yield Line("compiler", "ok", "g++ is there")


def access(settings: ServeSettings) -> Iterator[Line]:
    """Whether the keys can be read, by the server alone, and whether there are enough of them."""
    try:
        keys = Keys(secret(settings.api_key), settings.keys)
        if settings.uds is None:
            check_exposure(settings.host, keys)
    except PosteriorError as error:
        yield Line("keys", "fail", str(error))
        return
    models = _Everything()
    warnings = keys.warnings(models)
    for warning in warnings:
        yield Line("keys", "warn", warning)
    if not warnings:
        what = f"{len(keys)} of them" if keys else "none, so only clients on this machine are answered"
        yield Line("keys", "ok", what)


class _Everything:
    """Every model, since which are served is not known yet."""

    def __contains__(self, _: object) -> bool:
        return True


def place(settings: ServeSettings) -> Iterator[Line]:
    """Whether the server could listen where it is told to, with the certificate that it is told to use."""
    where = str(settings.uds or f"{settings.host}:{settings.port}")
    try:
        found = Place.of(settings)
        with found.listening():
            yield Line("port", "ok", f"{where} is free{', for HTTPS' if found.tls else ''}")
    except PosteriorError as error:
        yield Line("port", "fail", str(error))


def folders(settings: ServeSettings) -> Iterator[Line]:
    """Whether the cache can be written, and has room."""
    try:
        cache = Path(os.environ.get("POSTERIOR_CACHE") or "~/.cache/posterior-server").expanduser()
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            free = shutil.disk_usage(cache).free
    except (OSError, RuntimeError) as error:
        do = "name a folder that can be written in POSTERIOR_CACHE"
        yield Line("cache", "fail", f"the cache cannot be written ({error})", do)
        return
    what = f"{cache}, with {free / GIB:.1f} GiB free"
    if free < SMALL_DISK:
        yield Line("cache", "warn", what, "free some space: a converted base and samples go there")
    else:
        yield Line("cache", "ok", what)
