"""Bits that flip, files that break off, and headers that lie: a folder is refused in one line, or its distribution is
the one that was written."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from posterior.errors import PosteriorError
from posterior.storage import artefact
from tests.sealed import rehash

FLIPS, CUTS = 300, 20


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def one_line(folder: Path) -> str:
    with pytest.raises(PosteriorError) as error:
        artefact.load(folder)
    assert str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_no_flipped_bit_changes_a_number_unseen(folder: Path) -> None:
    rng, every = random.Random(0), files(folder)
    for number in range(FLIPS):
        path = every[number % len(every)]
        before = path.read_bytes()
        changed = bytearray(before)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        assert one_line(folder), path
        path.write_bytes(before)
    assert artefact.load(folder)


def test_a_file_that_breaks_off_is_refused(folder: Path) -> None:
    rng = random.Random(1)
    for path in files(folder):
        before = path.read_bytes()
        last = len(before.rstrip()) - 1  # the end of a line says nothing
        for end in {0, 1, last, *(rng.randrange(last) for _ in range(CUTS))}:
            path.write_bytes(before[:end])
            assert one_line(folder), (path, end)
        path.write_bytes(before)


@pytest.mark.parametrize("length", [2**63, 2**40, 10**8, 10, 0], ids=lambda length: f"{length} bytes")
@pytest.mark.parametrize("name", ["laplace.safetensors", "map/adapter_model.safetensors"])
def test_a_header_that_lies_about_its_length_is_refused(folder: Path, name: str, length: int) -> None:
    """In files whose hashes fit: made by somebody, not by chance. Memory is not taken on its word."""
    path = folder / name
    content = path.read_bytes()
    assert load_file(path)
    path.write_bytes(struct.pack("<Q", length) + content[8:])
    rehash(folder)
    before = psutil.Process().memory_info().rss
    one_line(folder)
    assert psutil.Process().memory_info().rss - before < 2**27
