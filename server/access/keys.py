"""Who may ask: keys by their names. Of the keys themselves only hashes are kept.

A plain SHA-256 is enough: a key of `posterior key` is 256 random bits, which nobody finds by trying. The slow hashes
made for passwords would protect it no better, and cost time with each request.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
import tomllib
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from posterior.errors import PosteriorError, first_line
from posterior.validation import complaint
from server.access.quotas import Quota

DEFAULT = "default"  # the key of --api-key
NOBODY = "none"  # in metrics: who showed no key that is known
RESERVED = {DEFAULT: "it belongs to the key of --api-key", NOBODY: "in metrics it stands for wrong keys"}
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # what TOML takes without quotes
MAX_BYTES = 2**20  # of a file of keys


@dataclass(frozen=True)
class Key:
    """What its holder may do. `models`: the names it may use, None for all; the name of a posterior stands for its MAP
    too."""

    name: str
    digest: bytes
    models: frozenset[str] | None = None
    admin: bool = False
    quota: Quota = field(default_factory=Quota, compare=False)


def digest(secret: bytes) -> bytes:
    """The hash by which a key is known."""
    return hashlib.sha256(secret).digest()


def secret(given: str | None) -> str | None:
    """The key without the blanks around it; None where nothing is left, since an empty key is no key.

    Raises PosteriorError for a key that clients cannot send in a header.
    """
    key = (given or "").strip()
    if not key.isprintable():  # nor is what was no UTF-8
        raise PosteriorError("the API key holds a character that no header can carry; use letters, digits and '-'")
    return key or None


def owner(key: Key | None) -> str:
    """Whose the answers are that a key gets, where they are kept: its hash, which no new name changes, and which is
    the same on every server. Without keys they are nobody's."""
    return "nobody" if key is None else key.digest.hex()


class Keys:
    """The keys of a server: one of its command line, and those of a file, which can be read again."""

    def __init__(self, single: str | None = None, file: Path | None = None) -> None:
        """Raises PosteriorError for an empty key, and for a file that cannot be read or says what makes no sense."""
        if single is not None and secret(single) != single:
            raise PosteriorError("the API key is empty or has blanks around it; give a key, or None for no key")
        self._single = () if single is None else (Key(DEFAULT, digest(single.encode()), admin=True),)
        self._file = file
        self._exposed: str | None = None  # the mode of a file that others can read or change
        self._keys: tuple[Key, ...] = self._single
        self.reload()

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, given: bytes) -> Key | None:
        """The key that somebody showed. The time this takes does not tell how much of it is right, or of which."""
        shown, found = digest(given), None
        for key in self._keys:
            if hmac.compare_digest(shown, key.digest):
                found = key
        return found

    def reload(self) -> None:
        """Read the file again. What its keys have used of their limits stays used.

        Raises PosteriorError, and then nothing has changed.
        """
        if self._file is None:
            return
        entries, mode = read(self._file)
        known = {key.name: key.quota for key in self._keys}
        keys = [*self._single, *(entry.key(name, known.get(name, Quota())) for name, entry in entries.items())]
        names: dict[bytes, str] = {}
        for key in keys:
            if key.digest in names:
                raise PosteriorError(
                    f"the keys {names[key.digest]!r} and {key.name!r} are the same ({self._file}); make one for each "
                    "with `posterior key NAME`"
                )
            names[key.digest] = key.name
        for key in keys[len(self._single) :]:
            entry = entries[key.name]
            key.quota.limit(requests=entry.requests_per_minute, tokens=entry.tokens_per_minute)
        self._keys = tuple(keys)
        self._exposed = f"{stat.S_IMODE(mode):o}" if mode & 0o066 else None

    def warnings(self, models: Container[str]) -> list[str]:
        """A line for each thing about the file that may be a mistake; `models`: the names that are served."""
        lines = []
        if self._exposed is not None:
            lines.append(
                f"other users of this machine can read or change the keys (mode {self._exposed}); run `chmod 600 "
                f"{self._file}`"
            )
        for key in self._keys:
            for name in sorted(key.models or ()):
                if name not in models:
                    lines.append(f"the key {key.name!r} may use the model {name!r}, which is not served")
        return lines


def _sha256(text: str) -> str:
    if not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise ValueError("it is not 64 hexadecimal digits; `posterior key NAME` prints them")
    if bytes.fromhex(text) == digest(b""):
        raise ValueError("it is the hash of an empty key; `posterior key NAME` makes a key")
    return text


class Entry(BaseModel):
    """What the file says of a key."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sha256: Annotated[str, AfterValidator(_sha256)]
    models: list[str] | None = None
    requests_per_minute: Annotated[int, Field(ge=1, le=10**9)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1, le=10**12)] | None = None
    admin: bool = False

    def key(self, name: str, quota: Quota) -> Key:
        models = None if self.models is None else frozenset(self.models)
        return Key(name, bytes.fromhex(self.sha256), models, self.admin, quota)


class File(BaseModel):
    """All that it says."""

    model_config = ConfigDict(extra="forbid", strict=True)

    keys: Annotated[dict[str, Entry], Field(min_length=1)]


def read(path: Path) -> tuple[Mapping[str, Entry], int]:
    """What a file says of each key, by name; and its mode. Raises PosteriorError."""
    content, mode = _content(path)
    try:
        body: Any = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise PosteriorError(f"{path} is not TOML in UTF-8: {first_line(error)}") from error
    _check_names(path, body.get("keys", {}))
    try:
        return File.model_validate(body).keys, mode
    except ValidationError as error:
        raise PosteriorError(f"{path}: {complaint(error, body)[1]}") from error


def _content(path: Path) -> tuple[bytes, int]:
    if not path.is_file():  # a pipe could be read only once
        raise PosteriorError(f"there is no file {path}; name a file of keys with --keys")
    try:
        with path.open("rb") as file:
            content, mode = file.read(MAX_BYTES + 1), os.fstat(file.fileno()).st_mode
    except OSError as error:
        raise PosteriorError(f"cannot read {path}: {error.strerror}; let the server's user read it") from error
    if len(content) > MAX_BYTES:
        raise PosteriorError(f"{path} is larger than {MAX_BYTES} bytes; name a file of keys with --keys")
    return content, mode


def _check_names(path: Path, keys: Any) -> None:
    """Raises PosteriorError for what is no table of keys, or a name that a key cannot have."""
    if not isinstance(keys, dict) or not keys or not all(isinstance(entry, dict) for entry in keys.values()):
        raise PosteriorError(f"{path} has no keys; each is a table [keys.NAME], which `posterior key NAME` prints")
    for name in keys:
        check_name(name, f"{path}: ")


def check_name(name: str, place: str = "") -> None:
    """Raises PosteriorError for a name that a key cannot have."""
    if not NAME.fullmatch(name):
        raise PosteriorError(f"{place}a key cannot be named {name!r}; use up to 64 letters, digits, '_' and '-'")
    if name in RESERVED:
        raise PosteriorError(f"{place}a key cannot be named {name!r}: {RESERVED[name]}; choose another name")
