"""The doorbell: a Celery message that says "look at this job", published without Celery.

A job is a record in the registry; the message only wakes a worker. So publishing needs no Celery app, no declared
exchange and no routing table: the message (Celery protocol 2, JSON) goes straight into the queue's Redis list. Ringing
twice, or for a job that has ended, is harmless: the claim decides. The arguments stay in the record, and the header
`HEADER` says so: a worker never makes a record of such a message, however late it is read.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol

from kombu import Connection, Producer

from mothball.errors import InvalidParams, Unavailable
from mothball.settings import Settings, redact_url

HEADER = "mothball"
"""Message header of our own doorbells; its value is the version of the form."""
VERSION = 1

# Waiting for the other threads, a quick failure, connecting and sending: together they must stay below the 10 s after
# which a producer is promised a clear error.
_LOCK_SECONDS = 1.5
_CONNECT_SECONDS = 3.5
_ANSWER_SECONDS = 3.5
# A socket that died while idle fails at once; only such quick failures are tried again on a fresh connection.
_QUICK_FAILURE_SECONDS = 1.0


class DoorbellLike(Protocol):
    """What `DoorbellRinger.ring` needs of a doorbell; `mothball.registry.Doorbell` has it."""

    @property
    def job(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def queue(self) -> str: ...


class DoorbellRinger:
    """Publishes doorbells over one connection per process; safe to share between threads and across a fork."""

    def __init__(self, settings: Settings) -> None:
        """`settings` give the broker's URL and the timeouts; nothing is connected yet."""
        self._settings = settings
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._connection: Connection | None = None
        self._producer: Producer | None = None

    def ring(self, doorbell: DoorbellLike, *, embed: Mapping[str, Any] | None = None) -> None:
        """Put the message for `doorbell` into its queue.

        `embed` are the callbacks of a forwarded Celery message (``callbacks``, ``errbacks``, ``chain``, ``chord``).
        Raises `Unavailable` within 10 s when the broker cannot be reached, or when other threads are waiting for it; the
        job stays queued in the registry and ``maintenance.ring`` rings for it later. `InvalidParams`: no form in JSON.
        """
        body, headers = _message(doorbell, embed or {}, self._settings.host)
        if os.getpid() != self._pid:
            self._after_fork()
        # Each thread in turn would otherwise wait its own seconds for a frozen broker, and the last one for all of them.
        lock = self._lock
        if not lock.acquire(timeout=_LOCK_SECONDS):
            raise self._unavailable(TimeoutError("other threads of this process are waiting for its answer"))
        try:
            fresh = self._connection is None
            started = time.monotonic()
            try:
                self._publish(doorbell, body, headers)
            except Exception as error:
                self._drop()
                if not self._is_connection_error(error):
                    raise _explained(error, doorbell) from error
                if fresh or time.monotonic() - started > _QUICK_FAILURE_SECONDS:
                    raise self._unavailable(error) from None
                try:
                    self._publish(doorbell, body, headers)
                except Exception as again:
                    self._drop()
                    if not self._is_connection_error(again):
                        raise _explained(again, doorbell) from again
                    raise self._unavailable(again) from None
        finally:
            lock.release()

    def close(self) -> None:
        """Close the connection; the next `ring` opens a new one."""
        if os.getpid() != self._pid:
            self._after_fork()
        lock = self._lock
        held = lock.acquire(timeout=_LOCK_SECONDS)
        try:
            self._drop()
        finally:
            if held:
                lock.release()

    def _publish(self, doorbell: DoorbellLike, body: Any, headers: dict[str, Any]) -> None:
        if self._producer is None:
            self._connection = self._connect()
            self._producer = Producer(self._connection.default_channel, serializer="json", auto_declare=False)
        self._producer.publish(
            body, exchange="", routing_key=doorbell.queue, headers=headers, correlation_id=doorbell.job, retry=False
        )

    def _connect(self) -> Connection:
        return Connection(
            self._settings.broker_url,
            transport_options={
                "socket_connect_timeout": min(self._settings.redis_timeout, _CONNECT_SECONDS),
                "socket_timeout": min(self._settings.redis_timeout, _ANSWER_SECONDS),
                "socket_keepalive": True,
                "client_name": "mothball-doorbell",
                # The channel's first use would otherwise retry for ever inside kombu.
                "max_retries": 0,
                "interval_start": 0,
            },
        )

    def _is_connection_error(self, error: Exception) -> bool:
        from kombu.exceptions import OperationalError
        from redis.exceptions import RedisError

        return isinstance(error, (OperationalError, RedisError, OSError, socket.timeout))

    def _unavailable(self, error: Exception) -> Unavailable:
        """The error for a user: never with the URL's password, which redis-py may repeat in its own text."""
        reason = " ".join(str(error).split()) or type(error).__name__
        for secret in _secrets(self._settings.broker_url):
            reason = reason.replace(secret, "***")
        return Unavailable(url=redact_url(self._settings.broker_url), reason=reason)

    def _drop(self) -> None:
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None:
            # A broken connection may fail to close in any way; it is gone either way.
            with contextlib.suppress(Exception):
                connection.collect(socket_timeout=1)

    def _after_fork(self) -> None:
        """Forget the parent's connection and lock without closing: the socket still belongs to the parent."""
        self._lock = threading.Lock()
        self._connection = self._producer = None
        self._pid = os.getpid()


def _secrets(url: str) -> list[str]:
    from urllib.parse import unquote, urlsplit

    password = urlsplit(url).password
    return sorted({password, unquote(password)}, key=len, reverse=True) if password else []


def _explained(error: Exception, doorbell: DoorbellLike) -> Exception:
    """`InvalidParams` for a message that cannot be written as JSON, else `error` itself."""
    from kombu.exceptions import SerializationError

    if isinstance(error, (SerializationError, TypeError, ValueError, RecursionError)):
        return InvalidParams(f"the doorbell of job {doorbell.job!a} cannot be written: {type(error).__name__}")
    return error


def _message(doorbell: DoorbellLike, embed: Mapping[str, Any], host: str) -> tuple[Any, dict[str, Any]]:
    """Body and headers of protocol 2. `ignore_result` is left out on purpose, so that the task's own setting counts."""
    headers = {
        HEADER: VERSION,
        "lang": "py",
        "task": doorbell.task,
        "id": doorbell.job,
        "root_id": doorbell.job,
        "parent_id": None,
        "group": None,
        "eta": None,
        "expires": None,
        "retries": 0,
        "timelimit": [None, None],
        "argsrepr": "()",
        "kwargsrepr": "{}",
        "origin": f"mothball@{host}",
    }
    callbacks = {name: embed.get(name) for name in ("callbacks", "errbacks", "chain", "chord")}
    return ((), {}, callbacks), headers
