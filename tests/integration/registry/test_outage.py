"""Redis away, frozen, full or new: one clear error in time, and no write twice."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import pytest

from mothball.errors import MothballError, OperationFailed, Unavailable
from mothball.registry import Registry
from mothball.settings import Settings
from tests.integration.registry.support import Bench
from workers.redis_server import RedisServer

CALLS: dict[str, Callable[[Registry], object]] = {
    "ping": lambda r: r.ping(),
    "time": lambda r: r.time_ms(),
    "register": lambda r: r.workspaces.register("a", host="h1", path="/a"),
    "get": lambda r: r.workspaces.get("a"),
    "list": lambda r: r.workspaces.list(),
    "submit": lambda r: r.jobs.submit("t", {}, workspace=None),
    "job": lambda r: r.jobs.get("j"),
    "claim": lambda r: r.jobs.claim("j", host="h", worker="w", lease_ms=1000),
    "hosts": lambda r: r.hosts.list(),
    "events": lambda r: r.events.list(),
    "follow": lambda r: list(r.events.follow(timeout=1)),
    "counters": lambda r: r.counters.all(),
    "slots": lambda r: r.slots.claim("s", 1000),
}
PASSWORD = "s3cret-word"


@pytest.fixture
def frozen_bench(private_redis: RedisServer, make_settings: Callable[..., Settings]) -> Bench:
    return Bench(make_settings(redis_timeout=0.7))


@pytest.mark.parametrize("call", CALLS)
def test_redis_down_is_unavailable_at_once_and_tells_no_password(make_settings: Callable[..., Settings], call: str) -> None:
    registry = Registry.connect(make_settings(redis_url=f"redis://someone:{PASSWORD}@127.0.0.1:1"))
    start = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        CALLS[call](registry)
    registry.close()
    assert time.monotonic() - start < 10
    text = f"{caught.value.message} {caught.value.to_dict()} {caught.value!r}"
    assert PASSWORD not in text
    assert "someone" not in text
    assert "127.0.0.1:1" in caught.value.message
    assert caught.value.__cause__ is None


def test_a_wrong_password_is_unavailable_and_not_shown(redis_server: RedisServer, make_settings: Callable[..., Settings]) -> None:
    registry = Registry.connect(make_settings(redis_url=f"redis://:{PASSWORD}@127.0.0.1:{redis_server.port}"))
    with pytest.raises(Unavailable) as caught:
        registry.ping()
    registry.close()
    assert PASSWORD not in str(caught.value)


def test_something_that_is_no_redis_is_unavailable(make_settings: Callable[..., Settings]) -> None:
    def answer(server: socket.socket) -> None:
        peer, _ = server.accept()
        with peer:
            peer.recv(1000)
            peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,))
        thread.start()
        url = f"redis://127.0.0.1:{server.getsockname()[1]}"
        with Registry.connect(make_settings(redis_url=url)) as registry, pytest.raises(Unavailable) as caught:
            registry.ping()
        thread.join()
    assert "no Redis" in caught.value.message


@pytest.mark.parametrize("call", ["ping", "submit", "follow", "list"])
def test_a_frozen_redis_is_unavailable_within_the_timeout(private_redis: RedisServer, frozen_bench: Bench, call: str) -> None:
    CALLS[call](frozen_bench.registry)
    private_redis.freeze()
    try:
        start = time.monotonic()
        with pytest.raises(Unavailable):
            CALLS[call](frozen_bench.registry)
        assert time.monotonic() - start < 3
        fresh = frozen_bench.another()  # and for one that has to connect first
        with pytest.raises(Unavailable):
            CALLS[call](fresh)
        assert time.monotonic() - start < 6
    finally:
        private_redis.thaw()
    assert frozen_bench.registry.ping()
    frozen_bench.close()


def test_a_write_to_a_frozen_redis_is_applied_at_most_once(private_redis: RedisServer, frozen_bench: Bench) -> None:
    bench = frozen_bench
    bench.workspace("o/r#1")
    bench.submit()  # scripts are loaded, the connection is open
    private_redis.freeze()
    try:
        with pytest.raises(Unavailable):
            bench.submit(job_id="late")
    finally:
        private_redis.thaw()
    assert bench.registry.ping()
    assert bench.counter("jobs_submitted") in {1, 2}
    bench.submit(job_id="late")  # asked again under its id: still one job
    assert bench.counter("jobs_submitted") == 2
    assert len(bench.registry.jobs.list()) == 2
    bench.close()


def test_a_finish_whose_answer_was_lost_is_repeated_without_counting_twice(private_redis: RedisServer, frozen_bench: Bench) -> None:
    bench = frozen_bench
    bench.workspace("o/r#1")
    record = {"generation": 1, "digest": "d", "stored_bytes": 10}
    warm = bench.run()
    assert warm.job is not None
    bench.registry.jobs.finish(warm.job.id, warm.fence, {}, record)
    claim = bench.run()
    assert claim.job is not None
    private_redis.freeze()
    try:
        with pytest.raises(Unavailable):
            bench.registry.jobs.finish(claim.job.id, claim.fence, {}, {**record, "generation": 2})
    finally:
        private_redis.thaw()
    for _ in range(2):
        bench.registry.jobs.finish(claim.job.id, claim.fence, {}, {**record, "generation": 2})
    assert (bench.counter("captures"), bench.counter("jobs_succeeded"), bench.counter("capture_stored_bytes")) == (2, 2, 20)
    assert bench.registry.workspaces.get("o/r#1").stored_bytes == 20
    bench.close()


def test_an_answer_that_a_time_limit_left_behind_is_not_taken_for_the_next(
    private_redis: RedisServer, frozen_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Celery's soft time limit does: an exception out of nowhere, after the command went out and before its answer came."""
    bench = frozen_bench
    bench.workspace("o/r#1")
    client = bench.registry._connection.client
    assert bench.registry.ping()

    def struck(*_: object, **__: object) -> None:
        raise RuntimeError("time limit")

    private_redis.freeze()
    thaw = threading.Timer(0.3, private_redis.thaw)
    try:
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(client, "parse_response", struck)
            bench.registry.workspaces.count()
    finally:
        thaw.start()
    assert bench.registry.counters.all()["workspaces_registered"] == 1
    assert [each.id for each in bench.registry.workspaces.list()] == ["o/r#1"]
    thaw.join()
    bench.close()


