"""The operator's hook: told before an announced stop or eviction, and able to put it off.

It is a command line or an http(s) URL from the settings of the host that asks, never from the registry. It gets one JSON object
(standard input, or the body of a POST) and may answer with one: ``{"extend": "2h"}``; nothing or ``{}`` lets things take
their course. Whatever else it does is a `HookFailed`, which counts as no veto: a broken hook must not keep a full disk full.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from typing import Any, Final

import msgspec

from mothball import durations
from mothball.errors import InvalidParams
from mothball.settings import redact_url

SECONDS: Final = 5.0
"""How long a hook may take, all in all."""
MAX_ANSWER: Final = 64 * 1024
_READ_BYTES: Final = 16 * 1024
_HTTP_OK: Final = range(200, 300)


class HookFailed(Exception):
    """The hook gave no answer that can be used; the text says why."""


class _Answer(msgspec.Struct, forbid_unknown_fields=True):
    extend: str | None = None


def ask(hook: str, question: dict[str, Any], *, seconds: float = SECONDS) -> int | None:
    """By how many ms `hook` puts the action off, None for no veto; within `seconds`. Raises `HookFailed`."""
    body = json.dumps(question, sort_keys=True).encode()
    if hook.startswith(("http://", "https://")):
        answer = _post(hook, body, seconds)
    else:
        answer = _run(hook, body, seconds)
    return _extension(answer)


def _extension(answer: bytes) -> int | None:
    if not answer.strip():
        return None
    try:
        text = msgspec.json.decode(answer, type=_Answer).extend
        if text is None:
            return None
        found = durations.parse(text, "extend")
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise HookFailed(f'it answered something else than {{"extend": "2h"}}: {error}'[:500]) from None
    except InvalidParams as error:
        raise HookFailed(f"its answer cannot be used: {error.message}"[:500]) from None
    if found is None:
        raise HookFailed("extend must be a time such as 2h, not never; a hold or a pin keeps a workspace for good")
    return found


def _run(command: str, body: bytes, seconds: float) -> bytes:
    """Standard output of `command`, which runs without a shell, in a process group of its own, and ends with all it started."""
    deadline = time.monotonic() + seconds
    # MOTHBALL_REDIS_URL holds a password that a hook has no use for.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MOTHBALL_")}
    # A file and no pipe: a hook that does not read must not block the one who asks.
    with tempfile.TemporaryFile() as question:
        question.write(body)
        question.seek(0)
        try:
            process = subprocess.Popen(
                shlex.split(command), stdin=question, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
                start_new_session=True,
            )  # fmt: skip
        except (OSError, ValueError, IndexError) as error:
            raise HookFailed(f"it cannot be started: {error}") from None
    try:
        answer = _read(process, deadline)
        try:
            code = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise _late(seconds) from None
    except TimeoutError:
        raise _late(seconds) from None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    if code != 0:
        raise HookFailed(f"it ended with exit code {code}" if code > 0 else f"it was ended by signal {-code}")
    return answer


def _read(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    assert process.stdout is not None  # noqa: S101 - Popen was asked for a pipe
    pipe, parts, size = process.stdout.fileno(), list[bytes](), 0
    ready = select.poll()
    ready.register(pipe, select.POLLIN)
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not ready.poll(left * 1000):
            raise TimeoutError
        part = os.read(pipe, _READ_BYTES)
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
        if size > MAX_ANSWER:
            raise HookFailed(f"it answered more than {MAX_ANSWER} bytes")


def _post(url: str, body: bytes, seconds: float) -> bytes:
    """The body of the answer. In a thread: the limits of a socket are for each read, and a server may send a byte at a time."""
    answers: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

    def call() -> None:
        try:
            answers.put(_exchange(url, body, seconds))
        except Exception as error:  # handed to the thread that waits, whatever it is
            answers.put(error)

    threading.Thread(target=call, name="notice-hook", daemon=True).start()
    try:
        found = answers.get(timeout=seconds)
    except queue.Empty:
        raise _late(seconds) from None
    if isinstance(found, HookFailed):
        raise found
    if isinstance(found, Exception):
        # The URL may hold a password, and errors of HTTP libraries repeat it.
        raise HookFailed(f"{redact_url(url)} cannot be reached ({type(found).__name__})")
    return found


def _exchange(url: str, body: bytes, seconds: float) -> bytes:
    # Here and not above: an eviction without a hook needs no HTTP.
    import requests

    end = time.monotonic() + seconds
    with requests.Session() as session:
        session.trust_env = False  # no proxy, no netrc: the settings alone say who is asked
        # Never redirected: what answers is what the operator wrote down.
        with session.post(
            url, data=body, headers={"Content-Type": "application/json"}, timeout=seconds, allow_redirects=False, stream=True
        ) as response:
            if response.status_code not in _HTTP_OK:
                raise HookFailed(f"{redact_url(url)} answered HTTP {response.status_code}")
            answer = b""
            for part in response.iter_content(_READ_BYTES):
                answer += part
                if len(answer) > MAX_ANSWER:
                    raise HookFailed(f"it answered more than {MAX_ANSWER} bytes")
                if time.monotonic() > end:
                    raise _late(seconds)
            return answer


def _late(seconds: float) -> HookFailed:
    return HookFailed(f"it did not answer within {seconds:g} s")
