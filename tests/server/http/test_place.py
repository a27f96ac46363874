"""Where the server listens: unix sockets, HTTPS with a real certificate, and paths below a proxy's; while it loads, and
afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from posterior.errors import PosteriorError
from server.configuration.schema import ServeSettings
from server.http.app import create_app
from server.http.listening import listen
from server.http.lobby import Lobby
from server.http.place import Place
from server.metrics import Metrics
from server.services.predictive import Service
from tests.server import fakes

ASK = {"model": "gang", "inputs": [{"text": "x"}]}


@dataclass(frozen=True)
class Certificate:
    """A certificate that signs itself, for 127.0.0.1 and localhost, and its key, with and without a password."""

    file: Path
    key: Path
    locked: Path


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return certify(tmp_path_factory.mktemp("tls"))


def certify(folder: Path) -> Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    found = Certificate(folder / "certificate.pem", folder / "key.pem", folder / "locked.pem")
    found.file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    for path, lock in (
        (found.key, serialization.NoEncryption()),
        (found.locked, serialization.BestAvailableEncryption(b"pass")),
    ):
        form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        path.write_bytes(key.private_bytes(*form, lock))
    return found


@contextlib.contextmanager
def answering(place: Place, drain_seconds: float = 30.0) -> Iterator[int]:
    """The port of a server that is ready there, in a thread of its own; at the end it is told to stop."""
    service = Service(fakes.registry(), fakes.Engine(), None, fakes.Tokenizer(), Metrics())
    app, ready = create_app(service, None), threading.Event()

    async def main(lobby: Lobby) -> None:
        loop = asyncio.get_running_loop()
        vars(loop)["add_signal_handler"] = handlers.setdefault
        loops.append(loop)
        await listen(app, lobby.leave(), service, ready.set, place=place, drain_seconds=drain_seconds)

    handlers: dict[Any, Any] = {}  # of signals, which only a main thread gets
    loops: list[asyncio.AbstractEventLoop] = []
    with Lobby(place) as lobby:
        thread = threading.Thread(target=asyncio.run, args=(main(lobby),))
        thread.start()
        assert ready.wait(30)
        try:
            yield lobby.port
        finally:
            loops[0].call_soon_threadsafe(handlers[signal.SIGTERM])
            thread.join(30)
    assert not thread.is_alive()


def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as client:
        with Lobby(Place(uds=path)):
            assert client.get("/health").json() == {"status": "ok"}
            response = client.get("/v1/models", headers={"X-Request-Id": "mine"})
            assert response.status_code == 503 and response.headers["x-request-id"] == "mine"
        with answering(Place(uds=path)):
            assert client.get("/ready").status_code == 200
            assert client.post("/v1/predictive", json=ASK).status_code == 200
            assert path.stat().st_mode & 0o022 == 0, "the umask says who may connect"
            with pytest.raises(PosteriorError, match="Address already in use; choose another path for --uds"):
                Lobby(Place(uds=path))
    assert not path.exists()


def test_a_socket_that_was_left_behind_is_replaced_and_other_files_are_not(tmp_path: Path) -> None:
    left, file = tmp_path / "left.sock", tmp_path / "file"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(left))
    with Lobby(Place(uds=left)):
        pass
    file.write_text("precious")
    for path in (file, tmp_path / "no" / "folder", tmp_path / ("long" * 40)):
        with pytest.raises(PosteriorError, match="cannot listen on .*; choose another path for --uds"):
            Lobby(Place(uds=path))
    assert file.read_text() == "precious"


def https(certificate: Certificate, **more: Any) -> Place:
    return Place.of(ServeSettings(port=0, ssl_certfile=certificate.file, ssl_keyfile=certificate.key, **more))


def test_https_from_the_first_moment(certificate: Certificate) -> None:
    place, trust = https(certificate), ssl.create_default_context(cafile=str(certificate.file))
    with Lobby(place) as lobby:
        url = f"https://127.0.0.1:{lobby.port}"
        assert httpx.get(f"{url}/health", verify=trust).json() == {"status": "ok"}
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/health")
        with socket.create_connection(("127.0.0.1", lobby.port)):  # shakes no hands, and keeps nobody waiting
            assert httpx.get(f"{url}/ready", verify=trust, timeout=2).status_code == 503
    with answering(place) as port:
        url = f"https://127.0.0.1:{port}"
        assert httpx.post(f"{url}/v1/predictive", json=ASK, verify=trust).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/health")


def test_clients_can_be_asked_for_a_certificate(certificate: Certificate) -> None:
    place = https(certificate, ssl_ca_certs=certificate.file, ssl_cert_reqs="required")
    trust = ssl.create_default_context(cafile=str(certificate.file))
    with answering(place) as port:
        with pytest.raises(httpx.TransportError):
            httpx.get(f"https://127.0.0.1:{port}/health", verify=trust)
        trust.load_cert_chain(certificate.file, certificate.key)
        assert httpx.get(f"https://127.0.0.1:{port}/health", verify=trust).status_code == 200


def test_a_key_with_a_password_and_ciphers(certificate: Certificate) -> None:
    def place(**more: Any) -> Place:
        return Place.of(ServeSettings(ssl_certfile=certificate.file, ssl_keyfile=certificate.locked, **more))

    assert place(ssl_keyfile_password="pass", ssl_ciphers="ECDHE+AESGCM").tls is not None
    for more in ({}, {"ssl_keyfile_password": "wrong"}):
        with pytest.raises(PosteriorError, match="POSTERIOR_SSL_KEYFILE_PASSWORD"):
            place(**more)
    with pytest.raises(PosteriorError, match="OpenSSL knows no cipher of 'x'"):
        place(ssl_keyfile_password="pass", ssl_ciphers="x")


def test_files_that_are_no_certificates(certificate: Certificate, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    other = certify(tmp_path)
    with pytest.raises(PosteriorError, match="there is no file .*nothing; name a file in PEM"):
        Place.of(ServeSettings(ssl_certfile=tmp_path / "nothing"))
    with pytest.raises(PosteriorError, match="cannot be used"):
        Place.of(ServeSettings(ssl_certfile=tmp_path / "empty"))
    with pytest.raises(PosteriorError, match="KEY_VALUES_MISMATCH"):
        Place.of(ServeSettings(ssl_certfile=certificate.file, ssl_keyfile=other.key))
    with pytest.raises(PosteriorError, match="holds no certificates in PEM"):
        https(certificate, ssl_ca_certs=tmp_path / "empty")


def test_below_the_path_of_a_proxy() -> None:
    with answering(Place.of(ServeSettings(port=0, root_path="/llm/"))) as port:
        url = f"http://127.0.0.1:{port}"  # the proxy has taken /llm away
        assert httpx.post(f"{url}/v1/predictive", json=ASK).status_code == 200
        assert httpx.get(f"{url}/openapi.json").json()["servers"] == [{"url": "/llm"}]
        assert httpx.get(f"{url}/docs/start.js").status_code == 200
        assert httpx.get(f"{url}/v1/nothing").status_code == 404
    with answering(Place()) as port:
        assert "servers" not in httpx.get(f"http://127.0.0.1:{port}/openapi.json").json()


def test_the_command_that_is_shown(tmp_path: Path, certificate: Certificate) -> None:
    assert Place("0.0.0.0").curl(5) == "curl http://127.0.0.1:5"
    assert Place("::1").curl(5) == "curl http://[::1]:5" and Place("::").curl(5) == "curl http://[::1]:5"
    assert https(certificate).curl(5) == "curl https://127.0.0.1:5"
    assert Place(uds=Path("/a b")).curl(0) == "curl --unix-socket '/a b' http://localhost"


def test_a_stream_ends_with_an_error_event_when_the_server_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def endless(*_: Any, **__: Any) -> Any:
        async def events() -> Any:
            yield 'data: {"id": "x", "choices": [{"index": 0, "text": "a", "finish_reason": null}]}\n\n'
            await asyncio.sleep(60)

        return events()

    monkeypatch.setattr(fakes.Engine, "complete", endless)
    found: list[str] = []
    body = {"model": "gang/map", "prompt": "x", "stream": True}

    def read(port: int) -> None:
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=20) as response:
            found.append(response.read().decode())

    start = time.monotonic()
    with answering(Place(), 0.2) as port:
        reading = threading.Thread(target=read, args=(port,))
        reading.start()
        time.sleep(0.3)
    reading.join(20)
    *_, last = found[0].strip().split("\n\n")
    assert '"code": "unavailable"' in last and "the server is stopping" in last
    assert time.monotonic() - start < 10
