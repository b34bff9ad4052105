"""What whoever files a crash report says of the failure, checked; the rest is found on the host (`evidence`)."""

from __future__ import annotations

import signal as signals
from typing import Any, Final

import msgspec

from mothball.errors import InvalidParams

MAX_SIGNAL: Final = 64
_SHELL: Final = 128
MOST_COMMAND: Final = 1000
"""Most words of a command that a report keeps."""


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """One failure, as it is reported. Everything may be missing.

    `error_bytes` is the size of the whole text when `error` is what `text.clip` left of it. `exit_code` is the command's own; a
    negative one is a signal, as `subprocess` has it. `signal` is a number or a name. `log` is the path of a file below the
    workspace roots, a relative one below the workspace. `env` is the failing command's environment; only what the setting
    ``crash_env`` allows is kept. `cgroup` is the path of the command's cgroup or, when that is gone already, the figures that
    `mothball.crash.cgroup.read` took of it. `pid` is the failed or hanging process. `at` is ms of Redis TIME.
    """

    error: str = ""
    error_bytes: int = 0
    title: str = ""
    exit_code: int | None = None
    signal: int | str | None = None
    core_dumped: bool | None = None
    command: tuple[str, ...] = ()
    log: str | None = None
    env: dict[str, str] | None = None
    cgroup: str | dict[str, Any] | None = None
    pid: int | None = None
    at: int = 0


class Ended(msgspec.Struct, frozen=True):
    """How a command ended: by itself with `code`, or by `signal`; both are None when nobody said."""

    code: int | None
    signal: int | None

    @property
    def signal_name(self) -> str | None:
        """``SIGKILL`` of 9."""
        return None if self.signal is None else signal_name(self.signal)

    @property
    def code_means(self) -> str | None:
        """The signal that a shell says with this code (128 + n), None for any other code."""
        number = (self.code or 0) - _SHELL
        return signal_name(number) if self.code is not None and number in set(signals.Signals) else None


def ended(exit_code: int | None, signal: int | str | None) -> Ended:
    """Code and signal as said; `InvalidParams` for a signal that this system does not have."""
    number = None if signal is None else signal_number(signal)
    if exit_code is not None and exit_code < 0:
        return Ended(None, number if number is not None else signal_number(-exit_code))
    return Ended(exit_code, number)


def signal_number(signal: int | str) -> int:
    """9 of ``SIGKILL``, ``KILL``, ``9`` and 9; `InvalidParams` for anything else than a signal."""
    text = str(signal).strip().upper()[:20]
    if text.isascii() and text.isdecimal():
        number = int(text)
    else:
        name = text if text.startswith("SIG") else f"SIG{text}"
        number = int(getattr(signals.Signals, name, 0))
    if isinstance(signal, bool) or not 1 <= number <= MAX_SIGNAL:
        raise InvalidParams(f"{str(signal)[:40]!r} is not a signal; say for example SIGKILL or 9")
    return number


def signal_name(number: int) -> str:
    """``SIGKILL`` of 9; ``SIG<n>`` of one without a name."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"SIG{number}"
