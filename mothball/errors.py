"""One root, one class per code. The docstring is the message template.

Codes are those of the design, section 8; ``number`` is the JSON-RPC style number of behaviours.md Q-70
where one exists. ``retryable`` says whether the same request may succeed later without anybody changing
anything: the job layer retries only those. ``exit_code`` is what the command line returns (Q-71).
"""

from __future__ import annotations

from typing import Any, ClassVar


class MothballError(Exception):
    """the operation failed: {reason}"""

    code: ClassVar[str] = "operation_failed"
    number: ClassVar[int | None] = None
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str | None = None, /, **fields: Any) -> None:
        """Use `message` as it is, or fill the class's docstring with `fields`.

        `fields` stay on the error (``error.fields``) and travel in its JSON form, so they must never hold a secret.
        """
        self.fields = fields
        if message is None:
            template = (type(self).__doc__ or "").strip().splitlines()[0]
            try:
                message = template.format(**fields)
            except (KeyError, IndexError):
                message = f"{template} {fields}"
        self.message = message
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.fields))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: ``{code, number?, message, retryable, ...fields}``."""
        out: dict[str, Any] = {"code": self.code, "message": self.message, "retryable": self.retryable}
        if self.number is not None:
            out["number"] = self.number
        if self.fields:
            out["details"] = self.fields
        return out


def _rebuild(cls: type[MothballError], message: str, fields: dict[str, Any]) -> MothballError:
    return cls(message, **fields)


class OperationFailed(MothballError):
    """the operation failed: {reason}"""


class TransientFailure(MothballError):
    """the operation failed and may succeed later: {reason}"""

    retryable = True


class InvalidParams(MothballError):
    """{reason}"""

    code = "invalid_params"
    number = -32602
    exit_code = 2


class ConfigError(MothballError):
    """the configuration is wrong: {reason}"""

    code = "config"
    exit_code = 78


class NotFound(MothballError):
    """{what} {id!r} is not known. `mothball ls` and `mothball jobs` list what is."""

    code = "not_found"


class Gone(MothballError):
    """workspace {id!r} is gone: {reason}"""

    code = "gone"


class AlreadyExists(MothballError):
    """workspace {id!r} is already registered at {path!r}. Release it first, or choose another id."""

    code = "already_exists"
    exit_code = 73


class InvalidTransition(MothballError):
    """workspace {id!r} cannot go from {state} to {wanted}"""

    code = "invalid_transition"


class Stranded(InvalidTransition):
    """workspace {id!r} is stranded ({reason}) and belongs to agent {agent}: only that agent resumes it, until it is abandoned"""

    code = "stranded"


class Abandoned(InvalidTransition):
    """workspace {id!r} was abandoned ({reason}) and is about to be evicted. `mothball undelete` brings it back after that."""

    code = "abandoned"


class ResumeContended(MothballError):
    """workspace {id!r} cannot be resumed now: {reason}"""

    code = "resume_contended"
    retryable = True
    exit_code = 75


class AlreadyResumed(InvalidTransition):
    """workspace {id!r} was resumed already"""

    code = "already_resumed"


class PathNotAllowed(MothballError):
    """{path!r} is not below an allowed root. Add its root to MOTHBALL_WORKSPACE_ROOTS on that host."""

    code = "path_not_allowed"


class SourceMissing(MothballError):
    """{path!r} cannot be captured: {reason}"""

    code = "source_missing"


class Busy(MothballError):
    """{what} is busy: {reason}"""

    code = "busy"
    retryable = True
    exit_code = 75


class NotRunning(MothballError):
    """{what} is not running"""

    code = "not_running"


class OverBudget(MothballError):
    """{what} is over its budget: {reason}"""

    code = "over_budget"
    number = -32003


class StaleExpired(MothballError):
    """the last good capture of {id!r} is too old: {reason}"""

    code = "stale_expired"
    number = -32002


class Evicted(MothballError):
    """workspace {id!r} was evicted: {reason}"""

    code = "evicted"
    number = -32004


class Oversize(MothballError):
    """{what} is too large: {size} bytes, the limit is {limit}"""

    code = "oversize"
    number = -32006


class NoSpace(MothballError):
    """no space left while writing {path!r}; nothing was published. Free space on that file system and run it again."""

    code = "no_space"
    retryable = True


class Unheld(MothballError):
    """workspace {id!r} was not purged: {reason}"""

    code = "unheld"


class Unredacted(MothballError):
    """{what} was not written: {reason}"""

    code = "unredacted"


class SealError(MothballError):
    """{what} cannot be opened: {reason}"""

    code = "sealed"


class Corrupt(MothballError):
    """{what} is damaged: {reason}"""

    code = "corrupt"


class Cancelled(MothballError):
    """job {job} was cancelled"""

    code = "cancelled"


class TimedOut(MothballError):
    """{what} did not finish within {seconds:g} s"""

    code = "timeout"
    number = -32000
    retryable = True
    exit_code = 75


class LeaseLost(MothballError):
    """job {job} no longer holds its lease; another run has taken over and nothing was published here"""

    code = "lease_lost"


class HostOffline(MothballError):
    """no worker has announced host {host!r}. Start one there, or check the host name (`mothball hosts`)."""

    code = "host_offline"
    exit_code = 69


class UnknownTask(MothballError):
    """task {task!r} is not known"""

    code = "unknown_task"


class Unavailable(MothballError):
    """Redis at {url} cannot be reached: {reason}"""

    code = "unavailable"
    retryable = True
    exit_code = 69


class RegistryUnavailable(MothballError):
    """registry {registry} cannot be reached: {reason}"""

    code = "registry_unavailable"
    retryable = True
    exit_code = 69


class RegistryDenied(MothballError):
    """registry {registry} refuses: {reason}"""

    code = "registry_denied"
    exit_code = 78


BY_CODE: dict[str, type[MothballError]] = {
    cls.code: cls
    for cls in (
        OperationFailed, InvalidParams, ConfigError, NotFound, Gone, AlreadyExists, InvalidTransition, PathNotAllowed,
        SourceMissing, Busy, NotRunning, OverBudget, StaleExpired, Evicted, Oversize, NoSpace, Unheld, Unredacted, SealError,
        Corrupt, Cancelled, TimedOut, LeaseLost, HostOffline, UnknownTask, Unavailable, RegistryUnavailable, RegistryDenied,
        Stranded, Abandoned, ResumeContended, AlreadyResumed,
    )
}  # fmt: skip


def from_code(code: str, message: str, **fields: Any) -> MothballError:
    """The error for a stored `code`; an unknown code (a newer worker's) becomes `operation_failed` and keeps its text."""
    return BY_CODE.get(code, OperationFailed)(message, **fields)
