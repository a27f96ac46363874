"""Rows of a file as dictionaries: JSON lines, CSV or Parquet, each of them plain or in gzip.

Gzip and Parquet are known by their first bytes, CSV by its name; all else is JSON lines. Text is UTF-8, with or without
a byte-order mark.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shlex
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from posterior.errors import PosteriorError, first_line

Row = dict[str, Any]
Rows = Sequence[Mapping[str, Any]] | Path | str  # rows, or the file that has them

MAX_BYTES = 2**30  # of one file, unpacked: its rows are held in memory, in several times as much
FORMATS = "JSON lines (.jsonl), CSV (.csv) or Parquet (.parquet), each also in gzip (.gz)"
PARQUET_ROWS = 256  # unpacked at a time: one value may stand for many rows
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_OTHER_FILES = {  # by their first bytes
    b"PK\x03\x04": "a zip archive",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"7z\xbc\xaf": "a 7z archive",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "an SQLite database",
    b"%PDF": "a PDF document",
}
_OTHER_TEXTS = {  # the longer marks first: UTF-32's begins like UTF-16's
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def read(rows: Rows) -> list[Row]:
    """The rows, at least one, of a file or as they are given. Raises PosteriorError."""
    if isinstance(rows, str | Path):
        return read_rows(rows)
    if not rows:
        raise PosteriorError("there are no rows; at least one is needed")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise PosteriorError(f"row {number} is {type(row).__name__}, no mapping of fields to values")
    return [dict(row) for row in rows]


def source(rows: Rows) -> str:
    """The file's name, or nothing."""
    return str(rows) if isinstance(rows, str | Path) else ""


def read_rows(path: Path | str) -> list[Row]:
    """All rows of a file, at least one. The error names the file and the line or row. Raises PosteriorError."""
    path = Path(path)
    data = _content(path)
    if data.startswith(_PARQUET):
        rows = _parquet(path, data)
    else:
        text = _text(path, data)
        is_csv = ".csv" in [suffix.lower() for suffix in path.suffixes[-2:]]
        rows = list(_csv(path, text) if is_csv else _json_lines(path, text))
    if not rows:
        raise PosteriorError(f"{path} has no rows; at least one is needed")
    return rows


