"""Ports and health with real servers (N-23, N-26): bounded, of the workspace alone, and never anywhere else."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mothball.runtime import Listener, driver_for, handle_of_pid, proc
from mothball.runtime.health import check_health
from mothball.runtime.listeners import MAX_LISTENERS
from mothball.runtime.ports import probe
from tests.integration.runtime.containers import Runc
from tests.integration.runtime.support import Bench
from tests.support import eventually, require_tool

SERVER = """
import http.server, json, ssl, threading
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        with open(os.path.join(folder, "asked"), "a") as log:
            log.write(f"{self.command} {self.path} {self.headers['Host']}\\n")
        if self.path == "/slow":
            time.sleep(5)
        if self.path == "/drip":
            for byte in b"HTTP/1.1 200 OK" * 20:
                self.wfile.write(bytes([byte])); self.wfile.flush(); time.sleep(0.3)
        if self.path == "/garbage":
            self.wfile.write(b"SSH-2.0-x\\r\\n" * 10); return
        status = {"/moved": 302, "/bad": 503}.get(self.path, 200)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", sys.argv[3])
        self.send_header("Content-Length", "0")
        self.end_headers()
    do_HEAD = do_GET
    def log_message(self, *args): pass
def serve(address, tls=False):
    if ":" in address:
        http.server.ThreadingHTTPServer.address_family = 10
    server = http.server.ThreadingHTTPServer((address, 0), Handler)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(sys.argv[2])
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_address[1]
def tell(**ports):
    with open(os.path.join(folder, "ports.new"), "w") as file:
        json.dump(ports, file)
    os.rename(os.path.join(folder, "ports.new"), os.path.join(folder, "ports.json"))
"""


def told(bench: Bench) -> dict[str, int]:
    """The ports that a server wrote down."""
    import json

    path = bench.folder / "ports.json"
    eventually(path.exists, what="the server's ports")
    found: dict[str, int] = json.loads(path.read_text())
    return found


def asked(bench: Bench) -> list[str]:
    path = bench.folder / "asked"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    both = folder / "both.pem"
    subprocess.run(
        [require_tool("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=workspace",
         "-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")],
        check=True, capture_output=True,
    )  # fmt: skip
    both.write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    return both


def test_n26_ports_say_who_listens_and_whether_it_is_https_or_http(bench: Bench, certificate: Path) -> None:
    process = bench.start(
        SERVER
        + """
import os
import socket
mute = socket.create_server(("127.0.0.1", 0))
tell(http=serve("127.0.0.1"), https=serve("0.0.0.0", tls=True), six=serve("::1"), mute=mute.getsockname()[1])
sleep()
""",
        str(certificate),
        "",
    )
    ports = told(bench)
    began = time.monotonic()
    found = probe(bench.driver(process).ports())
    assert time.monotonic() - began < 3
    assert found == sorted(found, key=lambda each: each["port"])
    shown = {each["port"]: (each["address"], each["scheme"], each["url"]) for each in found}
    assert shown == {
        ports["http"]: ("127.0.0.1", "http", f"http://127.0.0.1:{ports['http']}/"),
        ports["https"]: ("0.0.0.0", "https", f"https://0.0.0.0:{ports['https']}/"),
        ports["six"]: ("::1", "http", f"http://[::1]:{ports['six']}/"),
        ports["mute"]: ("127.0.0.1", None, None),
    }
    assert {each["pid"] for each in found} == {process.pid}


def test_n26_many_https_ports_are_all_seen_in_the_one_second(bench: Bench, certificate: Path) -> None:
    process = bench.start(
        SERVER + "\ntell(**{f'p{n}': serve('127.0.0.1', tls=True) for n in range(16)})\nsleep()\n", str(certificate), ""
    )
    ports = told(bench)
    found = probe(bench.driver(process).ports())
    assert {each["port"]: each["scheme"] for each in found} == dict.fromkeys(ports.values(), "https")


def test_n26_a_probe_ends_within_a_second_whatever_the_server_does(bench: Bench) -> None:
    process = bench.start(
        SERVER
        + """
import os
import socket
def drip(server):
    while True:
        peer, _ = server.accept()
        def slowly(peer=peer):
            try:
                for byte in b"HTTP/1.1 200 OK\\r\\n" * 100:
                    peer.send(bytes([byte])); time.sleep(0.3)
            except OSError: pass
        threading.Thread(target=slowly, daemon=True).start()
servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(20)]
for each in servers[:10]:
    threading.Thread(target=drip, args=(each,), daemon=True).start()
tell(one=servers[0].getsockname()[1])
sleep()
""",
        "",
        "",
    )
    told(bench)
    listeners = bench.driver(process).ports()
    assert len(listeners) == 20
    began = time.monotonic()
    found = probe(listeners)
    assert time.monotonic() - began < 2 * 1.5  # two lots of sixteen
    assert [each["scheme"] for each in found] == [None] * 20


def test_n26_a_redirect_is_an_answer_and_is_not_followed(bench: Bench) -> None:
    trap = socket.create_server(("127.0.0.1", 0))
    trap.settimeout(0.5)
    where = f"http://127.0.0.1:{trap.getsockname()[1]}/"
    process = bench.start(SERVER + 'tell(http=serve("127.0.0.1")); sleep()', "", where)
    port = told(bench)["http"]
    driver = bench.driver(process)
    assert [each["scheme"] for each in probe(driver.ports())] == ["http"]
    found = check_health(driver, {"health_url": f"http://127.0.0.1:{port}/moved"})
    assert (found.healthy, found.status) == (False, 302)
    with pytest.raises(TimeoutError):
        trap.accept()
    trap.close()


def test_n26_many_ports_are_capped(bench: Bench) -> None:
    process = bench.start(
        SERVER
        + """
import os
import socket
all = [socket.create_server(("127.0.0.1", 0)) for _ in range(100)]
tell(one=1)
sleep()
""",
        "",
        "",
    )
    told(bench)
    found = bench.driver(process).ports()
    assert len(found) == MAX_LISTENERS
    assert len({each.port for each in found}) == MAX_LISTENERS


def test_a_server_and_its_forked_workers_are_one_listener_and_a_neighbours_port_is_not_listed(bench: Bench) -> None:
    neighbour = socket.create_server(("127.0.0.1", 0))
    process = bench.start(
        SERVER + 'import socket\nserver = socket.create_server(("127.0.0.1", 0))\nos.fork() and os.fork()\n'
        "if os.getpid() != os.getsid(0): sleep()\ntell(one=server.getsockname()[1])\nsleep()", "", "",
    )  # fmt: skip
    port = told(bench)["one"]
    found = bench.driver(process).ports()
    assert [(each.port, each.pid) for each in found] == [(port, process.pid)]
    neighbour.close()


@pytest.mark.parametrize("address", ["192.0.2.1", "8.8.8.8", "2001:db8::1", "somewhere", "::ffff:8.8.8.8"])
def test_an_address_that_is_not_this_networks_is_never_asked(address: str) -> None:
    me = proc.read(os.getpid())
    assert me is not None
    began = time.monotonic()
    found = probe([Listener(address=address, port=80, pid=me.pid, process="x", started=me.started)])
    assert found[0]["scheme"] is None
    assert time.monotonic() - began < 0.5


def test_a_listener_whose_process_nobody_can_see_is_listed_and_not_asked() -> None:
    """What an operator's own driver says: it may be anywhere."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        found = probe([Listener(address="127.0.0.1", port=server.getsockname()[1], pid=None, process="vm")])
        assert found[0]["scheme"] is None
        assert "not asked" in found[0]["note"]
        with pytest.raises(TimeoutError):
            server.accept()


def test_n23_health_follows_the_url_of_the_workspace(bench: Bench) -> None:
    process = bench.start(SERVER + 'tell(http=serve("127.0.0.1")); sleep()', "", "")
    port = told(bench)["http"]
    driver = bench.driver(process)

    def ask(path: str, host: str = "127.0.0.1") -> tuple[bool, int | None, str]:
        found = check_health(driver, {"health_url": f"http://{host}:{port}{path}"})
        return found.healthy, found.status, found.reason

    assert ask("/healthz?full=1")[:2] == (True, 200)
    assert asked(bench) == [f"GET /healthz?full=1 127.0.0.1:{port}"]
    assert ask("/healthz", host="localhost")[:2] == (True, 200)
    assert ask("/bad")[:2] == (False, 503)
    healthy, status, reason = ask("/garbage")
    assert (healthy, status) == (False, None)
    assert "does not speak HTTP" in reason
    for path in ("/slow", "/drip"):
        began = time.monotonic()
        healthy, _, reason = ask(path)
        assert not healthy
        assert "within 1 s" in reason
        assert time.monotonic() - began < 1.5
    process.kill()
    process.wait()
    found = check_health(driver, {"health_url": f"http://127.0.0.1:{port}/healthz"})
    assert (found.healthy, found.alive, found.sure) == (False, False, True)


