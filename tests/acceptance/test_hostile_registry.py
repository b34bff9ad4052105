"""A registry that is an enemy: endless answers, answers a byte at a time, redirects to anywhere, numbers out of this world."""

from __future__ import annotations

import gzip
import logging
import os
import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest

from mothball.errors import Cancelled, Corrupt, InvalidParams, MothballError, OperationFailed, RegistryDenied, RegistryUnavailable
from mothball.package import distribution, upload, wire
from mothball.package.remote import pull, push
from mothball.package.repair import repair
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.manifest import MEDIA_MANIFEST
from tests.acceptance.registry import PASSWORD, USER, ImageRegistry, certificate, docker_config, image_registry
from tests.unit.store.build import Dir, File, capture, damage, layer, new_store

__all__ = ["image_registry"]
OFFERED = 200 * 1024**2
ENOUGH = 24 * 1024**2
"""What fits into the buffers between two sockets, and more; an answer that was read as a whole is far above."""


class Liar:
    """A server on loopback that answers as it is told; `seen` is who asked what with which login. Of a longer request than `takes`
    it takes the rest a byte at a time."""

    def __init__(self, answer: Callable[[Any], None], takes: int = OFFERED, tls: Path | None = None) -> None:
        liar = self
        self.seen: list[tuple[str, str, str | None]] = []
        self.sent = 0

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                """Nothing on stderr."""

            def handle_any(self) -> None:
                liar.seen.append((self.command, self.path, self.headers.get("Authorization")))
                length = int(self.headers.get("Content-Length") or 0)
                self.rfile.read(min(length, takes))
                while length > takes and self.rfile.read(1):
                    time.sleep(0.02)
                answer(self)

            def say(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
                self.send_response_only(status)
                for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def endless(self, status: int, headers: dict[str, str] | None = None) -> None:
                self.send_response_only(status)
                for name, value in {"Transfer-Encoding": "chunked", **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                piece = b"x" * 1024**2
                for _ in range(OFFERED // len(piece)):
                    self.wfile.write(b"100000\r\n" + piece + b"\r\n")
                    liar.sent += len(piece)
                self.wfile.write(b"0\r\n\r\n")

        for method in ("GET", "HEAD", "POST", "PUT", "PATCH"):
            setattr(Handler, f"do_{method}", Handler.handle_any)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls / "cert.pem", tls / "key.pem")
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(upload, "CHUNK", 64 * 1024)


@pytest.fixture
def settings(make_settings: Callable[..., Settings], tmp_path: Path) -> Settings:
    return make_settings(docker_config=tmp_path / "docker.json")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "store")


def transfer(store: Store, settings: Settings, address: str, direction: str, **more: Any) -> None:
    if direction == "push":
        push(
            store,
            capture(store, layer({b"": Dir(), b"f": File(os.urandom(200_000))}, frame_bytes=32 * 1024)),
            f"{address}/a:1",
            settings,
            **more,
        )
    else:
        pull(store, f"{address}/a:1", settings, **more)


# -- too much -----------------------------------------------------------------------------------------------------------


def _endless_token(ask: Any) -> None:
    if ask.path.startswith("/token"):
        ask.endless(200)
    else:
        ask.say(401, {"Www-Authenticate": f'Bearer realm="http://{ask.headers["Host"]}/token",service="x"'})


@pytest.mark.parametrize(
    ("direction", "answer"),
    [
        ("pull", lambda ask: ask.endless(418)),
        ("pull", lambda ask: ask.endless(503)),
        ("pull", lambda ask: ask.endless(401, {"Www-Authenticate": "Basic realm=x"})),
        ("pull", lambda ask: ask.endless(307, {"Location": "/elsewhere"})),
        ("pull", lambda ask: ask.endless(200, {"Content-Type": MEDIA_MANIFEST})),
        ("pull", _endless_token),
        ("push", lambda ask: ask.say(404) if ask.command == "HEAD" else ask.endless(202, {"Location": "/v2/a/up"})),
    ],
    ids=["error", "trouble", "refusal", "redirect", "manifest", "token", "confirmation"],
)
def test_an_answer_without_end_is_read_to_its_limit_only(
    store: Store, settings: Settings, direction: str, answer: Callable[[Any], None]
) -> None:
    with Liar(answer) as liar:
        with pytest.raises(MothballError):
            transfer(store, settings, liar.address, direction)
        time.sleep(0.1)
        assert liar.sent / len(liar.seen) < ENOUGH


def test_a_blob_is_read_to_its_size_and_never_decoded(
    store: Store, settings: Settings, tmp_path: Path, image_registry: ImageRegistry
) -> None:
    """A gzip of zeros as the encoding of a blob: a kilobyte that would become a megabyte."""
    blob = layer({b"": Dir(), b"f": File(b"x" * 5000)})
    digest = capture(store, blob)
    push(store, digest, f"{image_registry.address}/a:1", settings)
    bomb = gzip.compress(bytes(1024**2))

    def answer(ask: Any) -> None:
        if "/manifests/" in ask.path:
            ask.say(200, {"Content-Type": MEDIA_MANIFEST}, store.blobs.read(digest))
        elif blob.digest not in ask.path:
            ask.say(200, {}, store.blobs.read(ask.path.rpartition("/")[2]))
        elif what == "bomb":
            ask.say(200, {"Content-Encoding": "gzip"}, bomb)
        else:
            ask.endless(200)

    for what in ("bomb", "endless"):
        with Liar(answer) as liar:
            there = new_store(tmp_path / what)
            with pytest.raises(Corrupt, match=blob.digest):
                pull(there, f"{liar.address}/a:1", settings)
            assert liar.sent < ENOUGH * 2


# -- too slow -----------------------------------------------------------------------------------------------------------


def _drip(ask: Any, beginning: bytes) -> None:
    ask.wfile.write(beginning)
    while True:
        ask.wfile.write(b" ")
        ask.wfile.flush()
        time.sleep(0.02)


SLOW = {
    "headers": lambda ask: _drip(ask, b"HTTP/1.1 200 OK\r\nX-Slow: "),
    "body": lambda ask: _drip(ask, b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"),
    "chunks": lambda ask: _drip(ask, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n100000\r\n"),
    "error": lambda ask: _drip(ask, b"HTTP/1.1 418 No\r\nContent-Length: 1000000\r\n\r\n"),
}


@pytest.mark.parametrize("answer", SLOW.values(), ids=SLOW)
def test_a_registry_that_sends_a_byte_at_a_time_is_given_up(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch, answer: Callable[[Any], None]
) -> None:
    monkeypatch.setattr(distribution, "READ_SECONDS", 0.3)
    with Liar(answer) as liar, pytest.raises((RegistryUnavailable, OperationFailed)) as caught:
        transfer(store, settings, liar.address, "pull")
    assert "sends less than 65,536 bytes in 0.3 s" in str(caught.value) or "418" in str(caught.value)


def test_a_registry_that_takes_next_to_nothing_is_given_up(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch, tls: Path | None = None
) -> None:
    monkeypatch.setattr(distribution, "READ_SECONDS", 0.3)
    monkeypatch.setattr(distribution, "TRIES", 1)
    monkeypatch.setattr(upload, "TRIES", 1)
    monkeypatch.setattr(upload, "CHUNK", 32 * 1024**2)
    digest = capture(store, layer({b"": Dir(), b"f": File(os.urandom(20 * 1024**2))}, frame_bytes=1024**2))

    def answer(ask: Any) -> None:
        ask.say({"HEAD": 404, "POST": 202, "PUT": 201}[ask.command], {"Location": "/u"})

    with (
        Liar(answer, takes=1024**2, tls=tls) as liar,
        pytest.raises(RegistryUnavailable, match=r"takes less than|no answer within"),
    ):
        push(store, digest, f"{liar.address}/a:1", settings)


@pytest.mark.parametrize(
    ("direction", "answer"),
    [*(("pull", answer) for answer in SLOW.values()), ("pull", lambda _: time.sleep(30)),
     ("push", SLOW["headers"]), ("push", lambda _: time.sleep(30))],
    ids=[*SLOW, "silence", "push-headers", "push-silence"],
)  # fmt: skip
def test_a_cancel_is_heard_while_a_registry_is_waited_for(
    store: Store, settings: Settings, answer: Callable[[Any], None], direction: str
) -> None:
    began = time.monotonic()

    def cancelled(**_: Any) -> None:
        if time.monotonic() - began > 0.3:
            raise Cancelled(job="1")

    with Liar(answer) as liar, pytest.raises(Cancelled):
        transfer(store, settings, liar.address, direction, progress=cancelled)
    assert time.monotonic() - began < 3


def test_a_cancel_is_heard_while_a_token_is_waited_for(store: Store, settings: Settings) -> None:
    began = time.monotonic()

    def cancelled(**_: Any) -> None:
        if time.monotonic() - began > 0.3:
            raise Cancelled(job="1")

    def answer(ask: Any) -> None:
        if ask.path.startswith("/token"):
            time.sleep(30)
        ask.say(401, {"Www-Authenticate": f'Bearer realm="http://{ask.headers["Host"]}/token",service="x"'})

    with Liar(answer) as liar, pytest.raises(Cancelled):
        transfer(store, settings, liar.address, "pull", progress=cancelled)
    assert time.monotonic() - began < 3


def test_an_upload_that_never_gets_farther_ends(store: Store, settings: Settings) -> None:
    """Each part is taken with thanks, and the registry says that it has one byte."""

    def answer(ask: Any) -> None:
        if ask.command == "HEAD":
            ask.say(404)
        elif ask.command == "PUT":
            ask.say(201)
        else:
            ask.say(204 if ask.command == "GET" else 202, {"Location": "/v2/a/up", "Range": "0-0"})

    with Liar(answer) as liar, pytest.raises(RegistryUnavailable):
        transfer(store, settings, liar.address, "push")
    assert len(liar.seen) < 100


def test_an_upload_that_gets_a_byte_farther_each_time_ends(store: Store, settings: Settings) -> None:
    state = [0]

    def answer(ask: Any) -> None:
        state[0] += 1
        if ask.command == "HEAD":
            ask.say(404)
        elif ask.command == "PUT":
            ask.say(201)
        elif ask.command == "PATCH":
            ask.say(503)
        else:
            ask.say(204 if ask.command == "GET" else 202, {"Location": "/v2/a/up", "Range": f"0-{state[0]}"})

    with Liar(answer) as liar, pytest.raises(RegistryUnavailable):
        transfer(store, settings, liar.address, "push")
    assert len(liar.seen) < 100


# -- by TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A certificate that is trusted, and loopback taken for any other place."""
    folder = certificate(tmp_path / "tls")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(folder / "cert.pem"))
    monkeypatch.setattr(distribution, "is_insecure", lambda *_: False)
    return folder


def test_a_registry_by_tls_takes_and_gives(store: Store, settings: Settings, tmp_path: Path, tls: Path) -> None:
    digest = capture(store, layer({b"": Dir(), b"f": File(os.urandom(5 * 1024**2))}, frame_bytes=1024**2))
    with ImageRegistry(tmp_path / "registry", tls=tls) as registry:
        push(store, digest, f"{registry.address}/a:1", settings)
        there = new_store(tmp_path / "there")
        assert pull(there, f"{registry.address}/a:1", settings).digest == digest


@pytest.mark.parametrize("answer", [*SLOW.values(), lambda _: time.sleep(30)], ids=[*SLOW, "silence"])
def test_a_cancel_is_heard_by_tls_too(store: Store, settings: Settings, tls: Path, answer: Callable[[Any], None]) -> None:
    began = time.monotonic()

    def cancelled(**_: Any) -> None:
        if time.monotonic() - began > 0.3:
            raise Cancelled(job="1")

    with Liar(answer, tls=tls) as liar, pytest.raises(Cancelled):
        transfer(store, settings, liar.address, "pull", progress=cancelled)
    assert time.monotonic() - began < 3


def test_a_registry_by_tls_that_takes_next_to_nothing_is_given_up(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch, tls: Path
) -> None:
    test_a_registry_that_takes_next_to_nothing_is_given_up(store, settings, monkeypatch, tls)


def test_from_tls_nothing_leads_to_plain_http(store: Store, settings: Settings, tls: Path) -> None:
    with Liar(lambda ask: ask.say(200)) as stranger:
        plain = Liar(lambda ask: ask.say(307, {"Location": f"http://{stranger.address}/x"}), tls=tls)
        with plain as liar, pytest.raises(OperationFailed, match="to an address without TLS"):
            transfer(store, settings, liar.address, "pull")

        def answer(ask: Any) -> None:
            if ask.path.startswith("/token"):
                ask.say(307, {"Location": f"http://{stranger.address}/token"})
            else:
                ask.say(401, {"Www-Authenticate": f'Bearer realm="https://{ask.headers["Host"]}/token"'})

        with Liar(answer, tls=tls) as liar, pytest.raises((RegistryUnavailable, RegistryDenied)):
            transfer(store, settings, liar.address, "pull")
        assert stranger.seen == []


# -- elsewhere ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["pull", "push"])
@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("file:///etc/passwd", "no address of HTTP"),
        ("ftp://127.0.0.1/x", "no address of HTTP"),
        ("http://[", "no address of HTTP"),
        ("http://:99999999/", "no address of HTTP"),
        ("//", "no address of HTTP|more than 10 times"),
        ("/v2/", "more than 10 times"),
    ],
)
def test_a_redirect_that_leads_nowhere_is_said_as_such(
    store: Store, settings: Settings, direction: str, location: str, reason: str
) -> None:
    with Liar(lambda ask: ask.say(307, {"Location": location})) as liar:
        with pytest.raises(OperationFailed, match=reason) as caught:
            transfer(store, settings, liar.address, direction)
        assert liar.address in str(caught.value)
        assert len(liar.seen) < 20


