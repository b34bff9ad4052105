"""Ignore rules: ``.mothballignore`` (and ``.gitignore`` when asked), with git's semantics, compared with git by a test.

Rules given with the capture are strongest, then the deepest ignore file; within one the last match wins, ``!`` takes back.
Nothing below an ignored folder can be taken back: the walk does not enter it. Texts and patterns are an enemy's until
proven otherwise: their number is limited and no pattern can be slow (see `wildmatch`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from mothball.errors import InvalidParams
from mothball.store.wildmatch import SPECIAL, BrokenPattern, compile_glob

MAX_PATTERNS = 20_000
"""Most patterns of one ignore file."""
MAX_GLOBS = 1_000
"""Most patterns with wildcards that apply to one path; each costs a fraction of a microsecond per entry."""
LENIENT = frozenset({".gitignore"})
"""Files of other tools: a pattern that can never match is passed over there, as git does."""
_BOM = b"\xef\xbb\xbf"


class _Rule(NamedTuple):
    number: int
    """Place in its file: the highest that matches decides."""
    ignore: bool
    folder_only: bool


class _Glob(NamedTuple):
    rule: _Rule
    expression: re.Pattern[bytes]
    path: bool


class _Level:
    """The patterns of one file, or those given with the capture. `base` is its folder with a slash, or ``b""``."""

    __slots__ = ("base", "globs", "names", "paths", "size", "suffix_ends", "suffixes")

    def __init__(self, base: bytes) -> None:
        self.base = base
        self.names: dict[bytes, list[_Rule]] = {}
        self.paths: dict[bytes, list[_Rule]] = {}
        self.suffixes: dict[bytes, list[_Rule]] = {}
        self.suffix_ends: tuple[bytes, ...] = ()
        self.globs: list[_Glob] = []
        self.size = 0

    def add(self, pattern: bytes, number: int) -> None:
        """Add one pattern as it stands after git's trimming; raises `BrokenPattern`."""
        ignore = not pattern.startswith(b"!")
        if not ignore:
            pattern = pattern[1:]
        folder_only = pattern.endswith(b"/")
        if folder_only:
            pattern = pattern[:-1]
        path = b"/" in pattern
        rule = _Rule(number, ignore, folder_only)
        if path and pattern.startswith(b"/"):
            pattern = pattern[1:]
        if not pattern:
            return
        if not SPECIAL.intersection(pattern):
            (self.paths if path else self.names).setdefault(pattern, []).append(rule)
        elif not path and pattern[:1] == b"*" and not SPECIAL.intersection(pattern[1:]):
            self.suffixes.setdefault(pattern[1:], []).append(rule)
            self.suffix_ends = tuple(self.suffixes)
        else:
            self.globs.append(_Glob(rule, compile_glob(pattern, path=path), path))
        self.size += 1

    def decide(self, path: bytes, name: bytes, is_dir: bool) -> bool | None:
        """True: ignored; False: taken back; None: no rule of this level says anything."""
        if not path.startswith(self.base):
            return None
        below = path[len(self.base) :]
        best: _Rule | None = None
        candidates = self.names.get(name, ()), self.paths.get(below, ())
        for rules in candidates:
            for rule in rules:
                if (is_dir or not rule.folder_only) and (best is None or rule.number > best.number):
                    best = rule
        if self.suffixes and name.endswith(self.suffix_ends):
            for suffix, found in self.suffixes.items():
                for rule in found:
                    if (is_dir or not rule.folder_only) and (best is None or rule.number > best.number) and name.endswith(suffix):
                        best = rule
        for rule, expression, whole in reversed(self.globs):
            if best is not None and best.number > rule.number:
                break
            if (is_dir or not rule.folder_only) and expression.fullmatch(below if whole else name):
                best = rule
                break
        return None if best is None else best.ignore


