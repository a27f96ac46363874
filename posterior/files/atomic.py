"""Files and folders that are whole or not there, whatever ends the process that writes them.

A writer of NAME works beside it: a file in `.NAME.posterior-part`, a folder in `.NAME.posterior-work/new`. Everything
is flushed to the disk (fsync) before it takes the name, in one step:
- a file, or a folder where nothing or an empty folder is, by rename;
- a folder in the place of another by renameat2(RENAME_EXCHANGE), after which the old one is deleted;
- where the file system cannot exchange (NFS), by two renames: the old one to `.NAME.posterior-work/old`, the new one
  to NAME. A process killed in between leaves nothing at NAME; `recover` puts the old one back.
Writers of one NAME wait for each other at the lock `.NAME.posterior-lock` (flock), which the kernel opens when its
holder dies. So what the holder finds at those names is of a dead writer, and is cleared away.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from posterior.errors import PosteriorError

LOCK, PART, WORK = "posterior-lock", "posterior-part", "posterior-work"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def beside(target: Path, kind: str) -> Path:
    """The name at which a writer of `target` keeps its lock, its file or its folder."""
    return target.with_name(f".{target.name.lstrip('.')}.{kind}")


def is_ours(path: Path) -> bool:
    """Whether a writer may have left a file of this name."""
    return path.name.startswith(".") and path.suffix in (f".{LOCK}", f".{PART}")


@contextlib.contextmanager
def locked(target: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of `target`, whose folder exists. Raises PosteriorError where another process has it and `wait` is
    False, OSError where no lock can be made."""
    path = beside(target, LOCK)
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_still(file, path):  # else its holder has removed it, and the next writer made another
                break
        except BlockingIOError:
            os.close(file)
            raise PosteriorError(
                f"another process is at work on {target}; wait for it or choose another place"
            ) from None
        except OSError:
            os.close(file)
            raise
        os.close(file)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def write(path: Path, content: bytes | Callable[[Path], object]) -> None:
    """Put a file in the place of what was there, and make its folder if need be. Raises PosteriorError.

    content: the bytes, or what writes them into a file.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        with locked(path):
            part = beside(path, PART)
            try:
                mode = _create(part, path)
                if callable(content):
                    content(part)
                else:
                    part.write_bytes(content)
                part.chmod(mode)
                _flush(part)
                os.replace(part, path)
                _flush(path.parent)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise PosteriorError(f"cannot write {path}: {error.strerror}; make room or fix its permissions") from error


def _create(part: Path, path: Path) -> int:
    """Make the empty file `part`, a new one and no link; the mode for it: that of the file it will replace, or as the
    umask has it."""
    part.unlink(missing_ok=True)  # a dead writer's, or a link to a file that is not ours
    file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        known = path.lstat() if path.is_file() and not path.is_symlink() else os.fstat(file)
        return stat.S_IMODE(known.st_mode)
    finally:
        os.close(file)


@contextlib.contextmanager
def folder(target: Path, check: Callable[[Path], None] = lambda target: None) -> Iterator[Path]:
    """An empty work folder that becomes `target` when the block succeeds, and vanishes when it fails.

    check: called with `target` before the block and again before the exchange; raises for what must not be replaced.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        _clear(target)
        check(target)
        new = beside(target, WORK) / "new"
        try:
            new.mkdir(parents=True)
            mode = stat.S_IMODE(new.stat().st_mode)  # as the umask has it
            yield new
            for path in (*new.rglob("*"), new, new.parent):
                path.chmod(mode if path.is_dir() else mode & 0o666)  # safetensors writes files for their owner alone
                _flush(path)
            check(target)
            _publish(new, target)
            _flush(target.parent)
        finally:
            _clear(target)


def recover(target: Path) -> None:
    """Put back the folder that a writer had moved away from `target` when it was killed; see the top of this file."""
    if not os.path.lexists(target) and (beside(target, WORK) / "old").is_dir():
        with locked(target):
            _clear(target)


def moved_away(root: Path) -> list[Path]:
    """The names in `root` whose folders `recover` would put back."""
    names = (path.parent.name for path in root.glob(f".*.{WORK}/old"))
    return [root / name[1:].removesuffix(f".{WORK}") for name in names]


def exchange(first: Path, second: Path) -> None:
    """Let two paths change places in one step. Raises OSError, with ENOSYS where the C library cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))


def _publish(new: Path, target: Path) -> None:
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        os.rename(new, target)
        return
    try:
        exchange(new, target)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        os.rename(target, new.with_name("old"))
        os.rename(new, target)


def _clear(target: Path) -> None:
    """Remove what writers of `target` left, but for a folder they had moved away from it. For the lock's holder."""
    work = beside(target, WORK)
    if (work / "old").is_dir() and not os.path.lexists(target):
        os.rename(work / "old", target)
        _flush(target.parent)
    shutil.rmtree(work, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    except OSError as error:
        if not (path.is_dir() and error.errno in _UNSUPPORTED):
            raise
    finally:
        os.close(file)


def _is_still(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def unusable(cache: Path, error: OSError) -> PosteriorError:
    """One line for a cache that cannot be written."""
    return PosteriorError(
        f"cannot write into the cache {cache}: {error.strerror}; set POSTERIOR_CACHE to a folder that has room and "
        "that you may write into"
    )
