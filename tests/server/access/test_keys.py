"""The file of keys: what it may say, what is refused, and what reading it again changes."""

from __future__ import annotations

import hashlib
import hmac
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from posterior.errors import PosteriorError
from server import cli
from server.access import keys as module
from server.access.keys import Keys


def line(secret: str) -> str:
    return f'sha256 = "{hashlib.sha256(secret.encode()).hexdigest()}"\n'


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    text = f"[keys.alice]\n{line('a')}models = ['mood']\nrequests_per_minute = 3\n[keys.bob]\n{line('b')}admin = true\n"
    return write(tmp_path / "keys.toml", text)


def test_each_key_has_its_rights(file: Path) -> None:
    keys = Keys("own", file)
    assert len(keys) == 3
    own, alice, bob = (keys.find(given) for given in (b"own", b"a", b"b"))
    assert own is not None and (own.name, own.models, own.admin) == ("default", None, True)
    assert alice is not None and (alice.name, alice.models, alice.admin) == ("alice", frozenset({"mood"}), False)
    assert bob is not None and (bob.name, bob.models, bob.admin) == ("bob", None, True)
    assert all(keys.find(wrong) is None for wrong in (b"", b"A", b"a ", b"own\n", b"alice", alice.digest))
    assert "b'a'" not in repr(alice) and not Keys() and Keys().find(b"") is None


