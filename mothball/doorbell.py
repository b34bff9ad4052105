"""The doorbell: a Celery message that says "look at this job", published without Celery.

A job is a record in the registry; the message only wakes a worker. So publishing needs no Celery app, no declared
exchange and no routing table: the message (Celery protocol 2, JSON) goes straight into the queue's Redis list. Ringing
twice, or for a job that has ended, is harmless: the claim decides.
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

from mothball.errors import Unavailable
from mothball.settings import Settings, redact_url

# Connecting and sending together must stay below the 10 s after which a producer is promised a clear error.
_CONNECT_SECONDS = 4.0
_ANSWER_SECONDS = 4.0
# A socket that died while idle fails at once; only such quick failures are tried again on a fresh connection.
_QUICK_FAILURE_SECONDS = 1.0
_REPR_CHARS = 200


class DoorbellLike(Protocol):
    """What `DoorbellRinger.ring` needs of a doorbell; `mothball.registry.Doorbell` has it."""

    @property
    def job(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def queue(self) -> str: ...
    @property
    def args(self) -> Mapping[str, Any]: ...


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
        Raises `Unavailable` within 10 s when the broker cannot be reached; the job stays queued in the registry and
        ``maintenance.ring`` rings for it later.
        """
        body, headers = _message(doorbell, embed or {}, self._settings.host)
        if os.getpid() != self._pid:
            self._after_fork()
        with self._lock:
            fresh = self._connection is None
            started = time.monotonic()
            try:
                self._publish(doorbell, body, headers)
            except Exception as error:
                self._drop()
                if not self._is_connection_error(error):
                    raise
                if fresh or time.monotonic() - started > _QUICK_FAILURE_SECONDS:
                    raise self._unavailable(error) from None
                try:
                    self._publish(doorbell, body, headers)
                except Exception as again:
                    self._drop()
                    if not self._is_connection_error(again):
                        raise
                    raise self._unavailable(again) from None

    def close(self) -> None:
        """Close the connection; the next `ring` opens a new one."""
        if os.getpid() != self._pid:
            self._after_fork()
        with self._lock:
            self._drop()

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


def _message(doorbell: DoorbellLike, embed: Mapping[str, Any], host: str) -> tuple[Any, dict[str, Any]]:
    """Body and headers of protocol 2. `ignore_result` is left out on purpose, so that the task's own setting counts."""
    args = dict(doorbell.args)
    shown = repr(args)
    headers = {
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
        "kwargsrepr": shown if len(shown) <= _REPR_CHARS else shown[: _REPR_CHARS - 3] + "...",
        "origin": f"mothball@{host}",
    }
    callbacks = {name: embed.get(name) for name in ("callbacks", "errbacks", "chain", "chord")}
    return ((), args, callbacks), headers
