"""Queues: which exist, who consumes which. A name that is not here is an error, not a silent queue nobody reads."""

from __future__ import annotations

from kombu import Queue

from mothball.names import QUEUE_CONTROL, QUEUE_DISPATCH, host_queue


def queue_names(host: str) -> tuple[str, ...]:
    """The queues of the worker on `host`: its own disk-bound work, the fleet's registry work, and messages to forward."""
    return (host_queue(host), QUEUE_CONTROL, QUEUE_DISPATCH)


def declared_queues(host: str) -> tuple[Queue, ...]:
    """The same as kombu queues. No exchange: every message goes straight into its queue's list, as the doorbell's do."""
    return tuple(Queue(name, exchange="", routing_key=name) for name in queue_names(host))
