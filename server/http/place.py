"""Where the server listens, and how it is reached there."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import socket
import ssl
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from posterior.errors import PosteriorError
from server.configuration.schema import ServeSettings
from server.http import tls

BACKLOG = 128  # connections that wait to be taken


@dataclass(frozen=True)
class Place:
    """A host and a port (0: any that is free), or the path of a unix socket. tls: None for HTTP without it. prefix: the
    path below which a proxy publishes the server, without a slash at its end."""

    host: str = "127.0.0.1"
    port: int = 0
    uds: Path | None = None
    tls: ssl.SSLContext | None = None
    prefix: str = ""

    @classmethod
    def of(cls, settings: ServeSettings) -> Self:
        """Raises PosteriorError for a certificate that cannot be used."""
        context = None
        if settings.ssl_certfile is not None:
            context = tls.context(
                settings.ssl_certfile,
                settings.ssl_keyfile,
                settings.ssl_keyfile_password,
                settings.ssl_ca_certs,
                settings.ssl_cert_reqs,
                settings.ssl_ciphers,
            )
        return cls(settings.host, settings.port, settings.uds, context, settings.prefix)

    @contextlib.contextmanager
    def listening(self) -> Iterator[socket.socket]:
        """A socket that listens here up to the end of the block. Raises PosteriorError if that cannot be had."""
        listener = _unix(self.uds) if self.uds is not None else _inet(self.host, self.port)
        listener.set_inheritable(False)
        try:
            yield listener
        finally:
            listener.close()
            if self.uds is not None:
                self.uds.unlink(missing_ok=True)

    def curl(self, port: int) -> str:
        """The beginning of a command that asks the server; a path of it comes next."""
        scheme = "http" if self.tls is None else "https"
        if self.uds is not None:
            return f"curl --unix-socket {shlex.quote(str(self.uds))} {scheme}://localhost"
        here = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
        return f"curl {scheme}://{here.get(self.host, f'[{self.host}]' if ':' in self.host else self.host)}:{port}"


def _inet(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)  # from here on nobody else can have the port
    except (OSError, TypeError, UnicodeError) as error:  # of a host name that cannot be one
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise PosteriorError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port") from error
    return listener


def _unix(path: Path) -> socket.socket:
    """A socket that whoever may write to the file can reach: the umask decides. The file that a killed server left
    behind is replaced."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        if _left_behind(path):
            path.unlink()
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except (OSError, UnicodeError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise PosteriorError(f"cannot listen on {path}: {reason}; choose another path for --uds") from error
    return listener


def _left_behind(path: Path) -> bool:
    """Whether there is a socket that nobody listens to."""
    if not path.exists() or not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED
