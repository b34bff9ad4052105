"""The redactor: text, bytes, streams, JSON trees, environments, command lines and file names without their secrets.

A secret is replaced by ``[redacted:<rule>:<12 hex of HMAC-SHA256(key, secret)>]``, without a key by ``[redacted:<rule>]``.
Redacting twice changes nothing. Long input is read in windows whose borders depend on the content alone, so however it is cut into
pieces, the result is the same.
"""

from __future__ import annotations

import hmac
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NoReturn

from mothball.redact import files, formats, judge
from mothball.redact.known import Known
from mothball.redact.rules import Rules
from mothball.redact.scan import Scanner, Span

BLOCK = 4 * 1024 * 1024
"""Bytes of one window of a stream; memory is a small multiple of it."""
OVERLAP = 128 * 1024
"""Bytes a window sees beyond its own end, four times the longest secret: one that lies across the border is seen whole."""
_ROUNDS = 5
_KNOWN_RANK = 2000


@lru_cache(maxsize=8)
def _scanner(rules: Rules) -> Scanner:
    return Scanner(rules)


def _hunted(rule: str, secret: bytes) -> bool:
    """Whether a value is looked for elsewhere too: of an ``.env`` only what looks made by a machine, the rest stands anywhere."""
    return rule != "env" or judge.is_env_secret(secret)


