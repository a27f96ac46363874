"""What goes between the front and a replica. Ray pickles it, so it is made of plain values."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Forwarded:
    """A client's request. `target`: path and query as the client wrote them."""

    method: str
    target: str
    headers: Headers
    body: bytes


@dataclass(frozen=True)
class Head:
    """How an answer begins, and the name of the replica that gives it. Headers' names are in small letters."""

    replica: str
    status: int
    headers: Headers


@dataclass(frozen=True)
class Whole:
    """A whole answer."""

    head: Head
    body: bytes


class ReplicaLost(Exception):
    """A replica has ended, or its server broke off its answer. `replica`: its name, if it is known."""

    def __init__(self, replica: str | None = None) -> None:
        super().__init__(replica)
        self.replica = replica


class Busy(Exception):
    """No replica can take the request now, and too many wait already."""


class Replicas(Protocol):
    """The replicas as the front sees them."""

    def send(self, request: Forwarded, key: str, avoided: Collection[str]) -> AsyncGenerator[Head | bytes]:
        """The answer of one of them: its head, then its body in parts.

        Args:
            key: requests with the same key should go to the same replica.
            avoided: names of replicas that have failed this request.

        Raises ReplicaLost and Busy. Closed early, the replica stops working on it.
        """
        ...

    async def ask_all(self, request: Forwarded) -> Sequence[Whole]:
        """The answer of each of them. Those that are lost are left out. Raises ReplicaLost if they take too long."""
        ...
