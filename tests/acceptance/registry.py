"""A real registry for tests, and somebody between it and its client who makes trouble."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.support import eventually, require_tool

USER, PASSWORD = "mothball", "correct horse"
# bcrypt of PASSWORD, made once: no program of this project makes such hashes.
HTPASSWD = f"{USER}:$2b$05$abcdefghijklmnopqrstuuHNbAKRhpaujgo33bRWs.NLUTJO3lOy2\n"


class ImageRegistry:
    """docker-registry on loopback, its blobs below `folder`; `auth` is its configuration of who may do what, `tls` the folder
    of its `certificate`."""

    def __init__(self, folder: Path, auth: dict[str, Any] | None = None, tls: Path | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        http: dict[str, Any] = {"addr": self.address, "secret": "of this test only"}
        if tls is not None:
            http["tls"] = {"certificate": str(tls / "cert.pem"), "key": str(tls / "key.pem")}
        document = {
            "version": 0.1,
            "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": str(folder / "data")}, "delete": {"enabled": True}},
            "http": http,
        }
        config = folder / "registry.json"  # JSON is YAML
        config.write_text(json.dumps(document | ({"auth": auth} if auth else {})))
        self._command = [require_tool("docker-registry"), "serve", str(config)]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Serve; the blobs of a registry that was stopped are there again."""
        with (self.folder / "log").open("ab") as log:
            process = self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        eventually(lambda: process.poll() is not None or answers(self.address), seconds=20, what="the registry")
        assert process.poll() is None, (self.folder / "log").read_text()

    def stop(self) -> None:
        """End it and wait."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    def blob(self, digest: str) -> Path:
        """Where it keeps a blob."""
        return self.folder / "data/docker/registry/v2/blobs/sha256" / digest[7:9] / digest[7:] / "data"


def answers(address: str) -> bool:
    name, _, port = address.partition(":")
    try:
        socket.create_connection((name, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def htpasswd(folder: Path) -> dict[str, Any]:
    """The configuration under which only USER with PASSWORD may do anything."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "htpasswd").write_text(HTPASSWD)
    return {"htpasswd": {"realm": "Registry Realm", "path": str(folder / "htpasswd")}}


def docker_config(path: Path, registry: str, password: str = PASSWORD) -> Path:
    """docker's config file with a login for `registry`."""
    packed = base64.b64encode(f"{USER}:{password}".encode()).decode()
    path.write_text(json.dumps({"auths": {registry: {"auth": packed}}}))
    return path


