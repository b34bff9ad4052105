"""kombu's Redis transport, except that a message nobody can read is set aside instead of ending the worker.

With the original, one item in a queue's list that is not a message (a wrong client, a wrong database number, a truncated
write) raises in the event loop and the worker exits; when the item was already marked as unacknowledged it is delivered
again, and takes the next worker down too. Here it is acknowledged and handed to `on_unreadable`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kombu.transport
import structlog
from kombu.transport import redis

log = structlog.stdlib.get_logger("mothball.worker")

on_unreadable: list[Callable[[str, Exception], None]] = []
"""Called with the queue ('' when unknown) and the error; they must not raise."""


def install() -> None:
    """Make ``redis://`` and ``rediss://`` mean this transport, in this process only."""
    for alias in ("redis", "rediss"):
        kombu.transport.TRANSPORT_ALIASES[alias] = "workers.transport:Transport"
    kombu.transport._transport_cache.clear()  # type: ignore[attr-defined]  # missing in the stubs


class Unreadable(ValueError):
    """the item in the queue is not a message"""


class Channel(redis.Channel):
    """Reads queues; an item that is no JSON is already popped, so there is nothing to acknowledge."""

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[misc]  # missing in the stubs
        except ValueError as error:  # from decoding the item: `Transport._deliver` lets no other through
            set_aside("", error)
            return True


class Transport(redis.Transport):
    """Delivers messages; one that its consumer cannot take is acknowledged, so that it is not delivered for ever."""

    Channel = Channel

    def _deliver(self, message: Any, queue: Any) -> None:
        try:
            check_envelope(message)
            super()._deliver(message, queue)
        except Exception as error:  # a consumer's bug or a hostile message: neither may end the worker
            if isinstance(error, (MemoryError, *self.connection_errors)):
                raise
            self._acknowledge(message)
            set_aside(queue, error)

    def _acknowledge(self, message: Any) -> None:
        try:
            tag = message["properties"]["delivery_tag"]
        except (TypeError, KeyError):
            return
        for channel in self.channels or ():
            if tag in (channel.qos._delivered or ()):
                channel.basic_ack(tag)


def check_envelope(message: Any) -> None:
    """Raise `Unreadable` unless `message` has the parts without which kombu itself fails."""
    properties = message.get("properties") if isinstance(message, dict) else None
    if not isinstance(properties, dict) or not isinstance(properties.get("delivery_tag"), str):
        raise Unreadable("it has no delivery tag")
    if not isinstance(properties.get("delivery_info"), dict) or not isinstance(message.get("headers", {}), dict):
        raise Unreadable("its headers or delivery info are not objects")


def set_aside(queue: str, error: Exception) -> None:
    """Tell the log and everybody in `on_unreadable`."""
    log.error("set aside an item of a queue that no worker can read", queue=queue, error=f"{type(error).__name__}: {error}"[:200])
    for receiver in on_unreadable:
        receiver(queue, error)
