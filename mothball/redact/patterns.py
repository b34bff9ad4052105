"""RE2 patterns over bytes: compiled once, never with backtracking, never written to standard error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

_MEMORY = 64 * 1024**2


def _options(*, spans_only: bool) -> Any:
    import re2

    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    options.max_mem = _MEMORY
    options.log_errors = False
    options.never_capture = spans_only
    return options


@lru_cache(maxsize=512)
def compiled(pattern: bytes, *, spans_only: bool = False) -> Any:
    """`pattern` compiled by RE2 for bytes; with `spans_only` groups are not captured. Raises `re2.error`."""
    import re2

    return re2.compile(pattern, _options(spans_only=spans_only))


def places(pattern: Any, data: bytes, lo: int, hi: int) -> Iterator[tuple[int, int]]:
    """Where `pattern`, compiled with `spans_only`, matches in ``data[lo:hi]``; never empty matches.

    The same as ``finditer``, without its object for each match: a scan of source code is mostly this loop.
    """
    import re2

    inner = getattr(pattern, "_regexp", None)
    anchor = getattr(re2, "_Anchor", None)
    if inner is None or anchor is None:  # another release of the binding; slower, not wrong
        for found in pattern.finditer(data, lo, hi):
            yield found.span()
        return
    match, unanchored = inner.Match, anchor.UNANCHORED
    while lo < hi:
        start, end = match(unanchored, data, lo, hi)[0]
        if start < 0:
            return
        yield start, end
        lo = end if end > lo else lo + 1


def error_of(pattern: bytes) -> str | None:
    """What RE2 says against `pattern`, None when it is a pattern."""
    import re2

    try:
        compiled(pattern)
    except re2.error as error:
        reason = error.args[0] if error.args else error
        return reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
    return None


def quoted(literals: Iterable[bytes]) -> bytes:
    """A pattern that matches any of `literals`, longer ones first."""
    return b"|".join(escaped(literal) for literal in sorted(set(literals), key=lambda word: (-len(word), word)))


def escaped(literal: bytes) -> bytes:
    """A pattern that matches `literal` and nothing else."""
    return b"".join(b"\\x%02x" % byte for byte in literal)
