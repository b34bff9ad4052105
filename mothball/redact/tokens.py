"""The parts of a scan that need more than a pattern: values beside telling names, user-info of URLs, private keys.

Everything here is anchored at a place the scan has found and looks at a bounded number of bytes.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

from mothball.redact import judge
from mothball.redact.files import CREDENTIALS
from mothball.redact.listed import listed
from mothball.redact.patterns import compiled

NEED_BORDER = frozenset({"openai", "anthropic", "sendgrid", "huggingface", "databricks", "npm"})
"""Rules whose short prefix also ends common words: behind a letter or digit the rest must be plainly random."""

LONGEST_VALUE = 32 * 1024
_JUDGED = 512
_NAME_BYTES = bytes(sorted(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-"))
_ALNUM = re.compile(rb"[0-9A-Za-z]")
_NAME_BACK = 64


_RUN = re.compile(rb"[0-9A-Za-z]{20,}")
_SURE_RUN = 32


def is_random(value: bytes) -> bool:
    """True when `value` has a run of letters and digits that is no word: long, or of both cases, with a digit."""
    return any(
        re.search(rb"[0-9]", run) is not None and (len(run) >= _SURE_RUN or (run.lower() != run and run.upper() != run))
        for run in _RUN.findall(value[:_JUDGED])
    )


def inside_word(data: bytes, start: int, lo: int) -> bool:
    """True when a letter or digit stands before `start` (``%3D``, an escaped '=', does not count)."""
    return start > lo and _ALNUM.match(data, start - 1) is not None and data[max(lo, start - 3) : start - 2] != b"%"


def secret_of(match: Any) -> tuple[int, int]:
    """The first group that took part, else the whole match."""
    for group in range(1, match.re.groups + 1):
        start, end = match.span(group)
        if start >= 0:
            return start, end
    found: tuple[int, int] = match.span()
    return found


# --- user-info of URLs ------------------------------------------------------------------------------------------------------------

_AUTHORITY = re.compile(
    rb"""://(?:([^\s\x00/'"<>?#`\\@:|]*+)(:[^\s\x00/'"<>?#`\\]*)?@|([^\s\x00/:@'"<>`\\]*+):([^\s\x00'"<>@`\\]++)@)"""
)
_AUTHORITY_REACH = 2048
_PORT = re.compile(rb"[0-9]{1,5}/|[0-9]{1,5}\Z")
_HARMLESS_USERS = frozenset(b"git hg svn ssh root admin user username www-data ubuntu ec2-user anonymous ftp *** ".split())
_SHOWN = frozenset(
    b"pass password passwd passwort pw pwd passw0rd user%3apw foo bar guest user_password mypassword your_password".split()
)
"""What stands for a password in examples, and in the tests of everything that reads URLs."""
_SSH = (b"ssh", b"sftp", b"scp", b"rsync")


def user_info(data: bytes, start: int, lo: int, hi: int) -> Iterator[tuple[int, int]]:
    """The secret parts of the user-info of the URL whose ``://`` stands at `start`: its password, and a user that is a token."""
    hi = min(hi, start + _AUTHORITY_REACH)
    if data.find(b"@", start + 3, hi) < 0:
        return
    match = _AUTHORITY.match(data, start, hi)
    if match is None:
        return
    if match.start(3) >= 0:
        if _PORT.match(data, match.start(4), match.end(4)):
            return
        user, secret = match.span(3), match.span(4)
    else:
        user = match.span(1)
        secret = (match.start(2) + 1, match.end(2)) if match.start(2) >= 0 else (-1, -1)
    name, password = data[user[0] : user[1]], data[secret[0] : secret[1]] if secret[0] >= 0 else b""
    has_password = bool(password) and not _placeholder(password)
    if has_password:
        yield secret
    dummy = password.lower() in {b"", b"x-oauth-basic", b"x"}
    if _placeholder(name) or name.lower() in _HARMLESS_USERS:
        return
    scheme = data[max(lo, start - 8) : start].lower()
    if judge.is_strong(name) or (dummy and not scheme.endswith(_SSH)):
        yield user


def _placeholder(value: bytes) -> bool:
    return (
        not value
        or judge.harmless(value)
        or value.lower() in _SHOWN
        or value.startswith((b"$", b"{", b"%(", b"%s", b"<", b"[", b"&lt;"))
    )


# --- private keys -----------------------------------------------------------------------------------------------------------------

