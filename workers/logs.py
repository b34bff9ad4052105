"""Logs: structlog for ours and for everybody else's lines, JSON or console, secrets never."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog
from celery import signals

from mothball.redact.key import masked
from mothball.settings import Settings

_NOISY = ("amqp", "kombu.connection", "asyncio")


def connect(settings: Settings) -> None:
    """Make every Celery process of this app log our way: with a receiver, Celery leaves logging alone altogether."""

    def receiver(**_: object) -> None:
        setup(settings)

    signals.setup_logging.connect(receiver, weak=False, dispatch_uid="mothball.logs")


def setup(settings: Settings) -> None:
    """Configure structlog and the root logger; lines go to standard error."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    last: list[Any] = (
        [structlog.processors.format_exc_info, _redact, structlog.processors.JSONRenderer(default=str)]
        if settings.log_format == "json"
        else [structlog.processors.format_exc_info, _redact, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)


def _redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    hidden: MutableMapping[str, Any] = masked({key: _plain(value) for key, value in event.items()})
    return hidden


def _plain(value: Any) -> Any:
    """What a renderer would turn into text only behind the masking (an exception, a path), as text now."""
    return value if value is None or isinstance(value, (str, int, float, list, tuple, dict)) else str(value)