def test_every_key_is_compared_whichever_is_right(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(shown: bytes, stored: bytes) -> bool:
        compared.append(stored)
        return hmac.compare_digest(shown, stored)

    keys = Keys("own", file)
    monkeypatch.setattr(module, "hmac", type("Hmac", (), {"compare_digest": staticmethod(compare)}))
    for given in (b"own", b"a", b"b", b"wrong"):
        compared.clear()
        keys.find(given)
        assert len(set(compared)) == 3


WRONG = [
    ("", "has no keys"),
    ("[keys]\n", "has no keys"),
    ("keys = 5\n", "has no keys"),
    ("[keys]\na = 5\n", "has no keys"),
    ("[keys.a]\n", "'keys.a.sha256' is required"),
    ("[keys.a]\nsha256 = 5\n", "keys.a.sha256: "),
    ("[keys.a]\nsha256 = 'abc'\n", "keys.a.sha256: it is not 64 hexadecimal digits; `posterior key NAME`"),
    (f"[keys.a]\n{line('')}", "keys.a.sha256: it is the hash of an empty key"),
    (f"[keys.a]\n{line('a')}model = ['mood']\n", "unknown field 'keys.a.model'"),
    (f"rate = 5\n[keys.a]\n{line('a')}", "unknown field 'rate'"),
    (f"[keys.a]\n{line('a')}models = 'mood'\n", "keys.a.models: "),
    (f"[keys.a]\n{line('a')}models = [1]\n", "keys.a.models.0: "),
    (f"[keys.a]\n{line('a')}requests_per_minute = 0\n", "keys.a.requests_per_minute: .* greater than or equal to 1"),
    (f"[keys.a]\n{line('a')}requests_per_minute = 1.5\n", "keys.a.requests_per_minute: .* integer"),
    (f"[keys.a]\n{line('a')}tokens_per_minute = {10**400}\n", "not TOML|keys.a.tokens_per_minute: .* less than"),
    (f"[keys.a]\n{line('a')}tokens_per_minute = true\n", "keys.a.tokens_per_minute: .* integer"),
    (f"[keys.a]\n{line('a')}admin = 1\n", "keys.a.admin: "),
    (f"[keys.'']\n{line('a')}", "a key cannot be named ''; use up to 64 letters"),
    (f"[keys.'a b']\n{line('a')}", "cannot be named 'a b'"),
    (f"[keys.{'a' * 65}]\n{line('a')}", "cannot be named"),
    (f"[keys.default]\n{line('a')}", "'default': it belongs to the key of --api-key; choose another name"),
    (f"[keys.none]\n{line('a')}", "'none': in metrics it stands for wrong keys"),
    (f"[keys.a]\n{line('a')}[keys.b]\n{line('a')}", "the keys 'a' and 'b' are the same"),
    (f"[keys.a]\n{line('own')}", "the keys 'default' and 'a' are the same"),
    (f"[keys.a]\n{line('a')}[keys.a]\n{line('b')}", "is not TOML in UTF-8"),
    ("[keys.a\n", "is not TOML in UTF-8"),
    ("a = " + "[" * 5000, "is not TOML in UTF-8"),
    ("#" * 2**20 + "\n", "is larger than"),
]


@pytest.mark.parametrize(("text", "words"), WRONG, ids=[words for _, words in WRONG])
def test_a_file_that_makes_no_sense_is_one_line(
    tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTERIOR_API_KEY", "own")
    file = write(tmp_path / "keys.toml", text)
    assert cli.main(["serve", "--keys", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("posterior: ") and said.count("\n") == 1 and str(file) in said
    assert re.search(words, said), said


@pytest.mark.parametrize("make", [lambda p: None, Path.mkdir, lambda p: p.write_bytes(b"\xff"), lambda p: fifo(p)])
def test_what_is_no_file_of_text_is_one_line(tmp_path: Path, make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "keys")
    assert cli.main(["serve", "--keys", str(tmp_path / "keys")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search("there is no file .*keys; name|is not TOML in UTF-8", said)


def fifo(path: Path) -> None:
    import os

    os.mkfifo(path)


def test_the_environment_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTERIOR_KEYS", str(tmp_path / "nowhere"))
    assert cli.main(["serve"]) == 2
    assert f"there is no file {tmp_path / 'nowhere'}" in capsys.readouterr().err


def test_a_file_read_again_changes_the_keys_and_forgives_nothing(file: Path) -> None:
    keys = Keys("own", file)
    alice = keys.find(b"a")
    assert alice is not None and alice.quota.enter() is None and alice.quota.enter() is None
    write(file, f"[keys.alice]\n{line('new')}requests_per_minute = 60\n[keys.carol]\n{line('c')}")
    keys.reload()
    assert keys.find(b"a") is None and keys.find(b"b") is None and keys.find(b"own") is not None
    again, carol = keys.find(b"new"), keys.find(b"c")
    assert again is not None and (again.name, again.models) == ("alice", None) and carol is not None
    assert again.quota.headers()["x-ratelimit-remaining-requests"] == "1", "two of three were used"
    alice.quota.spend("requests", 1)  # by a request that began before
    assert again.quota.headers()["x-ratelimit-remaining-requests"] == "0"


@pytest.mark.parametrize("text", [text for text, _ in WRONG[:4]] + [f"[keys.alice]\n{line('own')}"])
def test_a_bad_file_leaves_the_keys_as_they_were(file: Path, text: str) -> None:
    keys = Keys("own", file)
    alice = keys.find(b"a")
    write(file, text)
    with pytest.raises(PosteriorError):
        keys.reload()
    assert keys.find(b"a") is alice and keys.find(b"b") is not None and len(keys) == 3
    file.unlink()
    with pytest.raises(PosteriorError):
        keys.reload()
    assert len(keys) == 3


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o622, 0o666])
def test_a_file_that_others_can_read_or_change_is_said(file: Path, mode: int) -> None:
    file.chmod(mode)
    (said,) = Keys(None, file).warnings({"mood"})
    assert f"(mode {mode:o})" in said and f"chmod 600 {file}" in said


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_file_of_its_owner_is_not(file: Path, mode: int) -> None:
    file.chmod(mode)
    assert Keys("own", file).warnings({"mood"}) == [] == Keys("own").warnings({})


def test_a_model_that_is_not_served_is_said(file: Path) -> None:
    (said,) = Keys("own", file).warnings({"gang"})
    assert said == "the key 'alice' may use the model 'mood', which is not served"


def test_a_new_key_opens_what_its_lines_say(tmp_path: Path) -> None:
    made = [
        subprocess.run(
            [sys.executable, "-m", "server.cli", "key", name], capture_output=True, text=True, timeout=60, check=True
        )
        for name in ("alice", "bob")
    ]
    file = write(tmp_path / "keys.toml", "".join(each.stdout for each in made))
    secrets = [each.stderr.strip().rpartition(" ")[2] for each in made]
    keys = Keys(None, file)
    assert [getattr(keys.find(secret.encode()), "name", None) for secret in secrets] == ["alice", "bob"]
    assert all(re.fullmatch("posterior-[A-Za-z0-9_-]{43}", secret) for secret in secrets)
    assert all(secret not in file.read_text() for secret in secrets) and all(
        each.stderr.count("\n") == 1 for each in made
    )
    assert set(tomllib.loads(file.read_text())["keys"]["alice"]) == {"sha256"}


@pytest.mark.parametrize("name", ["a b", "default", "none", "x" * 65, "é", "a.b"])
def test_a_new_key_needs_a_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["key", name]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "a key cannot be named" in err and err.count("\n") == 1
