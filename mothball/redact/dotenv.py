"""Files of environment variables: every value in them is taken for a secret, whatever its name, but for what is plainly none.

Said in many dialects: ``NAME=value``, with ``export``, with spaces, ``NAME: value``, quoted over several lines, commented out,
fish's ``set -gx NAME value``. What is plainly none: nothing at all, a boolean, a number of up to five digits, a reference to
another variable, a word of `WORDS`, and - under a name that tells nothing - what is only a URL, a host or a path and has no part
that looks made by a machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from mothball.redact import judge
from mothball.redact.patterns import compiled

WORDS: Final = frozenset(
    b"true false yes no on off y n none null nil undefined default auto enabled disabled "
    b"development dev develop production prod staging stage test tests testing ci qa uat sandbox preview local localhost example "
    b"trace debug verbose info notice warn warning error critical fatal silent quiet json text plain logfmt pretty console "
    b"stdout stderr syslog file files database db redis memcached memory array sync queue cookie session log smtp sendmail mail "
    b"sqlite sqlite3 mysql mariadb pgsql postgres postgresql mongodb rabbitmq kafka s3 http https tcp udp tls ssl starttls "
    b"utf-8 utf8 utf8mb4 utf8mb4_unicode_ci ascii latin1 utc gmt c posix c.utf-8 en_us.utf-8 en_gb.utf-8 de_de.utf-8 en en_us "
    b"en-us "
    b"en_gb en-gb de fr es it nl pt ja zh public private strict lax bearer basic always never".split()
)  # fmt: skip
"""Words that stand everywhere and tell nothing, compared without case."""

_LINE: Final = (
    rb"(?m)^(?:\xef\xbb\xbf)?[ \t]*#*[ \t]*(?:(?:export|set|setx|setenv|declare -x|typeset -x|readonly|local)[ \t]+)?"
    rb"""([A-Za-z_][\w.-]*)(?:[ \t]*=[ \t]*|:[ \t]+)"""
    rb"""(?:"((?:[^"\\\x00]|\\[^\x00])*)"|'([^'\x00]*)'|`([^`\x00]*)`|([^\s\x00"'`#][^\r\n\x00]*|["'`][^\r\n\x00]*))"""
)
_FISH: Final = (
    rb"""(?m)^[ \t]*set[ \t]+-[a-zA-Z]{1,4}[ \t]+([A-Za-z_]\w*)[ \t]+(?:"([^"\r\n\x00]*)"|'([^'\r\n\x00]*)'|([^\s\x00"']+))"""
)
_NUMBER = re.compile(rb"[-+]?[0-9]{1,5}(?:\.[0-9]{1,3})?(?:ms|s|m|h|d|k|kb|mb|gb|%)?\Z", re.IGNORECASE)
_REFERENCE = re.compile(rb"\$\{[^}]*\}\Z|\$\([^)]*\)\Z|\$[A-Za-z_]\w*\Z|%\w+%\Z|<[^>]*>\Z|\{\{[^}]*\}\}\Z|\*+\Z|\.+\Z|-+\Z|[xX]+\Z")
_URL = re.compile(rb"[a-z][a-z0-9+.-]{1,20}://([\w.-]+|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?((?:/[\w.~%@-]*)*)\Z")
_HOST = re.compile(
    rb"(?:[A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}:[0-9]{1,5}\Z|(?:[a-z0-9-]{1,63}\.)+[a-z]{2,12}\Z|"
    rb"[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?::[0-9]{1,5}|/[0-9]{1,2})?\Z|::1?\Z"
)
_PATH = re.compile(rb"(?:\.{1,2}|~|[A-Za-z]:|\$\w+|\$\{\w+\})?[/\\](?:[\w.@ -]+[/\\]?)*\Z|\.\Z")
_LINE_END = re.compile(rb"[\r\n\x00]|\Z")
_BEHIND_QUOTE: Final = b" \t\r\n;#"
LONGEST: Final = 32 * 1024
_PART = re.compile(rb"[/\\.:]")
_LONGEST_PART = 20
_DIGITS, _LETTERS = re.compile(rb"[0-9]"), re.compile(rb"[A-Za-z]")


def values(data: bytes, lo: int, hi: int) -> Iterator[tuple[int, int]]:
    """Where the values of ``data[lo:hi]`` stand that are taken for secrets."""
    for match in compiled(_LINE).finditer(data, lo, hi):
        yield from _judged(data, match)
    if data.find(b"set ", lo, hi) >= 0:
        for match in compiled(_FISH).finditer(data, lo, hi):
            yield from _judged(data, match)


def _judged(data: bytes, match: re.Match[bytes]) -> Iterator[tuple[int, int]]:
    group = match.lastindex or 1
    start, end = match.span(group)
    if group == 1 or start < 0:
        return
    if group == match.re.groups or data[end + 1 : end + 2] not in _BEHIND_QUOTE:
        line = _LINE_END.search(data, end, end + LONGEST)
        end = start + len(_without_comment(data[start : line.start() if line else end]))
    value = data[start:end]
    if not is_plain(match[1], value):
        yield start, end


def _without_comment(value: bytes) -> bytes:
    place = value.find(b" #")
    return (value if place < 0 else value[:place]).rstrip()


def is_plain(name: bytes, value: bytes) -> bool:
    """True for a value of the variable `name` that is no secret."""
    value = value.strip()
    if not value or value.lower() in WORDS or _NUMBER.match(value) or _REFERENCE.match(value):
        return True
    from mothball.redact.structured import is_telling

    if is_telling(name.decode("ascii", "replace")) and not judge.says_not(name):
        return judge.harmless(value) and not _DIGITS.match(value)
    return _is_place(value)


def _is_place(value: bytes) -> bool:
    """A URL, a host or a path, none of whose parts looks made by a machine."""
    if len(value) > 1024:  # noqa: PLR2004
        return False
    url = _URL.match(value)
    if not (url or _HOST.match(value) or _PATH.match(value)):
        return False
    return not any(_made(part) for part in _PART.split(value))


def _made(part: bytes) -> bool:
    if len(part) < judge.LEAST_TOKEN:
        return False
    digits = len(_DIGITS.findall(part))
    mixed = digits > 0 and _LETTERS.search(part) is not None
    return (
        (mixed and len(part) >= _LONGEST_PART)
        or (mixed and digits * 4 >= len(part))
        or judge.is_strong(part)
        or (digits == len(part))
    )
