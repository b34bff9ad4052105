"""The lines to a registry: no wait without an end, none during which nobody listens, no answer longer than it may be.

A time limit of the usual kind is one for each read, so a peer that sends a byte a second holds a client for ever. Here what
counts is how much came (or went) in the time that was spent waiting for the peer, and while it is awaited somebody is asked
every moment whether the work is still wanted: a job that was cancelled must not sit in a read.
"""

from __future__ import annotations

import errno
import io
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

CONNECT_SECONDS: Final = 10.0
PIECE: Final = 1024**2
ANSWER_LIMIT: Final = 64 * 1024
"""Most bytes that are read of an answer that is neither a manifest nor a blob: errors, tokens, confirmations."""
STALL_BYTES: Final = 64 * 1024
"""Least bytes that a peer has to move in the time limit of a read, unless its answer ends before."""
TICK_SECONDS: Final = 0.25
_SEND_BYTES: Final = 64 * 1024

Tick = Callable[[], None]
"""Called while waiting; what it raises (a cancelled job) ends the wait."""


class Stalled(TimeoutError):
    """The peer is there and moves next to nothing."""


class Pace:
    """What every line of one client goes by: `tick` is called every moment, `seconds` is the time limit of a read."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.tick: Tick = lambda: None
        self._told = time.monotonic()

    def tell(self) -> None:
        """Call `tick`, if it was not called just now."""
        now = time.monotonic()
        if now - self._told >= TICK_SECONDS:
            self._told = now
            self.tick()


class _Endpoint(Protocol):
    def recv_into(self, buffer: Any, /) -> int: ...
    def send(self, data: Any, /) -> int: ...
    def settimeout(self, value: float | None, /) -> None: ...
    def close(self) -> None: ...
    def makefile(self, mode: Any, buffering: Any) -> Any: ...
    def fileno(self) -> int: ...


class _Line:
    """A connected socket, as far as `http.client` uses one."""

    def __init__(self, end: _Endpoint, pace: Pace) -> None:
        self._end = end
        self._pace = pace
        self._sending = True
        self._waited = 0.0
        self._moved = 0
        end.settimeout(min(TICK_SECONDS, pace.seconds))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._end, name)

    def fileno(self) -> int:
        return self._end.fileno()

    def settimeout(self, _value: float | None) -> None:
        """The pace says how long."""

    def makefile(self, *_args: Any, **_kwargs: Any) -> io.BufferedReader:
        # The inner file is what keeps the socket open when the connection is closed before its last answer was read.
        return io.BufferedReader(_Reader(self, self._end.makefile("rb", 0)), _SEND_BYTES)

    def sendall(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        while view:
            piece = view[:_SEND_BYTES]
            view = view[self._move(lambda piece=piece: self._end.send(piece), sending=True) :]  # type: ignore[misc]

    def receive(self, buffer: Any) -> int:
        return self._move(lambda: self._end.recv_into(buffer), sending=False)

    def _move(self, call: Callable[[], int], *, sending: bool) -> int:
        if sending is not self._sending:
            self._sending, self._waited, self._moved = sending, 0.0, 0
        while True:
            began = time.monotonic()
            try:
                count = call()
            except TimeoutError:
                count = -1
            self._waited += time.monotonic() - began
            self._pace.tell()
            if count >= 0:
                self._moved += count
            if self._waited >= self._pace.seconds:
                if not self._moved:
                    raise TimeoutError
                if self._moved < STALL_BYTES:
                    verb = "takes" if sending else "sends"
                    raise Stalled(errno.ETIMEDOUT, f"it {verb} less than {STALL_BYTES:,} bytes in {self._pace.seconds:g} s")
                self._waited, self._moved = 0.0, 0
            if count >= 0:
                return count


class _Reader(io.RawIOBase):
    def __init__(self, line: _Line, inner: Any) -> None:
        self._line = line
        self._inner = inner

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        return self._line.receive(buffer)

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
        super().close()


def _paced_pools(pace: Pace) -> dict[str, Any]:
    class Plain(HTTPConnection):
        def connect(self) -> None:
            super().connect()
            self.sock: Any = _Line(self.sock, pace)

    class Secure(HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            self.sock: Any = _Line(self.sock, pace)

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}


class _Short:
    """The beginning of a body; the rest is never asked for."""

    def __init__(self, raw: urllib3.BaseHTTPResponse) -> None:
        self._raw = raw

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def stream(self, amount: int = ANSWER_LIMIT, decode_content: bool | None = None) -> Iterator[bytes]:
        """At most `ANSWER_LIMIT` bytes; then the line is closed, for what is still to come would be taken for the next answer."""
        left = ANSWER_LIMIT
        for piece in self._raw.stream(min(amount, ANSWER_LIMIT), decode_content=decode_content):
            yield piece[:left]
            left -= len(piece)
            if left <= 0:
                self._raw.close()
                return

    def read(self, *_args: Any, **_kwargs: Any) -> bytes:
        return b"".join(self.stream())


def origin(url: str) -> tuple[str, str]:
    """Scheme and host with port of `url`, in lower case; empty for a text that is no URL."""
    try:
        parts = urlsplit(url)
        return parts.scheme.lower(), parts.netloc.lower()
    except ValueError:
        return "", ""


class Adapter(HTTPAdapter):
    """The wire of one session, also for requests that a library sends by itself: token servers, redirects.

    A login goes to the origins in `trusted` and nowhere else, however it came into a request.
    """

    last_status = 0

    def __init__(self, pace: Pace, *, secure: bool) -> None:
        self._pace = pace
        self._secure = secure
        self._pools = _paced_pools(pace)
        self.trusted: set[tuple[str, str]] = set()
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, blocksize=PIECE, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = self._pools
        return manager

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        place = origin(request.url or "")
        if self._secure and place[0] != "https":
            raise requests.exceptions.InvalidSchema("a redirect leads from TLS to plain HTTP", request=request)
        if place not in self.trusted:
            request.headers.pop("Authorization", None)
        kwargs["timeout"] = (CONNECT_SECONDS, self._pace.seconds)
        response = super().send(request, *args, **kwargs)
        self.last_status = response.status_code
        if not kwargs.get("stream") or response.is_redirect:
            response.raw = _Short(response.raw)
        return response