def test_n23_a_health_url_with_https_is_asked_without_trusting_anybody(bench: Bench, certificate: Path) -> None:
    process = bench.start(SERVER + 'tell(https=serve("127.0.0.1", tls=True)); sleep()', str(certificate), "")
    port = told(bench)["https"]
    assert check_health(bench.driver(process), {"health_url": f"https://127.0.0.1:{port}/"}).healthy
    wrong = check_health(bench.driver(process), {"health_url": f"http://127.0.0.1:{port}/"})
    assert not wrong.healthy


def test_a_health_url_of_somebody_elses_port_is_not_asked(bench: Bench) -> None:
    """Anybody's text could else make a worker send requests to every service of its own host."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.3)
        process = bench.start("say('up'); sleep()")
        bench.said("up")
        found = check_health(bench.driver(process), {"health_url": f"http://127.0.0.1:{other.getsockname()[1]}/shutdown"})
        assert not found.healthy
        assert "nothing of the workspace listens" in found.reason
        with pytest.raises(TimeoutError):
            other.accept()


def test_a_health_url_on_an_address_of_this_host_is_asked_there_and_one_off_the_host_never(bench: Bench) -> None:
    own = [
        each.address for group in psutil.net_if_addrs().values() for each in group
        if each.family == socket.AF_INET and not each.address.startswith("127.")
    ]  # fmt: skip
    process = bench.start(SERVER + 'tell(http=serve("0.0.0.0")); sleep()', "", "")
    port = told(bench)["http"]
    driver = bench.driver(process)
    for address in own[:1]:
        assert check_health(driver, {"health_url": f"http://{address}:{port}/"}).healthy
    found = check_health(driver, {"health_url": f"http://192.0.2.7:{port}/"})
    assert not found.healthy
    assert "no address of the workspace's network" in found.reason


@pytest.fixture
def runc(tmp_path: Path) -> Iterator[Runc]:
    made = Runc(tmp_path / "runc")
    yield made
    made.end()


def test_a_container_is_asked_in_its_own_network_and_the_worker_stays_in_its_own(runc: Runc, bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]  # the same port here is somebody else's
        name = runc.start(f"httpd -f -p 127.0.0.1:{port} -h /www")
        driver = driver_for(runc.handle(name), bench.settings)
        eventually(driver.ports)
        before = proc.namespace("net")
        found = probe(driver.ports())
        assert [(each["port"], each["scheme"], each["process"]) for each in found] == [(port, "http", "httpd")]
        assert found[0]["netns"] != before
        health = check_health(driver, {"health_url": f"http://127.0.0.1:{port}/index.html"})
        assert (health.healthy, health.status) == (True, 200)
        assert check_health(driver, {"health_url": f"http://127.0.0.1:{port}/nothing"}).status == 404
        assert proc.namespace("net") == before
        assert threading.active_count() < 50
        taken.settimeout(0.3)
        with pytest.raises(TimeoutError):
            taken.accept()


def test_the_network_of_a_process_that_has_ended_is_not_entered(bench: Bench) -> None:
    process = bench.start("say('up'); sleep()")
    bench.said("up")
    handle = handle_of_pid(process.pid)
    wrong = int(str(handle["start_time"])) + 1
    listener = Listener(address="127.0.0.1", port=80, pid=process.pid, process="x", started=wrong, netns="net:[1]")
    found = probe([listener])
    assert found[0]["scheme"] is None
    assert found[0]["note"] == "not asked: its process has ended"


def test_tls_of_the_probe_trusts_nothing_and_sends_no_name(bench: Bench, certificate: Path) -> None:
    """What a probe says of itself: no SNI, no client certificate."""
    seen: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.sni_callback = lambda _socket, name, _context: seen.append(name)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def once() -> None:
            peer, _ = server.accept()
            with context.wrap_socket(peer, server_side=True) as secure:
                secure.recv(100)
                secure.send(b"HTTP/1.1 204 No Content\r\n\r\n")

        thread = threading.Thread(target=once)
        thread.start()
        me = proc.read(os.getpid())
        assert me is not None
        found = probe([Listener(address="127.0.0.1", port=server.getsockname()[1], pid=me.pid, process="x", started=me.started)])
        thread.join(5)
    assert found[0]["scheme"] == "https"
    assert seen == [None]
