"""Where the secrets stand: one RE2 pass over all keywords, then a bounded look at each of them.

`spans` is a pure function of rules, bytes and level; nothing here remembers anything, so threads may share one `Scanner`
(RE2 lets go of the interpreter lock while it reads).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any, NamedTuple

from mothball.redact import tokens
from mothball.redact.builtin import KEY_MARKS, URL_MARK, WORDS
from mothball.redact.files import CODE
from mothball.redact.patterns import compiled, escaped, places
from mothball.redact.rules import Rule, Rules

REACH = 32 * 1024
"""Bytes that one secret may have at most: what a rule sees from its keyword on. A longer one is cut there, and its rest stays."""

PSEUDONYM = rb"\[redacted:[a-z0-9-]{1,32}(?::[0-9a-f]{12})?\]"
"""What stands for a secret. It is never a finding, and never part of one."""


class Span(NamedTuple):
    """A secret from `start` to `end`; of two rules that find the same, the lower `rank` gives the name."""

    start: int
    end: int
    rank: int
    rule: str


# A repetition is bounded where another hit can stand within it: what RE2 reads on before it can tell where the leftmost match is,
# it reads again at the next one. That of a URL cannot hold another, and counting in it would make RE2 build a state for each count.
_SHAPE = (
    rb"""://[^\s/'"<>@:]*[:@]|"""
    rb"--[\w-]{0,40}(?i:%(words)s)[\w-]{0,40}[ \t]{1,8}|(?:ENV|setenv)[ \t]{1,8}\w{0,40}(?i:%(words)s)\w{0,40}[ \t]{1,8}|"
    rb"(?i:%(words)s)[\w.\-]{0,48}(?:\x1b\[[0-9;]{0,8}m)?['\"\]\)\\ \t]{0,12}[?]?"
    rb"(?:(?:&quot;|&#3[49];|%%22|%%27)?(?:[=:,>]|%%3[aAdD])|"
    rb"\r?\n[ \t-]{0,40}['\"]?[vV]alue['\"]?[ \t]{0,8}:)"
)
_TELLS = re.compile(rb"[0-9A-Za-z\x80-\xff]")
"""What a part of a secret has: between two pseudonyms, quotes and backslashes of a text that was escaped once more are none."""
_SWALLOWS = 16
_VARIABLE = b"${"
_SHORT_NAME = re.compile(rb'"\w{1,2}":\Z')
_COMMON_BEGIN = (b"$", b'"')
_LONG = 128
_LONGEST_PSEUDONYM = 64
_LOOKAHEAD = 320
_TELLING_RANK = 1000
_OWN_RANK = 500


class Scanner:
    """The rules, compiled."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._by_keyword: dict[bytes, list[tuple[int, Rule, Any]]] = {}
        for rank, rule in enumerate(rules.builtin):
            for keyword in rule.keywords:
                self._by_keyword.setdefault(keyword, []).append((rank, rule, compiled(rule.pattern)))
        words = sorted({*self._by_keyword, *KEY_MARKS}, key=lambda w: (-len(w), w))
        marks = b"|".join(escaped(word) + _behind(word) for word in words)
        self._places = marks + b"|" + _SHAPE % {b"words": WORDS}
        self.finder = compiled(self._places, spans_only=True)
        self._own = [(_OWN_RANK + n, rule, compiled(rule.pattern)) for n, rule in enumerate(rules.own)]
        self._walls = compiled(PSEUDONYM, spans_only=True)

    def spans(self, data: bytes, lo: int = 0, hi: int | None = None, level: int = CODE) -> list[Span]:
        """The secrets in ``data[lo:hi]``, sorted, none touching another's bytes; what stands before `lo` is only looked back at."""
        hi = len(data) if hi is None else hi
        found = _Finding(self, data, lo, hi, level)
        at = found.at
        for start, end in places(self.finder, data, lo, hi):
            at(start, end)
        for rank, rule, pattern in self._own:
            if rule.keywords and not any(data.find(word, lo, hi) >= 0 for word in rule.keywords):
                continue
            for match in pattern.finditer(data, lo, hi):
                start, end = match.span(rule.group)
                if end > start:
                    found.add(start, end, rank, rule.name)
        return self._settled(found.spans, data, lo, hi)

    def _settled(self, spans: list[Span], data: bytes, lo: int, hi: int) -> list[Span]:
        """Overlapping spans joined, pseudonyms cut out, allowed values dropped."""
        if not spans:
            return []
        if self.rules.allow:
            spans = [span for span in spans if data[span.start : span.end] not in self.rules.allow]
        return self.joined(spans, data, lo, hi)

    def joined(self, spans: list[Span], data: bytes, lo: int, hi: int) -> list[Span]:
        """`spans` sorted and joined where they overlap; a pseudonym inside one stays, the bytes on both sides of it do not."""
        out: list[Span] = []
        for span in sorted(spans):
            if out and span.start < out[-1].end:
                last = out[-1]
                rank, rule = min((last.rank, last.rule), (span.rank, span.rule))
                out[-1] = Span(last.start, max(last.end, span.end), rank, rule)
            else:
                out.append(span)
        if not out or data.find(b"[redacted:", lo, hi) < 0:
            return out
        walls = [match.span() for match in self._walls.finditer(data, lo, hi)]
        return [part for span in out for part in _outside(span, walls) if part is span or _TELLS.search(data, part.start, part.end)]

    def behind_pseudonym(self, data: bytes, place: int) -> int:
        """`place`, or the end of the pseudonym that lies across it."""
        begin = data.rfind(b"[redacted:", max(0, place - _LONGEST_PSEUDONYM), min(len(data), place + len(b"[redacted:") - 1))
        if begin < 0 or begin >= place:
            return place
        wall = self._walls.match(data, begin, min(len(data), begin + _LONGEST_PSEUDONYM))
        return place if wall is None else max(place, wall.end())

    def rules_at(self, found: bytes) -> list[tuple[int, Rule, Any]]:
        """The rules to try where `found` stands: a keyword, or one of those that stand everywhere with what is behind it."""
        rules = self._by_keyword.get(found)
        if rules is None and found[:1] in _COMMON_BEGIN:
            rules = self._by_keyword.get(found[:2] if found[:2] == _VARIABLE else found[: found.find(b":") + 1])
        return rules or []


