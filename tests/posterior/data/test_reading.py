"""Files of rows: what is read, and the one line for what is not."""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow.parquet import write_table

from posterior.data import reading
from posterior.data.reading import read_rows
from posterior.errors import PosteriorError

ROWS = [{"text": "naïve café", "label": 1}, {"text": "a\u2028b", "label": 0}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = 'text,label\n"good, very",1\n"two\nlines",0\n'


@pytest.mark.parametrize(
    "data",
    [
        LINES.encode(),
        LINES.encode("utf-8-sig"),
        LINES.replace("\n", "\r\n").encode(),
        LINES.replace("\n", "\r").encode(),
        LINES.replace("\n", "\n\n \n").encode(),
        LINES.rstrip().encode(),
        gzip.compress(LINES.encode("utf-8-sig"), mtime=0),
        json.dumps(ROWS[0]).encode() + b"\n" + json.dumps(ROWS[1]).encode(),
    ],
)
def test_json_lines_in_every_shape(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "rows.jsonl"  # gzip is known by its content, also without .gz
    path.write_bytes(data)
    assert read_rows(path) == ROWS


@pytest.mark.parametrize("name", ["rows.csv", "rows.CSV", "rows.csv.gz"])
def test_csv(tmp_path: Path, name: str) -> None:
    data = ("\ufeff" + CSV).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read_rows(tmp_path / name) == [{"text": "good, very", "label": "1"}, {"text": "two\nlines", "label": "0"}]


REFUSED = {
    "empty": (b"", "has no rows"),
    "blank": (b"\n \n", "has no rows"),
    "utf-16": (LINES.encode("utf-16"), "is UTF-16 text; save it as UTF-8: `iconv -f UTF-16 -t UTF-8 rows.jsonl"),
    "utf-16-le": (LINES.encode("utf-16-le"), "looks like UTF-16LE text"),
    "utf-16-be": (LINES.encode("utf-16-be"), "looks like UTF-16BE text"),
    "utf-32": (LINES.encode("utf-32"), "is UTF-32 text"),
    "latin-1": (b'{"a": "x"}\n' + LINES.encode("latin-1", "replace"), r"line 2: byte 0xef is not UTF-8"),
    "latin-1 in gzip": (gzip.compress(b'{"a": "caf\xe9"}'), "line 1: byte 0xe9 is not UTF-8"),
    "zip": (b"PK\x03\x04....", "is a zip archive; expected JSON lines"),
    "binary": (b"\x7fELF\x02\x00\x00\xff", "is a binary file"),
    "zeros": (b"{}" + b"\0" * 9, "is a binary file"),
    "cut gzip": (gzip.compress(LINES.encode())[:-9], "gzip, but cut off or damaged"),
    "bad gzip": (b"\x1f\x8b" + b"x" * 40, "gzip, but cut off or damaged"),
    "no json": (b'{"a": 1}\n{', "line 2: not JSON"),
    "array": (b"[1]", "line 1: expected a JSON object, got list; one object a line is read"),
    "pretty": (b'\n\n{\n "a": 1\n}', "line 3: not JSON .*; one object a line is read: `jq -c"),
    "number": (b'{"a": 1}\n3', "line 2: expected a JSON object, got int$"),
    "nan": (b'{"a": NaN}', "line 1: NaN is no JSON value"),
    "infinity": (b'{"a": -Infinity}', "line 1: -Infinity is no JSON value"),
    "twice": (b'{"a": 1, "a": 2}', "line 1: the key 'a' is there twice"),
    "twice inside": (b'{"b": [{"a": 1, "a": 2}]}', "line 1: the key 'a' is there twice"),
    "deep": (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "line 1: nested too deeply"),
    "digits": (b'{"a": ' + b"1" * 5000 + b"}", "line 1: Exceeds the limit"),
    "two marks": (b"\xef\xbb\xbf" * 2 + b'{"a": 1}', r"line 1: begins with a byte-order mark \(U\+FEFF\)"),
    "joined": (b'{"a": 1}\r\n{"a": 2}\r\n\xef\xbb\xbf{"a": 3}', "line 3: begins with a byte-order mark .* remove it"),
    "surrogate": (rb'{"a": "\ud83d"}', r"line 1: holds '\\ud83d', half of a character"),
    "surrogate in a key": (rb'{"\udc00": 1}', "line 1: holds .*half of a character"),
    "surrogate inside": (rb'{"messages": [{"role": "user", "content": "\ud83d!"}]}', "half of a character"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_row_is_one_line(tmp_path: Path, kind: str) -> None:
    data, match = REFUSED[kind]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(PosteriorError, match=match) as caught:
        read_rows(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_whole_pair_of_surrogates_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(rb'{"a": "\ud83d\ude00"}')
    assert read_rows(tmp_path / "rows.jsonl") == [{"a": "\U0001f600"}]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("text;label\ngood;1\n", "has one column, 'text;label'; separate the fields by commas"),
        ("text,text\na,b\n", "line 1: the header has the name 'text' empty or twice"),
        ("text,\na,b\n", "line 1: the header has the name '' empty or twice"),
        ("text,label\ngood, but slow,1\n", "line 2: 3 fields, but the header has 2; quote"),
        ('text,label\n"good"x,1\n', "line 2: not CSV"),
        ('text,label\n"good,1\n', "line 2: not CSV"),
        ("text,label\n", "has no rows"),
    ],
)
def test_csv_errors_name_the_line(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(PosteriorError, match=match):
        read_rows(tmp_path / "rows.csv")


def test_a_mark_inside_of_csv_is_no_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(CSV + "\ufeff" + CSV, encoding="utf-8")
    with pytest.raises(PosteriorError, match="line 5: begins with a byte-order mark"):
        read_rows(tmp_path / "rows.csv")
    (tmp_path / "rows.csv").write_text("text\na\ufeffb\n", encoding="utf-8")  # inside of a text it is a character
    assert read_rows(tmp_path / "rows.csv") == [{"text": "a\ufeffb"}]


def test_a_csv_text_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\n" + "a" * 200_000)
    assert read_rows(tmp_path / "rows.csv") == [{"text": "a" * 200_000}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_more_than_memory_is_for_is_refused_before_it_is_unpacked(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": "a" * 1000}] * 1000
    plain = "".join(json.dumps(row) + "\n" for row in rows).encode()
    packed = {"rows.jsonl": plain, "rows.jsonl.gz": gzip.compress(plain), "rows.parquet": parquet(rows)}
    (tmp_path / name).write_bytes(packed[name])
    assert read_rows(tmp_path / name) == rows
    monkeypatch.setattr(reading, "MAX_BYTES", 2**19)
    with pytest.raises(PosteriorError, match=rf"{name} holds more than 0\.000488281 GiB of rows; .* take a part"):
        read_rows(tmp_path / name)


def test_places_that_are_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "rows.jsonl").write_text(LINES)
    cases = {
        tmp_path / "none": "no data file at",
        tmp_path: "is a folder",
        Path(os.devnull): "is a pipe or a device",
        tmp_path / "pipe": "is a pipe or a device",
        tmp_path / "rows.jsonl" / "inside": "cannot read .*: Not a directory",
        tmp_path / ("x" * 300): "cannot read .*: File name too long",
    }
    for path, match in cases.items():
        with pytest.raises(PosteriorError, match=match):
            read_rows(path)

    def denied(_self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(PosteriorError, match=r"cannot read .*rows\.jsonl: Permission denied; check"):
        read_rows(tmp_path / "rows.jsonl")


def parquet(rows: list[dict[str, object]]) -> bytes:
    file = io.BytesIO()
    write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"  # known by its content
    for rows in (ROWS, [{"messages": [{"role": "user", "content": "hi"}], "choices": ["a", "b"], "label": 0}]):
        path.write_bytes(parquet(rows))
        assert read_rows(path) == rows


BAD_PARQUET = {
    "cut": (parquet(ROWS)[:-20], "is damaged Parquet"),
    "no footer": (b"PAR1....PAR1", "is damaged Parquet"),
    "not finite": (parquet([{"text": "a", "label": float("nan")}]), "row 1: .*not JSON compliant"),
    "bytes": (parquet([{"text": b"a"}]), "row 1: .*bytes is not JSON serializable"),
    "empty": (parquet([]), "has no rows"),
}


@pytest.mark.parametrize(("data", "words"), BAD_PARQUET.values(), ids=BAD_PARQUET)
def test_bad_parquet_is_one_line(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "rows.parquet").write_bytes(data)
    with pytest.raises(PosteriorError, match=words) as caught:
        read_rows(tmp_path / "rows.parquet")
    assert "\n" not in str(caught.value)


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.parquet").write_bytes(parquet(ROWS))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PosteriorError, match=r"needs pyarrow: pip install 'posterior-server\[parquet\]'"):
        read_rows(tmp_path / "rows.parquet")
