"""No secrets in what others see of a job: its record, its error, worker events (Flower), ``inspect``, the result backend.

Producers of ours redact before they submit. A plain ``send_task`` does not, so its message is made quiet here, before a record is
made of it and before any event shows its arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from celery.utils.saferepr import saferepr
from celery.worker.request import Request

from mothball.errors import MothballError
from mothball.redact import Redactor, mask, redactor_for
from mothball.redact.key import masked, masker

if TYPE_CHECKING:
    from mothball.registry import Registry
    from mothball.settings import Settings

_SHOWN = 1024
"""Characters of arguments in an event, as Celery itself does it."""
_HIDDEN = "[not shown]"
_EVENT_TEXTS = ("args", "kwargs", "result", "exception", "traceback")


def quiet_error(error: MothballError) -> MothballError:
    """`error` with secrets masked in message and fields: it is recorded, told to the producer and shown in Flower."""
    message, fields = mask(error.message), masked(error.fields)
    if message == error.message and fields == error.fields:
        return error
    return type(error)(message, **fields)


def redacted_arguments(names: tuple[str, ...], kwargs: Mapping[str, Any], settings: Settings, registry: Registry) -> dict[str, Any]:
    """`kwargs` with the arguments called `names` redacted, with the fleet's pseudonyms. Raises `Unavailable`."""
    if not any(kwargs.get(name) for name in names):
        return dict(kwargs)
    return redacted_with(redactor_for(settings, registry), names, kwargs)


def redacted_with(redactor: Redactor, names: tuple[str, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`kwargs` with the arguments called `names` redacted by `redactor`."""
    return {**kwargs, **{name: _of_type(redactor, kwargs[name]) for name in names if kwargs.get(name)}}


def _of_type(redactor: Redactor, value: Any) -> Any:
    """A list of texts is a command line, a mapping of texts an environment, everything else a document."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return redactor.argv(value)
    if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
        return redactor.env(value)
    return redactor.document(value)


def _shown(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as events show them: a list of texts may be a command line whose secret only the option before it tells."""
    whole = masked(dict(kwargs))
    return {name: _of_type(masker(), value) if isinstance(value, (list, dict)) else value for name, value in whole.items()}


class QuietRequest(Request):
    """Celery's view of a delivered message in the worker's main process, with masked arguments wherever they are shown.

    The function still gets the arguments as they were sent; the task decides which of them may enter a record. Those that it
    declares as ``secret`` are not shown at all: what in them is one may be known only when the job has looked at its workspace.
    """

    def __init__(self, message: Any, **options: Any) -> None:
        super().__init__(message, **options)
        # Not the sender's own text: it may be cut in the middle of a secret, or simply be wrong.
        this: Any = self  # the published types leave out what Celery keeps these in
        this._argsrepr = saferepr(_of_type(masker(), list(this.args or ())), maxlen=_SHOWN)
        secret = getattr(self.task, "secret", ())
        kwargs = {name: _HIDDEN if name in secret and value else value for name, value in dict(this.kwargs or {}).items()}
        this._kwargsrepr = saferepr(_shown(kwargs), maxlen=_SHOWN)
        # The pool process logs from these, and the result backend stores them when it keeps extended results.
        this.request_dict.update(argsrepr=this.argsrepr, kwargsrepr=this.kwargsrepr)

    def info(self, safe: bool = False) -> Any:
        """What ``inspect active`` answers, and with it Flower's page of a worker: never the arguments themselves."""
        return {**super().info(safe=True), "args": self.argsrepr, "kwargs": self.kwargsrepr}

    def send_event(self, type: str, **fields: Any) -> None:  # noqa: A002 - Celery's name
        """Send a worker event; errors and tracebacks in it are masked."""
        hidden = {name: mask(str(fields[name])) for name in _EVENT_TEXTS if isinstance(fields.get(name), str)}
        super().send_event(type, **{**fields, **hidden})