def test_the_login_goes_to_the_registry_and_nobody_else(
    store: Store, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    """Blobs come from where the registry sends one to, and neither that place nor a log learns the login; nor a .netrc's."""
    caplog.set_level(logging.DEBUG)
    (tmp_path / ".netrc").write_text("default login somebody password fromnetrc\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    digest = capture(store, layer({b"": Dir(), b"f": File(b"x" * 5000)}))

    def storage(ask: Any) -> None:
        ask.say(200, {}, store.blobs.read(ask.path.partition("?")[0].rpartition("/")[2]))

    def answer(ask: Any) -> None:
        if ask.headers.get("Authorization") is None:
            ask.say(401, {"Www-Authenticate": "Basic realm=x"})
        elif "/manifests/" in ask.path:
            ask.say(200, {"Content-Type": MEDIA_MANIFEST}, store.blobs.read(digest))
        else:
            ask.say(307, {"Location": f"http://{stranger.address}{ask.path}?signature=capability"})

    with Liar(storage) as stranger, Liar(answer) as liar:
        docker_config(settings.docker_config, liar.address)
        assert pull(new_store(tmp_path / "there"), f"{liar.address}/a:1", settings).fetched == 2
    assert stranger.seen
    assert all(login is None for _, _, login in stranger.seen)
    shown = capfd.readouterr()
    text = caplog.text + shown.out + shown.err
    assert not any(secret in text for secret in (PASSWORD, "capability", "Basic ", "fromnetrc", f"{USER}:"))


def test_a_token_server_that_sends_on_does_not_send_the_login_along(store: Store, settings: Settings) -> None:
    def answer(ask: Any) -> None:
        if ask.path.startswith("/token"):
            ask.say(307, {"Location": f"http://{stranger.address}/token"})
        else:
            ask.say(401, {"Www-Authenticate": f'Bearer realm="http://{ask.headers["Host"]}/token",service="x"'})

    with Liar(lambda ask: ask.say(200, {}, b'{"token":"t"}')) as stranger, Liar(answer) as liar:
        docker_config(settings.docker_config, liar.address)
        with pytest.raises(RegistryDenied):
            transfer(store, settings, liar.address, "pull")
        assert any(login for _, path, login in liar.seen if path.startswith("/token"))
        assert stranger.seen
        assert all(login is None for _, _, login in stranger.seen)


def test_a_login_is_not_asked_for_by_where_one_is_sent_to(store: Store, settings: Settings) -> None:
    """The challenge of a stranger would name a token server of the stranger's."""
    with Liar(lambda ask: ask.say(401, {"Www-Authenticate": f'Bearer realm="http://{ask.headers["Host"]}/t"'})) as stranger:
        with Liar(lambda ask: ask.say(307, {"Location": f"http://{stranger.address}/x"})) as liar:
            docker_config(settings.docker_config, liar.address)
            with pytest.raises(RegistryDenied):
                transfer(store, settings, liar.address, "pull")
        assert all(login is None for _, _, login in stranger.seen)


def test_a_token_that_cannot_be_read_is_said_as_such(store: Store, settings: Settings) -> None:
    with Liar(_endless_token) as liar, pytest.raises(RegistryUnavailable, match="gave no token that can be read"):
        transfer(store, settings, liar.address, "pull")


@pytest.mark.parametrize("realm", ["http://[", "http:", "", "file:///etc/passwd", "nonsense"])
def test_a_challenge_that_names_no_token_server_is_a_refusal(store: Store, settings: Settings, realm: str) -> None:
    with Liar(lambda ask: ask.say(401, {"Www-Authenticate": f'Bearer realm="{realm}"'})) as liar, pytest.raises(RegistryDenied):
        transfer(store, settings, liar.address, "pull")


# -- numbers and documents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["9" * 5000, "-1", "\xb2", "1e9", ""])
def test_numbers_out_of_this_world_are_none(store: Store, settings: Settings, number: str) -> None:
    def answer(ask: Any) -> None:
        ask.send_response_only(503 if ask.command == "GET" else 200 if ask.command == "HEAD" else 202)
        for name in ("Retry-After", "Range", "OCI-Chunk-Min-Length"):
            ask.send_header(name, number)
        ask.send_header("Content-Length", number if ask.command == "HEAD" else "0")
        ask.send_header("Location", "/v2/a/up")
        ask.end_headers()

    for direction in ("pull", "push"):
        with Liar(answer) as liar, pytest.raises((RegistryUnavailable, OperationFailed, Corrupt)):
            transfer(store, settings, liar.address, direction)


@pytest.mark.parametrize("extra", ['"\\ud800"', "[" * 100_000 + "]" * 100_000], ids=["surrogate", "deep"])
def test_a_manifest_or_token_that_is_hostile_json_ends_the_pull(store: Store, settings: Settings, extra: str) -> None:
    document = '{"schemaVersion":2,"config":{},"layers":[],"token":' + extra + "}"
    manifest = Liar(lambda ask: ask.say(200, {"Content-Type": MEDIA_MANIFEST}, document.encode()))
    with manifest as liar, pytest.raises(InvalidParams, match=r"its manifest cannot be read \("):
        transfer(store, settings, liar.address, "pull")

    def token(ask: Any) -> None:
        if ask.path.startswith("/token"):
            ask.say(200, {}, document.encode()[: wire.ANSWER_LIMIT])
        else:
            ask.say(401, {"Www-Authenticate": f'Bearer realm="http://{ask.headers["Host"]}/token"'}, document.encode())

    with Liar(token) as liar, pytest.raises((RegistryUnavailable, RegistryDenied)):
        transfer(store, settings, liar.address, "pull")


# -- repair -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 10, 2**60])
def test_a_registry_that_lies_about_sizes_repairs_nothing_and_breaks_nothing(store: Store, settings: Settings, size: int) -> None:
    blob = layer({b"": Dir(), b"f": File(b"x" * 5000)})
    capture(store, blob)
    damage(store, blob.digest, at=70)
    before = store.blobs.path(blob.digest).read_bytes()

    def answer(ask: Any) -> None:
        ask.send_response_only(200)
        ask.send_header("Content-Length", str(size))
        ask.end_headers()
        if ask.command == "GET":
            ask.wfile.write(b"y" * min(size, 1000))
        ask.close_connection = True

    with Liar(answer) as liar:
        done = repair(store, [blob.digest], f"{liar.address}/a", settings)
    assert done.repaired == []
    assert [digest for digest, _ in done.failed] == [blob.digest]
    assert store.blobs.path(blob.digest).read_bytes() == before
    assert list(store.blobs.temp.iterdir()) == []