class IgnoreRules:
    """The rules that apply inside one folder. Immutable: `descend` gives the rules of a folder below."""

    __slots__ = ("_given", "_levels")

    def __init__(self, given: _Level | None = None, levels: tuple[_Level, ...] = ()) -> None:
        self._given = given
        self._levels = levels

    @classmethod
    def root(cls, patterns: Sequence[str]) -> IgnoreRules:
        """Rules given with a capture, relative to the root; `InvalidParams` names the one that is broken."""
        if not patterns:
            return cls()
        level = _Level(b"")
        for number, pattern in enumerate(patterns, 1):
            try:
                raw = pattern.encode("utf-8", "surrogateescape")
                if b"\0" in raw or b"\n" in raw:
                    raise BrokenPattern("a NUL byte or a line break")
                level.add(_trim(raw), number)
            except (BrokenPattern, UnicodeEncodeError) as error:
                raise InvalidParams(f"ignore pattern {number} ({pattern[:200]!r}) has {_reason(error)}") from None
        _check_count([level], "the ignore patterns of this capture")
        return cls(level if level.size else None)

    def descend(self, dir_path: str, ignore_texts: Sequence[bytes], names: Sequence[str] = ()) -> IgnoreRules:
        """The rules inside the folder `dir_path` (``""``: the root), whose ignore files hold `ignore_texts`, the weakest first.

        `names` are the names of those files, for messages. `InvalidParams` names file and line of a pattern that can never
        match, but in a ``.gitignore``: other people's mistakes there must not stop a capture.
        """
        if not ignore_texts:
            return self
        base = os.fsencode(dir_path) + b"/" if dir_path else b""
        levels = list(self._levels)
        for place, text in enumerate(ignore_texts):
            name = names[place] if place < len(names) else ".mothballignore"
            level = _parse(text, base, f"{dir_path}/{name}" if dir_path else name, name in LENIENT)
            if level.size:
                levels.append(level)
                _check_count(levels, f"{dir_path}/{name}" if dir_path else name)
        return IgnoreRules(self._given, tuple(levels)) if len(levels) > len(self._levels) else self

    def active(self) -> bool:
        """False when no rule exists, so that a walk need not ask."""
        return self._given is not None or bool(self._levels)

    def ignored(self, path: str, is_dir: bool) -> bool:
        """True when the entry at `path` is left out; the folders above it are taken to be walked. Links are no folders."""
        raw = os.fsencode(path)
        name = raw[raw.rfind(b"/") + 1 :]
        if self._given is not None:
            decision = self._given.decide(raw, name, is_dir)
            if decision is not None:
                return decision
        for level in reversed(self._levels):
            decision = level.decide(raw, name, is_dir)
            if decision is not None:
                return decision
        return False


def _parse(text: bytes, base: bytes, where: str, lenient: bool) -> _Level:
    level = _Level(base)
    for number, line in enumerate(text.removeprefix(_BOM).split(b"\n"), 1):
        # git works on C strings: a NUL ends the line. It strips one carriage return at the very end only.
        pattern = line.removesuffix(b"\r").partition(b"\0")[0]
        if not pattern or pattern.startswith(b"#"):
            continue
        try:
            level.add(_trim(pattern), number)
        except BrokenPattern as error:
            if not lenient:
                raise InvalidParams(f"{_show(where)}, line {number}: {_show_bytes(pattern)} has {_reason(error)}") from None
        if level.size > MAX_PATTERNS:
            break
    _check_count([level], where)
    return level


def _check_count(levels: Sequence[_Level], where: str) -> None:
    if any(level.size > MAX_PATTERNS for level in levels):
        raise InvalidParams(f"{_show(where)}: more than {MAX_PATTERNS} ignore patterns")
    if sum(len(level.globs) + len(level.suffixes) for level in levels) > MAX_GLOBS:
        raise InvalidParams(f"{_show(where)}: more than {MAX_GLOBS} ignore patterns with wildcards apply there")


def _trim(pattern: bytes) -> bytes:
    """`pattern` without trailing spaces that no backslash protects; tabs stay, as in git."""
    cut: int | None = None
    place = 0
    while place < len(pattern):
        if pattern[place] == ord(" "):
            cut = place if cut is None else cut
        else:
            if pattern[place] == ord("\\"):
                place += 1
                if place == len(pattern):
                    return pattern
            cut = None
        place += 1
    return pattern if cut is None else pattern[:cut]


def _reason(error: ValueError) -> str:
    return str(error) if isinstance(error, BrokenPattern) else "no text that a file name can have"


def _show(text: str) -> str:
    return _show_bytes(text.encode("utf-8", "surrogateescape"))


def _show_bytes(raw: bytes) -> str:
    text = raw[:200].decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