_KIND = rb"(?:(?:[0-9A-Z]+ ){0,6}PRIVATE KEY(?: BLOCK)?|OpenVPN Static key V1|OpenVPN tls-crypt-v2 client key)"
_KEY_BEGIN = rb"-{4,5} ?BEGIN " + _KIND + rb" ?-{4,5}"
_KEY_END = rb"-{4,5} ?END " + _KIND + rb" ?-{4,5}"
_BODY = (
    rb"""(?:(?:\\[nrt]|[\s"'+,#>|*\\;()-]){0,40}(?:(?:Proc-Type|DEK-Info|Version|Comment|Subject|Charset|Hash|MessageID):[^\n\\]{0,128}"""
    rb"""|[0-9A-Za-z+/=]{16,}))+(?:(?:\\[nrt]|[\s"'+,#>|*\\]){1,40}=?[0-9A-Za-z+/=]{2,80}={0,2})?"""
)
KEY_REACH = 32 * 1024
_LINE = re.compile(rb"[0-9A-Za-z+/=]{16,}\Z")


def key_ends(data: bytes, lo: int, hi: int) -> list[int]:
    """Where the closing lines of private keys end, sorted."""
    return [match.end() for match in compiled(_KEY_END, spans_only=True).finditer(data, lo, hi)]


def key_from(data: bytes, start: int, hi: int, ends: list[int]) -> tuple[int, int] | None:
    """The private key whose first line begins at `start`: to its last line, or as far as base64 goes. None for a mention."""
    hi = min(hi, start + KEY_REACH)
    begin = compiled(_KEY_BEGIN, spans_only=True).match(data, start, hi)
    if begin is None:
        return None
    at = bisect_left(ends, begin.end())
    if at < len(ends) and ends[at] <= hi:
        # A second beginning before that end belongs to another key: this one was cut off.
        other = compiled(_KEY_BEGIN, spans_only=True).search(data, begin.end(), ends[at])
        if other is None:
            return start, ends[at]
        hi = other.start()
    body = compiled(_BODY, spans_only=True).match(data, begin.end(), hi)
    return None if body is None else (start, body.end())


def key_before(data: bytes, start: int, lo: int) -> tuple[int, int] | None:
    """The end of a private key whose beginning is not there (the tail of a log): its last line at `start` and the base64 above."""
    end = compiled(_KEY_END, spans_only=True).match(data, start, min(len(data), start + 128))
    if end is None:
        return None
    lines = data[max(lo, start - KEY_REACH) : start].replace(b"\\n", b"\n\n").split(b"\n")
    first = start
    for line in reversed(lines):
        bare = line.strip(b" \t\r\"',+>#|")
        if bare and not _LINE.match(bare) and not (first == start and len(bare) < 80 and re.fullmatch(rb"[0-9A-Za-z+/=]+", bare)):  # noqa: PLR2004
            break
        first -= len(line) + 1
    first = max(lo, first, start - KEY_REACH)
    return (first, end.end()) if first < start - 1 else None


# --- values beside telling names --------------------------------------------------------------------------------------------------

_COLOUR = re.compile(rb"\x1b\[[0-9;]{0,16}m")
"""What a terminal turns into colours; logs have it around names and values."""
# These see at most `_JUDGED` bytes behind a place that the scan found, and no two of their repetitions can share a byte.
_VALUE = re.compile(
    rb"=?[>=:]?[ \t]{0,16}(?:"
    + _COLOUR.pattern
    + rb"""){0,4}(?:
      \s{0,64}(?:(?:Some|Just|Ok|SecretStr|Secret|String::from)\()?(?:[A-Za-z@$]{1,2})?(?:""(?=")|''(?='))?(?:
        \\{1,3}["']((?:[^"'\\\n\r\x00]|\\[^\n"'\x00])*+) | "((?:[^"\\\n\r\x00]|\\[^\n\x00])*+)
      | '((?:[^'\\\n\r\x00]|\\[^\n\x00])*+) | `([^`\n\x00]*+))
    | [|>][+-]?\r?\n[ \t]+([^\s\x00]+)
    | (?:&quot;|&\#3[49];|%2[27]|(?i:bearer|basic|token|apikey|digest|negotiate)[ \t]+)?
      ([^\s\x00\x1b"'`,;<>&|()\[\]{}\\]+))""",
    re.VERBOSE,
)
_TYPED = re.compile(rb"[ \t]*+[A-Za-z_][\w.\[\], |?]*?[ \t]*=[ \t]*+(?![=>])")
_TYPED_REACH = 64
_PAIRED = re.compile(rb"""\s{0,40}\\?["']?[vV]alue\\?["']?[ \t]{0,8}[:=]""")
_CALLS = (b"(", b"[", b"{")
_AFTER_QUOTE = b" \t\r\n,;}])#\\"
_REST = rb"""[^\s\x00\x1b"'`,;<>&|()\[\]{}\\]+"""
_QUOTED_REST = {mark: rb"(?:[^%b\\\n\r\x00]|\\[^\n\x00])+" % mark for mark in (b'"', b"'", b"`")}
_BLOCK = 5
"""The group of `_VALUE` that is a block of YAML; those before it are quoted, the one behind it is not."""
_LINE_REST = rb"""[^\r\n\x00]+"""


