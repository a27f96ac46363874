"""The cache of draws: weight samples of Laplace posteriors as PEFT folders, made once and shared by servers.

    HASH-sSEED-VERSION-kK/          K draws, 000/ ..., and contents.json with the sha256 of each file
    HASH-sSEED-VERSION-kK.1/        another, where the first is damaged but in use

HASH names the distribution, VERSION the sampler. Who uses draws holds a shared lock (flock) on contents.json until its
process ends, and checks every file under it. Only what can be locked alone is removed: draws that are damaged, and the
least recently used ones where all together would be larger than the limit. Makers wait for each other.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path

from posterior.errors import PosteriorError
from posterior.files import atomic, objects
from posterior.storage.record import file_hash

CONTENTS = "contents.json"
GIB = 16.0  # of all draws together, unless $POSTERIOR_CACHE_GIB says otherwise
_ENTRY = re.compile(r"(?P<key>[0-9a-f]{16}-s\d+-v[\w.]+)-k(?P<k>\d+)(\.\d+)?")
_held: dict[Path, int] = {}  # open contents.json of the draws this process uses


def ensure(cache: Path, key: str, k: int, size: int, make: Callable[[Path], None]) -> list[Path]:
    """K draws that stay as they are until this process ends: those in the cache, or what `make` writes into a folder.

    key: HASH-sSEED-VERSION; size: of the draws to make, bytes. Raises PosteriorError for a cache that cannot be used.
    """
    try:
        found = _use_any(cache, key, k)
        if found is None:
            cache.mkdir(parents=True, exist_ok=True)
            with atomic.locked(cache / "draws"):
                found = _use_any(cache, key, k) or _make(cache, key, k, size, make)
    except OSError as error:
        raise atomic.unusable(cache, error) from error
    return [found / f"{index:03d}" for index in range(k)]


def limit() -> float:
    """Bytes that draws may take. Raises PosteriorError for a POSTERIOR_CACHE_GIB that is no number."""
    given = os.environ.get("POSTERIOR_CACHE_GIB") or str(GIB)
    try:
        gib = float(given)
    except ValueError:
        gib = -1.0
    if not gib >= 0:
        raise PosteriorError(f"POSTERIOR_CACHE_GIB is {given!r}; it must be a number of GiB, 0 or more")
    return gib * 2**30


def _use_any(cache: Path, key: str, k: int) -> Path | None:
    """Draws of this key that are whole and now in use here. Of more than K the first K are the same draws."""
    entries = [path for path, match in _entries(cache) if match["key"] == key and int(match["k"]) >= k]
    return next((path for path in entries if _use(path)), None)


def _use(entry: Path) -> bool:
    """Whether the draws are whole; if so, they are locked from here on."""
    if entry in _held and _is_whole(entry, _held[entry]):
        return True
    try:
        file = os.open(entry / CONTENTS, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        whole = _is_whole(entry, file)
    except BlockingIOError:  # about to be removed
        whole = False
    if not whole:
        os.close(file)
        return False
    with contextlib.suppress(OSError):  # a cache that is only read keeps no times
        os.utime(entry / CONTENTS)
    _held[entry] = file
    return True


def _is_whole(entry: Path, contents: int) -> bool:
    """Whether every file is the one that was made. contents: the open contents.json, still of this entry."""
    try:
        if not os.path.samestat(os.fstat(contents), (entry / CONTENTS).stat()):
            return False
        files = objects.read(entry / CONTENTS)
        return bool(files) and all(file_hash(entry / name) == digest for name, digest in files.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _make(cache: Path, key: str, k: int, size: int, make: Callable[[Path], None]) -> Path:
    """New draws, in use. For the holder of the cache's lock."""
    for entry, match in _entries(cache):
        if match["key"] == key and int(match["k"]) == k:
            _remove(entry)  # it is damaged
    _make_room(cache, size)
    names = (cache / f"{key}-k{k}{f'.{n}' if n else ''}" for n in count())
    entry = next(path for path in names if not path.exists())
    with atomic.folder(entry) as work:
        make(work)
        files = {str(path.relative_to(work)): file_hash(path) for path in sorted(work.rglob("*")) if path.is_file()}
        (work / CONTENTS).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")
    if not _use(entry):
        raise OSError(errno.EIO, "what was written cannot be read again")
    return entry


def _make_room(cache: Path, size: int) -> None:
    """Remove what killed makers left, and the least recently used draws until `size` bytes more are within the limit or
    the rest is in use."""
    for work in cache.glob(f".*.{atomic.WORK}"):
        if _ENTRY.fullmatch(work.name[1:].removesuffix(f".{atomic.WORK}")):
            shutil.rmtree(work)
    sizes = {entry: _size(entry) for entry, _ in _entries(cache)}
    total, allowed = sum(sizes.values()) + size, limit()
    for entry in sorted(sizes, key=_last_use):
        if total > allowed and _remove(entry):
            total -= sizes[entry]


def _remove(entry: Path) -> bool:
    """Remove draws that nobody uses; returns whether they are gone. For the holder of the cache's lock."""
    if entry in _held:
        return False
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError):
            file = os.open(entry / CONTENTS, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        shutil.rmtree(entry)
    return True


def _entries(cache: Path) -> Iterable[tuple[Path, re.Match[str]]]:
    """Every folder of draws, with the parts of its name; nothing else in the cache is looked at."""
    for path in sorted(cache.iterdir()) if cache.is_dir() else []:
        match = _ENTRY.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            yield path, match


def _size(entry: Path) -> int:
    return sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())


def _last_use(entry: Path) -> float:
    """When draws were last asked for, in seconds since 1970."""
    contents = entry / CONTENTS
    return contents.stat().st_mtime if contents.is_file() else 0.0