class Redactor:
    """Finds and replaces secrets. Threads may share one; what it found is in `counts` and `values`.

    `values` are the secrets themselves: they stay in memory, are never shown and never pickled.
    """

    def __init__(self, key: bytes | None, rules: Rules, known: Iterable[bytes] = ()) -> None:
        """`key` makes the pseudonyms (None: none); `known` are values that are secrets wherever they stand (8 bytes or more)."""
        self._key = key
        self.rules = rules
        self._scanner = _scanner(rules)
        self._known = Known(known)
        self._learned: set[bytes] = set()
        self._lock = threading.Lock()
        self.sources: set[str] = set()
        """The captures from whose credential files it has learned (by their digests)."""
        self.counts: Counter[str] = Counter()
        self.values: set[bytes] = set(self._known.values)

    def __repr__(self) -> str:
        return f"<Redactor {self.rules.digest}, {self.counts.total()} found>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Redactor holds secrets and is not pickled")

    @property
    def key_id(self) -> str | None:
        """Eight hex that tell whether two reports used the same key; None without one. Says nothing about the key itself."""
        return None if self._key is None else hmac.digest(self._key, b"mothball redaction key", "sha256").hex()[:8]

    def twin(self) -> Redactor:
        """Another with the same key, rules and known values, whose counts and findings are its own."""
        return type(self)(self._key, self.rules, self.known_values().values)

    def found(self, counts: Mapping[str, int], values: Iterable[bytes]) -> None:
        """Take over what a twin found."""
        with self._lock:
            self.counts.update(counts)
            self.values.update(values)

    # --- text and bytes -----------------------------------------------------------------------------------------------------------

    def text(self, text: str) -> str:
        """`text` without its secrets; lone surrogates survive."""
        raw = text.encode("utf-8", "surrogatepass")
        out = self._whole(raw, files.PROSE)
        return text if out is raw else out.decode("utf-8", "surrogatepass")

    def data(self, data: bytes, name: bytes = b"") -> bytes:
        """The content of a text file without its secrets. `name` (a path or base name) tells files for credentials from code.

        The very same object when nothing was found.
        """
        if len(data) <= BLOCK and data[:2] not in (b"\xff\xfe", b"\xfe\xff"):
            level, form = files.judged_as(name)
            return self._whole(data, level, form=form)
        return b"".join(self.stream((data,), name))

    def stream(self, pieces: Iterable[bytes], name: bytes = b"") -> Iterator[bytes]:
        """`data` for what does not fit into memory: the same bytes, in other pieces.

        A window is `BLOCK` bytes; what begins in it is seen to the end up to `OVERLAP` bytes behind it.
        """
        from mothball.redact.windows import redacted

        return redacted(self, pieces, name)

    def binary(self, pieces: Iterable[bytes]) -> set[str]:
        """The rules that fire in binary content; empty when it may be handed over.

        Looked at are its bytes, UTF-16 within them, and what it holds when it is compressed (``unread``: could not be looked at).
        """
        from mothball.redact.windows import fired

        return fired(self, pieces)

    def learn(self, name: bytes, data: bytes) -> None:
        """Find the secrets of a file, and from now on find the same values wherever they stand. Counts nothing."""
        order = files.utf16(data)
        view = data if order is None else files.narrow(data, order)
        level, form = files.judged_as(name)
        found = self._scanner.spans(view, 0, len(view), level)
        places = [
            *((span.start, span.end) for span in found),
            *((start, end) for start, end, rule in formats.found(view, 0, len(view), form) if _hunted(rule, view[start:end])),
        ]
        with self._lock:
            self._learned.update(value for value in (view[start:end] for start, end in places) if judge.is_distinct(value))

    def remember(self) -> bool:
        """From now on find every value found so far wherever it stands; True when there is one that was not known before."""
        with self._lock:
            new = not self.values <= self._known.values | self._learned
            self._learned |= self.values
        return new

    def known_values(self) -> Known:
        """Built again only when something was learned since: a package learns from many files before it reads the others."""
        if self._learned:
            with self._lock:
                if self._learned:
                    self.values |= self._learned
                    self._known = Known(self._known.values | self._learned)
                    self._learned = set()
        return self._known

    # --- structured ---------------------------------------------------------------------------------------------------------------

    def document(self, obj: Any) -> Any:
        """A JSON tree without its secrets: keys, strings, and the values of telling keys as a whole."""
        from mothball.redact.structured import document

        return document(self, obj)

    def env(self, env: Mapping[str, str]) -> dict[str, str]:
        """An environment without its secrets: every value of a telling name, and what the rules find in the others."""
        from mothball.redact.structured import environment

        return environment(self, env)

    def argv(self, argv: Iterable[str]) -> list[str]:
        """A command line without its secrets: ``--password x``, ``--token=x``, ``KEY=value``, URLs, headers."""
        from mothball.redact.structured import arguments

        return arguments(self, list(argv))

    def name(self, path: bytes) -> bytes:
        """A path without the secrets in its components; never adds a '/', none longer than 255 bytes."""
        from mothball.redact.structured import path_name

        return path_name(self, path)

    # --- the parts ----------------------------------------------------------------------------------------------------------------

    def pseudonym(self, rule: str, secret: bytes) -> bytes:
        """What stands for `secret`: the same one for the same bytes everywhere in the fleet."""
        if self._key is None:
            return b"[redacted:%s]" % rule.encode()
        return b"[redacted:%s:%s]" % (rule.encode(), hmac.digest(self._key, secret, "sha256")[:6].hex().encode())

    def spans(self, data: bytes, lo: int, hi: int, level: int, *, form: str = "", known: Known | None = None) -> list[Span]:
        """Where the secrets of ``data[lo:hi]`` stand: by rule, and `known` values (default: this redactor's). Counts nothing."""
        known = self.known_values() if known is None else known
        found = self._scanner.spans(data, lo, hi, level)
        more = [Span(start, end, _KNOWN_RANK, "known") for start, end in known.spans(data, lo, hi)]
        if form:
            more += [Span(start, end, _KNOWN_RANK - 1, rule) for start, end, rule in formats.found(data, lo, hi, form)]
        return self._scanner.joined([*found, *more], data, lo, hi) if more else found

    def replace(self, data: bytes, spans: list[Span], lo: int, hi: int) -> bytes:
        """``data[lo:hi]`` with pseudonyms for `spans`, which are counted."""
        out: list[bytes] = []
        at = lo
        for span in spans:
            secret = data[span.start : span.end]
            if _hunted(span.rule, secret):
                self._keep(secret)
            out += (data[at : span.start], self.pseudonym(span.rule, secret))
            at = span.end
        with self._lock:
            self.counts.update(span.rule for span in spans)
        out.append(data[at:hi])
        return b"".join(out)

    def behind_pseudonym(self, data: bytes, place: int) -> int:
        """`place`, or the end of the pseudonym that lies across it."""
        return self._scanner.behind_pseudonym(data, place)

    def whole_secret(self, rule: str, secret: str) -> str:
        """The pseudonym of a value that is a secret as a whole; a value that is pseudonyms already stays."""
        raw = secret.encode("utf-8", "surrogatepass")
        span = self._scanner.joined([Span(0, len(raw), 0, rule)], raw, 0, len(raw))
        return self.replace(raw, span, 0, len(raw)).decode("utf-8", "surrogatepass")

    def allowed(self, value: bytes) -> bool:
        return value in self.rules.allow

    def _whole(self, data: bytes, level: int, *, form: str = "") -> bytes:
        for _ in range(_ROUNDS):
            spans = self.spans(data, 0, len(data), level, form=form)
            if not spans:
                break
            data = self.replace(data, spans, 0, len(data))
        return data

    def _keep(self, secret: bytes) -> None:
        if judge.is_distinct(secret):
            with self._lock:
                self.values.add(secret)