def beside(data: bytes, start: int, end: int, hi: int, level: int) -> Iterator[tuple[int, int, str]]:
    """The value after the telling name found from `start` to `end` (its separator included), when it is a secret, and its rule.

    A value that is none comes without a rule: of a long one the first half is not tried again, that would be quadratic.
    """
    name_from = start - _trailing(data, start)
    name = _COLOUR.sub(b"", data[name_from:end]).rstrip(b" \t=:,>\"')]\\\r\n").lstrip(b"-")
    separator = data[end - 1 : end]
    at = end
    if separator == b":" and (typed := _TYPED.match(data, end, min(hi, end + _TYPED_REACH))) is not None:
        at = typed.end()
    elif separator == b"," and (paired := _PAIRED.match(data, end, min(hi, end + _TYPED_REACH))) is not None:
        at, separator = paired.end(), b":"
    match = _VALUE.match(data, at, min(hi, at + _JUDGED + 80))
    if match is None:
        if data[at : at + 1] in (b"[", b"{", b" ") and separator in b"=:>":
            yield from listed(data, at, hi, name, level)
        if level == CREDENTIALS and separator in b"=:":
            yield from _line_value(data, at, hi, name)
        return
    group = match.lastindex or 0
    first, last = match.span(group)
    quoted, block = group < _BLOCK, group == _BLOCK
    value = data[first:last]
    if not quoted and level != CREDENTIALS and data[last : last + 1] in _CALLS and last < hi:
        return  # a call, an index: an expression
    if separator == b"," and not (quoted and judge.no_name(value)):
        return
    tight = not quoted and separator == b"=" and at == first and data[end - 2 : end - 1] not in b" \t"
    if not judge.is_secret(name, value, quoted=quoted or block or separator in b" \t", tight=tight, level=level):
        yield first, last, ""
        return
    if level == CREDENTIALS and (not quoted or data[last + 1 : last + 2] not in _AFTER_QUOTE):
        last = _to_line_end(data, first, last, hi)
    elif last - first >= _JUDGED:
        rest = _QUOTED_REST.get(data[first - 1 : first], _REST) if quoted else _REST
        more = compiled(rest, spans_only=True).match(data, last, min(hi, first + LONGEST_VALUE))
        last = more.end() if more is not None else last
    yield first, last, "password" if judge.is_password(name) else "secret"


def _line_value(data: bytes, at: int, hi: int, name: bytes) -> Iterator[tuple[int, int, str]]:
    """In a file for credentials: what stands to the end of the line, though it begins with what no other value begins with."""
    last = _to_line_end(data, at, at, hi)
    first = last - len(data[at:last].lstrip(b" \t"))
    if first < last and judge.is_secret(name, data[first:last], quoted=True, tight=True, level=CREDENTIALS):
        yield first, last, "password" if judge.is_password(name) else "secret"


def _to_line_end(data: bytes, first: int, last: int, hi: int) -> int:
    """In a file for credentials an unquoted value runs to the end of its line: a password may hold any character."""
    rest = compiled(_LINE_REST, spans_only=True).match(data, last, min(hi, first + LONGEST_VALUE))
    if rest is None:
        return last
    text = data[last : rest.end()]
    comment = text.find(b" #")
    text = text if comment < 0 else text[:comment]
    return last + len(text.rstrip())


def _trailing(data: bytes, end: int) -> int:
    """How many bytes before `end` belong to a name, at most 64."""
    back = data[max(0, end - _NAME_BACK) : end]
    return len(back) - len(back.rstrip(_NAME_BYTES))
