"""What makes two failures the same one: the error without what differs each time, the innermost frames, how it ended.

Work is linear in the text and bounded by `text.clip`: of ten megabytes the beginning and the end count.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from mothball.crash.frames import frames_of
from mothball.crash.text import clip, one_line

DIGITS: Final = 16
_LINE: Final = 1000
_LINES: Final = 5
"""Lines that count when none of them alone says what went wrong: too few would take different failures for one."""

_TELLING = re.compile(
    r"\b(?:error|exception|panic(?:ked)?|fatal|fail(?:ed|ure)?|abort(?:ed)?|killed|segmentation fault|sig[a-z]{3,6}|cannot|"
    r"unable to|undefined|not found|denied|out of memory|no space left)\b",
    re.IGNORECASE,
)
_CHAINED = re.compile(
    r"^(?:During handling of the above exception|The above exception was the direct cause|Traceback \(most recent call last\)|"
    r"Caused by:? |goroutine |note: |stack backtrace:|\[\.\.\. )"
)
# A class of an exception with its text, as the last line of a Python traceback has it; `subprocess.CalledProcessError: ...`.
_RAISED = re.compile(
    r"^(?:E {1,8})?[A-Za-z_][\w.$]{0,200}"
    r"(?:Error|Exception|Exit|Interrupt|Warning|Failure|Fault|Timeout|Iteration|Group)\b(?: \[\w{1,40}\])?(?::|$)"
)
_HEADLINES = (
    re.compile(r"^panic: "),
    re.compile(r"^fatal error: "),
    re.compile(r"^thread '[^']{0,200}'(?: \(\d{1,20}\))? panicked at "),
    re.compile(r"==\d{1,10}==\s?ERROR: \w+Sanitizer: "),
    re.compile(r"^(?:Program|Thread \d{1,9}[^\n]{0,100}) received signal "),
    re.compile(r"^Program terminated with signal "),
    re.compile(r"^Exception in thread "),
    re.compile(r"^Uncaught "),
)
_MESSENGER = re.compile(r"^(?:g?make(?:\[\d{1,3}\])?: |npm (?:ERR!|error) |error: script |ELIFECYCLE)")
_PANICKED = re.compile(r" panicked at .*:\d{1,9}:\d{1,9}:$")

_NORMAL: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\[redacted:([a-z0-9-]{1,64}):[0-9a-f]{12}\]"), r"[redacted:\1]"),
    (re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b", re.IGNORECASE), "<uuid>"),
    (re.compile(r"\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d)?(?:[.,]\d{1,9})?(?:Z|[+-]\d\d:?\d\d)?)?"), "<time>"),
    (re.compile(r"\b\d\d:\d\d:\d\d(?:[.,]\d{1,9})?\b"), "<time>"),
    (re.compile(r"(?<![\w/.])(?:/tmp|/var/tmp|/dev/shm|/run|/private/var|/var/folders)/[^\s'\":;,()\[\]{}<>|]{1,400}"), "<tmp>"),
    (re.compile(r"(?<![\w/.])[.~]{0,2}/(?:[^\s/'\":;,()\[\]{}<>|]{1,255}/){0,64}([^\s/'\":;,()\[\]{}<>|]{1,255})"), r"<path>/\1"),
    (re.compile(r"\b[A-Za-z]:\\(?:[^\s\\'\":;,()]{1,255}\\){0,64}"), "<path>/"),
    (re.compile(r"\b0x[0-9a-f]{1,64}\b", re.IGNORECASE), "<hex>"),
    (re.compile(r"\b(?=[a-f]{0,63}[0-9])[0-9a-f]{7,64}\b", re.IGNORECASE), "<hex>"),
    (re.compile(r"\d+(?:[.,_]\d+)*"), "<n>"),
    (re.compile(r"\s+"), " "),
)


class Signature(msgspec.Struct, frozen=True):
    """Failures with the same `hex16` are the same one. `frames`: innermost first, at most five.

    `title` is its line, not yet cut to what a list shows.
    """

    hex16: str
    title: str
    frames: tuple[str, ...]


def signature(error: str, evidence: Mapping[str, Any] | None = None) -> Signature:
    """What tells the failure of text `error` from others, with the facts of the end in `evidence` (``exit``) when there are any.

    Numbers, hex, UUIDs, addresses, times, folders and pseudonyms of secrets do not count, colours and controls neither.
    """
    text = clip(error).text
    frames = frames_of(text)
    lines = headlines(text)
    found = (evidence or {}).get("exit")
    facts = found if isinstance(found, Mapping) else {}
    said = [facts.get("code"), facts.get("signal"), facts.get("oom_killed") is True]
    body = json.dumps([[normal(each) for each in lines], [normal(each) for each in frames], said])
    title = one_line(lines[0], _LINE) if lines else _ending(facts)
    return Signature(hashlib.sha256(body.encode()).hexdigest()[:DIGITS], title, frames)


def normal(line: str) -> str:
    """`line` without what differs from one time to the next."""
    line = line[:_LINE]
    for pattern, instead in _NORMAL:
        line = pattern.sub(instead, line)
    return line.strip()


def headlines(text: str) -> list[str]:
    """The lines that say what went wrong, the most telling one first: that of an exception or a panic alone, else the last five
    telling ones, else the last five.
    """
    lines = [line[:_LINE].strip() for line in text.split("\n")]
    for index, line in enumerate(lines):
        if any(pattern.search(line) for pattern in _HEADLINES):
            # Rust says where on one line and what on the next.
            return [line, *lines[index + 1 : index + 2]] if _PANICKED.search(line) else [line]
    spoken = [line for line in lines if line and not _CHAINED.match(line)]
    if raised := next((line for line in reversed(spoken) if _RAISED.match(line)), None):
        return [raised]
    telling = [line for line in spoken if _TELLING.search(line)][-_LINES:] or spoken[-_LINES:]
    # What make and npm say of a failure is that there was one.
    telling.reverse()
    return sorted(telling, key=lambda line: _MESSENGER.match(line) is not None)


def _ending(facts: Mapping[str, Any]) -> str:
    """The title of a failure without text."""
    if facts.get("oom_killed") is True:
        return "killed for want of memory"
    if facts.get("signal_name"):
        return f"killed by {facts['signal_name']}"
    return f"exit code {facts['code']}" if facts.get("code") is not None else "no error text was given"