def _behind(keyword: bytes) -> bytes:
    """What has to follow a keyword that stands everywhere: every hit costs as much as some kilobytes without one."""
    if keyword == _VARIABLE:
        return rb"[\w.]{0,64}:"
    return rb'\s{0,64}"[0-9A-Za-z_-]{40}' if _SHORT_NAME.match(keyword) else b""


def _outside(span: Span, walls: list[tuple[int, int]]) -> Iterator[Span]:
    """The parts of `span` that no wall covers; the very same object when none touches it."""
    start = span.start
    at = max(0, bisect_left(walls, (start, start)) - 1)
    while at < len(walls) and walls[at][0] < span.end:
        wall_start, wall_end = walls[at]
        at += 1
        if wall_end <= start:
            continue
        if wall_start > start:
            yield span._replace(start=start, end=wall_start)
        start = wall_end
    if start == span.start:
        yield span
    elif start < span.end:
        yield span._replace(start=start)


class _Finding:
    """One scan: what was found so far, and what must not be looked at twice."""

    def __init__(self, scanner: Scanner, data: bytes, lo: int, hi: int, level: int) -> None:
        self.scanner = scanner
        self.data = data
        self.lo, self.hi, self.level = lo, hi, level
        self.spans: list[Span] = []
        self._done: dict[int, int] = {}
        self._key_ends: list[int] | None = None
        self._refused = lo

    def add(self, start: int, end: int, rank: int, rule: str) -> None:
        self.spans.append(Span(start, end, rank, rule))

    def at(self, start: int, end: int) -> None:
        """A keyword stands from `start` to `end`: try what can begin there, and within it when it is long."""
        self._try(start, end)
        if end - start <= _SWALLOWS and self.data[start : start + 1] not in _COMMON_BEGIN:
            return
        place, limit = start + 1, min(self.hi, end + _LOOKAHEAD)
        while (hit := next(places(self.scanner.finder, self.data, place, limit), None)) is not None and hit[0] < end:
            self._try(*hit)
            place = hit[0] + 1

    def _try(self, start: int, end: int) -> None:
        word = self.data[start:end]
        rules = self.scanner.rules_at(word)
        if rules:
            self._tokens(rules, start)
        elif word[:3] == URL_MARK:
            self._url(start)
        elif word in KEY_MARKS:
            self._key(start, begins=word[-6:] == b"BEGIN ")
        else:
            self._telling(start, end)

    def _tokens(self, rules: list[tuple[int, Rule, Any]], start: int) -> None:
        data, limit = self.data, min(self.hi, start + REACH)
        for rank, rule, pattern in rules:
            if start < self._done.get(rank, 0):
                continue
            match = pattern.match(data, start, limit)
            if match is None:
                continue
            begin, end = tokens.secret_of(match)
            bordered = rule.name not in tokens.NEED_BORDER or not tokens.inside_word(data, start, 0)
            if (rule.check is None or rule.check(data[begin:end])) and (bordered or tokens.is_random(data[begin:end])):
                self._done[rank] = end
                self.add(begin, end, rank, rule.name)
            elif end - start >= _LONG:
                # What was refused as a whole is not tried again from each of its keywords: that would be quadratic.
                self._done[rank] = start + (end - start) // 2

    def _url(self, start: int) -> None:
        for begin, end in tokens.user_info(self.data, start, self.lo, min(self.hi, start + REACH)):
            self.add(begin, end, _TELLING_RANK - 1, "url")

    def _key(self, start: int, *, begins: bool) -> None:
        if start < self._done.get(-1, self.lo):
            return
        span = (
            tokens.key_from(self.data, start, self.hi, self._ends())
            if begins
            else tokens.key_before(self.data, start, max(self.lo, self._done.get(-1, self.lo)))
        )
        if span is not None:
            self._done[-1] = span[1]
            self.add(*span, 0, "private-key")

    def _ends(self) -> list[int]:
        if self._key_ends is None:
            self._key_ends = tokens.key_ends(self.data, self.lo, self.hi)
        return self._key_ends

    def _telling(self, start: int, end: int) -> None:
        data = self.data
        if data[end - 1 : end + 2] == URL_MARK:
            self._url(end - 1)
        if start < self._refused:
            return
        for begin, stop, rule in tokens.beside(data, start, end, self.hi, self.level):
            if rule:
                self.add(begin, stop, _TELLING_RANK, rule)
            if stop - begin >= _LONG:
                self._refused = begin + (stop - begin) // 2