class Request(NamedTuple):
    """What the client asked for."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Fault:
    """What happens to one request: each field is one kind of trouble."""

    status: int = 0
    cut_request: int = -1
    cut_answer: int = -1
    short_answer: int = -1
    flip: bool = False
    longer: bytes = b""
    no_range: bool = False
    lose_answer: bool = False
    headers: dict[str, str] = field(default_factory=dict)


Rule = Callable[[Request], Fault | None]


class Middleman:
    """A proxy in front of a registry at `address`; `rule` says what goes wrong. `requests` is what came by."""

    def __init__(self, upstream: str, rule: Rule | None = None) -> None:
        self.upstream = upstream
        self.rule: Rule = rule or (lambda _: None)
        self.requests: list[Request] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        # A client that hangs up in the middle is what these tests are about, and nothing to print.
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def count(self, method: str, part: str = "") -> int:
        """How many requests of `method` with `part` in their path came by."""
        return sum(1 for request in self.requests if request.method == method and part in request.path)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        middle = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                """Nothing on stderr."""

            def handle_any(self) -> None:
                # skopeo says Accept once for each type; a header that comes several times means their list.
                headers = {name: ", ".join(self.headers.get_all(name, [])) for name in self.headers}
                request = Request(self.command, self.path, headers)
                middle.requests.append(request)
                middle.pass_on(self, request, middle.rule(request) or Fault())

        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"):
            setattr(Handler, f"do_{method}", Handler.handle_any)
        return Handler

    def pass_on(self, client: BaseHTTPRequestHandler, request: Request, fault: Fault) -> None:
        """One request to the registry and its answer back, with what `fault` does to either."""
        length = int(client.headers.get("Content-Length", 0))
        if fault.status:
            client.rfile.read(length)
            self._answer(client, fault.status, fault.headers, b"{}")
            return
        if fault.cut_request >= 0:
            self._send_part(request, client.rfile.read(min(length, fault.cut_request)))
            client.close_connection = True
            client.connection.shutdown(socket.SHUT_RDWR)
            return
        headers = {name: value for name, value in request.headers.items() if not (fault.no_range and name.lower() == "range")}
        upstream = http.client.HTTPConnection(self.upstream, timeout=30)
        try:
            upstream.request(request.method, request.path, body=client.rfile.read(length), headers=headers)
            answer = upstream.getresponse()
            body = answer.read()
            found = dict(answer.getheaders())
        finally:
            upstream.close()
        if fault.lose_answer:
            client.close_connection = True
            client.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault.flip and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        body += fault.longer
        declared = len(body)
        if fault.short_answer >= 0:
            body = body[: fault.short_answer]
            declared = len(body)
        self._answer(client, answer.status, found, body, declared=declared, cut=fault.cut_answer, head=request.method == "HEAD")

    def _answer(
        self,
        client: BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str],
        body: bytes,
        *,
        declared: int | None = None,
        cut: int = -1,
        head: bool = False,
    ) -> None:
        client.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in {"content-length", "transfer-encoding", "connection"}:
                client.send_header(name, value)
        told = next((value for name, value in headers.items() if name.lower() == "content-length"), "0")
        client.send_header("Content-Length", told if head else str(len(body) if declared is None else declared))
        client.end_headers()
        if not head:
            client.wfile.write(body if cut < 0 else body[:cut])
        if 0 <= cut < len(body):
            client.wfile.flush()
            client.close_connection = True
            client.connection.shutdown(socket.SHUT_RDWR)

    def _send_part(self, request: Request, part: bytes) -> None:
        """Send the registry a part of a request that promised more, then hang up, as a broken line does."""
        upstream = http.client.HTTPConnection(self.upstream, timeout=30)
        upstream.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            upstream.putheader(name, value)
        upstream.endheaders(part)
        time.sleep(0.2)  # it must have taken in what came before it notices that no more comes
        upstream.close()


def certificate(folder: Path) -> Path:
    """A folder with ``key.pem`` and ``cert.pem`` of a server on loopback, which signs itself."""
    folder.mkdir(parents=True)
    made = [
        require_tool("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(folder / "key.pem"),
        "-out", str(folder / "cert.pem"), "-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
    ]  # fmt: skip
    subprocess.run(made, check=True, capture_output=True, timeout=60)
    return folder


class TokenServer:
    """Gives out bearer tokens for the scope that is asked for, signed by a key of its own, to USER with PASSWORD."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._key, cert = folder / "key.pem", folder / "cert.pem"
        made = [
            require_tool("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(self._key), "-out", str(cert),
            "-days", "2", "-subj", "/CN=tokens of this test",
        ]  # fmt: skip
        subprocess.run(made, check=True, capture_output=True, timeout=60)
        lines = cert.read_text().split("-----")[2]
        self._chain = ["".join(lines.split())]
        self.asked: list[tuple[str, bool]] = []
        """Scopes that were asked for, and whether by USER."""
        self.seconds = 300
        self.status = 200
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        realm = f"http://127.0.0.1:{self._server.server_address[1]}/token"
        self.auth = {"token": {"realm": realm, "service": "registry", "issuer": "issuer", "rootcertbundle": str(cert)}}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def token(self, scope: str) -> str:
        """A signed token for the scopes in `scope`, separated by spaces."""
        parts = [one.split(":") for one in scope.split()]
        access = [{"type": kind, "name": name, "actions": actions.split(",")} for kind, name, actions in parts]
        now = int(time.time())
        claims = {
            "iss": "issuer",
            "sub": USER,
            "aud": "registry",
            "exp": now + self.seconds,
            "nbf": now - 60,
            "iat": now,
            "jti": "1",
        }
        header = {"typ": "JWT", "alg": "RS256", "x5c": self._chain}
        text = ".".join(_packed(json.dumps(part).encode()) for part in (header, {**claims, "access": access}))
        sign = [require_tool("openssl"), "dgst", "-sha256", "-sign", str(self._key)]
        signed = subprocess.run(sign, input=text.encode(), check=True, capture_output=True, timeout=60).stdout
        return f"{text}.{_packed(signed)}"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self
        expected = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                """Nothing on stderr."""

            def do_GET(self) -> None:
                scope = parse_qs(urlsplit(self.path).query).get("scope", [""])[0]
                known = self.headers.get("Authorization") == expected
                server.asked.append((scope, known))
                status = server.status if known else 401
                body = json.dumps({"token": server.token(scope)} if status == 200 else {}).encode()
                self.send_response_only(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        return Handler


def _packed(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@pytest.fixture
def image_registry(tmp_path: Path) -> Any:
    """A registry that lets everybody in."""
    with ImageRegistry(tmp_path / "image-registry") as registry:
        yield registry
