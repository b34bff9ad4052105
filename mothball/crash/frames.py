"""The innermost frames of a stack trace: Python, Node, Java, Go, Rust, and C as gdb and the sanitizers print it.

A frame is ``function@file`` without line numbers, addresses and folders: they move with every edit and every machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Final, NamedTuple

MOST_FRAMES: Final = 5
_LINE: Final = 2000
_FAR: Final = 4
"""Lines between two frames of one trace: source lines, markers, arguments."""
_BEGINS = re.compile(r"^\s{0,40}(?:Traceback \(most recent call last\)|Caused by: |goroutine \d)")

_PYTHON = re.compile(r'^\s{0,40}(?:\|\s{0,8})?File "([^"]{1,1000})", line \d{1,9}(?:, in (\S{1,300}))?')
_NODE = re.compile(r"^\s{1,40}at (?:async )?(?:new )?(?:([^\s(][^(]{0,300}?) \()?([^()\s][^()]{0,1000}?):\d{1,9}:\d{1,9}\)?$")
_JAVA = re.compile(r"^\s{1,40}at (?:[\w.@-]{1,100}/)?([\w.$<>]{1,300})\(([^():]{1,200})(?::\d{1,9})?\)")
_GO = re.compile(
    r"^((?:[\w.-]{1,100}/){0,16}[\w-]{1,100}\.[^\s(]{1,200}(?:\(\*?[\w.\[\]]{1,100}\)[^\s(]{0,200})?)\((?:[^)]{0,1000})\)$"
)
_GO_AT = re.compile(r"^\t(\S{1,1000}):\d{1,9}(?: \+0x[0-9a-f]{1,16})?$")
_RUST = re.compile(r"^\s{1,8}(?P<number>\d{1,5}):\s{1,8}(?:0x[0-9a-f]{1,16} - )?(?P<name>\S.{0,500})$")
_RUST_HASH = re.compile(r"::h[0-9a-f]{16}$")
_RUST_AT = re.compile(r"^\s{4,40}at (\S{1,1000}?):\d{1,9}(?::\d{1,9})?$")
_C = re.compile(
    r"^\s{0,8}#(?P<number>\d{1,5})\s{1,4}(?:0x[0-9a-f]{1,16} )?(?:in )?(?P<name>[~\w:<>$@.*&,]{1,300})(?P<rest>.{0,1000})$"
)
_C_FILE = re.compile(r"(?:\bat |\s)([^\s():]{1,500}):\d{1,9}(?::\d{1,9})?\s{0,8}$")

# The machinery between the failure and whoever noticed it says nothing about the failure.
_NOISE = re.compile(
    r"rust_begin_unwind$|rust_panic|core::panicking::|core::result::unwrap_failed|core::option::(?:unwrap|expect)_failed|std::|__rust_|"
    r"(?:<.{0,200} as )?core::ops::function::|panic$|runtime\.|testing\.tRunner|"
    r"(?:__GI_)?(?:raise|abort|__assert_fail(?:_base)?)$|__pthread_kill|pthread_kill$|__libc_|_start$|__asan_|__interceptor_|__sanitizer|"
    r"(?:node:)?internal/|node:internal"
)


class _Frame(NamedTuple):
    line: int
    name: str
    first: bool = False
    """Its own number says that a trace begins here."""


def frames_of(text: str) -> tuple[str, ...]:
    """At most five frames, innermost first; empty for a text without a stack trace.

    Of several traces the one of the cause counts: Python's, Java's and Node's last, of Go, Rust and C the first.
    """
    lines = [line[:_LINE].rstrip() for line in text.split("\n")]
    begins = {number for number, line in enumerate(lines) if _BEGINS.match(line)}
    for find, last, reverse in _KINDS:
        blocks = _blocks(find(lines), begins)
        if blocks:
            block = blocks[-1] if last else blocks[0]
            frames = [frame for frame in (reversed(block) if reverse else block) if not _NOISE.match(frame.partition("@")[0])]
            return tuple((frames or block)[:MOST_FRAMES])
    return ()


def _blocks(frames: Iterable[_Frame], begins: set[int]) -> list[list[str]]:
    """Frames of one trace stand together, and each trace begins anew."""
    blocks: list[list[str]] = []
    before = -_FAR - 1
    for frame in frames:
        if frame.first or frame.line - before > _FAR or any(number in begins for number in range(before + 1, frame.line)):
            blocks.append([])
        blocks[-1].append(frame.name)
        before = frame.line
    return blocks


def _python(lines: list[str]) -> Iterable[_Frame]:
    for number, line in enumerate(lines):
        if found := _PYTHON.match(line):
            yield _Frame(number, f"{found[2] or '<module>'}@{_base(found[1])}")


def _node(lines: list[str]) -> Iterable[_Frame]:
    for number, line in enumerate(lines):
        if found := _NODE.match(line):
            where = found[2]
            internal = "node:internal/" if "node:internal" in where else ""
            yield _Frame(number, f"{internal}{found[1] or '<anonymous>'}@{_base(where)}")


def _java(lines: list[str]) -> Iterable[_Frame]:
    for number, line in enumerate(lines):
        if found := _JAVA.match(line):
            yield _Frame(number, f"{found[1]}@{found[2]}")


def _go(lines: list[str]) -> Iterable[_Frame]:
    for number, (line, after) in enumerate(pairwise(lines)):
        if after.startswith("\t") and (found := _GO.match(line)) and (at := _GO_AT.match(after)):
            yield _Frame(number, f"{found[1]}@{_base(at[1])}")


def _rust(lines: list[str]) -> Iterable[_Frame]:
    for number, line in enumerate(lines):
        if found := _RUST.match(line):
            at = _RUST_AT.match(lines[number + 1]) if number + 1 < len(lines) else None
            if at is None and "::" not in found["name"]:
                continue  # a numbered list of something else
            name = _RUST_HASH.sub("", found["name"]) + (f"@{_base(at[1])}" if at else "")
            yield _Frame(number, name, first=int(found["number"]) == 0)


def _c(lines: list[str]) -> Iterable[_Frame]:
    for number, line in enumerate(lines):
        if found := _C.match(line):
            at = _C_FILE.search(found["rest"])
            yield _Frame(number, found["name"] + (f"@{_base(at[1])}" if at else ""), first=int(found["number"]) == 0)


def _base(path: str) -> str:
    return path.replace("\\", "/").rpartition("/")[2] or path


_KINDS: tuple[tuple[Callable[[list[str]], Iterable[_Frame]], bool, bool], ...] = (
    (_python, True, True),
    (_java, True, False),
    (_go, False, False),
    (_c, False, False),
    # Before Node, whose frames look like the places that Rust prints below its own.
    (_rust, False, False),
    (_node, True, False),
)