def test_after_a_restart_the_same_handle_goes_on_and_nothing_is_lost(
    private_redis: RedisServer, make_settings: Callable[..., Settings]
) -> None:
    private_redis.stop()
    private_redis.appendfsync = "always"
    private_redis.start()
    bench = Bench(make_settings())
    bench.workspace("o/r#1")
    claim = bench.run()
    assert claim.job is not None
    private_redis.kill()
    with pytest.raises(Unavailable):
        bench.registry.ping()
    private_redis.start()
    assert bench.registry.jobs.renew(claim.job.id, claim.fence, 30_000) is False  # the scripts have to be loaded again
    bench.registry.jobs.finish(claim.job.id, claim.fence, {"ok": True})
    assert bench.state(claim.job.id) == "succeeded"
    bench.close()


def test_a_full_redis_is_unavailable_and_leaves_nothing_half_written(
    private_redis: RedisServer, make_settings: Callable[..., Settings]
) -> None:
    bench = Bench(make_settings())
    bench.workspace("o/r#1")
    before = sorted(bench.raw.scan_iter("*"))
    bench.raw.config_set("maxmemory", "1mb")
    with pytest.raises(Unavailable):
        bench.submit()
    assert sorted(bench.raw.scan_iter("*")) == before
    bench.raw.config_set("maxmemory", "0")
    assert bench.submit().state == "queued"
    bench.close()


def test_a_damaged_key_is_an_error_of_ours(bench: Bench) -> None:
    bench.raw.set(bench.key("ws:odd"), "not a hash")
    with pytest.raises(OperationFailed) as caught:
        bench.registry.workspaces.get("odd")
    assert isinstance(caught.value, MothballError)
    assert "WRONGTYPE" in caught.value.message


class _Refusing:
    """A server that answers the handshake and refuses everything else with one error."""

    def __init__(self, error: str) -> None:
        self._error = error
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection, connection.makefile("rb") as stream:
            while line := stream.readline():
                words = []
                for _ in range(int(line[1:])):
                    words.append(stream.read(int(stream.readline()[1:])))
                    stream.read(2)
                polite = words[0].upper() in {b"CLIENT", b"SELECT"}
                hello = b"%1\r\n+proto\r\n:3\r\n" if words[0].upper() == b"HELLO" else b"+OK\r\n"
                connection.sendall(hello if polite or words[0].upper() == b"HELLO" else f"-{self._error}\r\n".encode())

    def close(self) -> None:
        self._listener.close()
        self._thread.join(5)


_INSIDE = "ERR Error running script (call to f_abc): @user_script:30: @user_script: 30: -"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", Unavailable),
        ("CLUSTERDOWN The cluster is down", Unavailable),
        ("TRYAGAIN Multiple keys request during rehashing of slot", Unavailable),
        ("NOPERM this user has no permissions to run the 'evalsha' command", Unavailable),
        ("LOADING Redis is loading the dataset in memory", Unavailable),
        ("BUSY Redis is busy running a script.", Unavailable),
        ("UNKILLABLE Sorry the script already executed write commands", Unavailable),
        (_INSIDE + "OOM command not allowed when used memory > 'maxmemory'.", Unavailable),
        (_INSIDE + "READONLY You can't write against a read only replica.", Unavailable),
        (_INSIDE + "MISCONF Redis is configured to save RDB snapshots", Unavailable),
        (_INSIDE + "WRONGTYPE Operation against a key holding the wrong kind of value", OperationFailed),
        ("BUSYGROUP Consumer Group name already exists", OperationFailed),
        ("ERR unknown command", OperationFailed),
    ],
)
def test_a_server_that_cannot_serve_is_unavailable(
    make_settings: Callable[..., Settings], error: str, expected: type[MothballError]
) -> None:
    server = _Refusing(error)
    registry = Registry.connect(make_settings(redis_url=f"redis://127.0.0.1:{server.port}", redis_timeout=2))
    try:
        with pytest.raises(expected):
            registry.jobs.cancel("j")
    finally:
        registry.close()
        server.close()