def _content(path: Path) -> bytes:
    """The bytes of a regular file, unpacked if they are gzip's."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise PosteriorError(f"{path} is a folder; name a file of rows: {FORMATS}")
        if not stat.S_ISREG(mode):
            raise PosteriorError(f"{path} is a pipe or a device; write the rows to a file and name that")
        if path.stat().st_size > MAX_BYTES:
            raise _too_large(path)
        data = path.read_bytes()
    except FileNotFoundError:
        raise PosteriorError(f"no data file at {path}; name a file of rows: {FORMATS}") from None
    except OSError as error:
        raise PosteriorError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from None
    if not data.startswith(_GZIP):
        return data
    try:
        with gzip.open(io.BytesIO(data)) as file:
            unpacked = file.read(MAX_BYTES + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise PosteriorError(f"{path} is gzip, but cut off or damaged ({error}); copy or make it again") from None
    if len(unpacked) > MAX_BYTES:
        raise _too_large(path)
    return unpacked


def _too_large(path: Path) -> PosteriorError:
    return PosteriorError(
        f"{path} holds more than {MAX_BYTES / 2**30:g} GiB of rows; all are held in memory: take a part of them"
    )


def _text(path: Path, data: bytes) -> str:
    """The text of the file, without its byte-order mark."""
    for start, kind in _OTHER_FILES.items():
        if data.startswith(start):
            raise PosteriorError(f"{path} is {kind}; expected {FORMATS}")
    for start, encoding in _OTHER_TEXTS.items():
        if data.startswith(start):
            raise PosteriorError(f"{path} is {encoding} text; save it as UTF-8: {_convert(encoding, path)}")
    if re.match(rb"[ -~]\x00|\x00[ -~]", data):
        encoding = "UTF-16BE" if data.startswith(b"\x00") else "UTF-16LE"
        raise PosteriorError(f"{path} looks like {encoding} text; save it as UTF-8: {_convert(encoding, path)}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\x00" in data:
            raise PosteriorError(f"{path} is a binary file; expected {FORMATS}") from None
        line = data.count(b"\n", 0, error.start) + 1
        raise PosteriorError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; if the text is Latin-1 or "
            f"Windows-1252, save it as UTF-8: {_convert('WINDOWS-1252', path)}"
        ) from None
    if "\x00" in text:
        raise PosteriorError(f"{path} is a binary file: it holds zero bytes; expected {FORMATS}")
    if inner := re.search("(?:^|[\r\n])\ufeff", text):
        line = len(re.findall("\r\n?|\n", text[: inner.end()])) + 1
        raise PosteriorError(
            f"{path}, line {line}: begins with a byte-order mark (U+FEFF), as where files were joined; remove it"
        )
    return text


def _convert(encoding: str, path: Path) -> str:
    return f"`iconv -f {encoding} -t UTF-8 {shlex.quote(path.name)} > {shlex.quote('utf8-' + path.name)}`"


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    """A row for each line that is not blank. Strings may hold other line separators than these."""
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if line.strip():
            try:
                yield _json_object(line)
            except ValueError as error:
                hint = _hint(text, number)
                raise PosteriorError(f"{path}, line {number}: {error}{hint}") from None


def _json_object(line: str) -> Row:
    """The object of one line. Raises ValueError for what is none, or means two things."""
    try:
        row = json.loads(line, object_pairs_hook=unique, parse_constant=_no_constant)
        if isinstance(row, dict):
            json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("nested too deeply; rows are flat objects of texts") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(
            f"holds {half!r}, half of a character (a lone surrogate); write the whole character, or leave it out"
        ) from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    return row


def _hint(text: str, number: int) -> str:
    """What to do about a first line that is no row."""
    start = text.lstrip()[:1]
    if number > 1 + text[: len(text) - len(text.lstrip())].count("\n") or start not in ("[", "{"):
        return ""
    return "; one object a line is read: `jq -c .` makes lines of objects, `jq -c '.[]'` of a list"


def unique(pairs: Sequence[tuple[str, Any]]) -> Row:
    """For `json.loads(object_pairs_hook=...)`: an object whose keys differ. Raises ValueError for any other."""
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice; keep one")
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value; leave the field out or write null")


def _csv(path: Path, text: str) -> Iterator[Row]:
    """A row for each record: the header names the fields, every value is text."""
    csv.field_size_limit(MAX_BYTES)  # of all readers; Python's own is 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        records = [(reader.line_num, record) for record in reader if record]
    except csv.Error as error:
        raise PosteriorError(f"{path}, line {reader.line_num}: not CSV ({error})") from None
    if not records:
        return
    (_, header), *records = records
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
        raise PosteriorError(f"{path} has one column, {header[0]!r}; separate the fields by commas")
    for name in header:
        if not name.strip() or header.count(name) > 1:
            raise PosteriorError(f"{path}, line 1: the header has the name {name!r} empty or twice; name every field")
    for line, record in records:
        if len(record) != len(header):
            raise PosteriorError(
                f"{path}, line {line}: {len(record)} fields, but the header has {len(header)}; quote texts with commas"
            )
        yield dict(zip(header, record, strict=True))


def _parquet(path: Path, data: bytes) -> list[Row]:
    """The rows of a Parquet file: texts, numbers, and lists and objects of them."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise PosteriorError(
            f"{path} is Parquet, which needs pyarrow: pip install 'posterior-server[parquet]'"
        ) from None
    rows: list[Row] = []
    size = 0
    try:
        for batch in ParquetFile(io.BytesIO(data)).iter_batches(PARQUET_ROWS):
            size += batch.nbytes
            if size > MAX_BYTES:
                raise _too_large(path)
            rows += batch.to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise PosteriorError(f"{path} is damaged Parquet ({first_line(error)}); copy or make it again") from None
    for number, row in enumerate(rows, 1):
        try:
            json.dumps(row, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            raise PosteriorError(
                f"{path}, row {number}: {error}; give texts, whole numbers and lists of them"
            ) from None
    return rows
