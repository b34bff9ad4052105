"""What only the format of a file tells: all of a key file, the last field of a ``.pgpass``, the column of a table, a Secret's data.

`mothball.redact.forms` says which form a file has by its name, `found` where its secrets stand. What is looked at is what is read
at once, at most a window of a stream (`mothball.redact.engine.BLOCK`): the head of a table does not reach into the next one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Final

from mothball.redact import dotenv, files, judge
from mothball.redact.builtin import WORDS
from mothball.redact.patterns import compiled

Place = tuple[int, int, str]
_Form = Callable[[bytes, int, int], Iterator[Place]]

_ONE_LINE: Final = 4096
_LONGEST_BLOCK: Final = 64 * 1024


_HINTS: Final = {"json": (b'"Secret"', b"'Secret'"), "sql": (b"assword", b"ASSWORD", b"ecret", b"oken")}


def may_find(form: str, data: bytes, lo: int, hi: int) -> bool:
    """False when `found` finds nothing for sure: most files of the form do not hold what it is about."""
    hints = _HINTS.get(form)
    return bool(form) and (hints is None or any(data.find(hint, lo, hi) >= 0 for hint in hints))


def stricter(name: bytes, data: bytes, lo: int, hi: int) -> bool:
    """True when a look at ``data[lo:hi]`` as code, among other files, does not say what a look at the file `name` says."""
    level, form = files.judged_as(name)
    return level != files.CODE or may_find(form, data, lo, hi)


def found(data: bytes, lo: int, hi: int, form: str) -> Iterator[Place]:
    """(start, end, rule) of the secrets in ``data[lo:hi]`` that only the form tells."""
    look = _FORMS.get(form)
    if look is not None and may_find(form, data, lo, hi):
        yield from look(data, lo, hi)


@lru_cache(maxsize=32)
def _telling(pattern: bytes) -> Any:
    return compiled(pattern.replace(b"WORDS", b"(?i:" + WORDS + rb"|\bauth\b|\bpass\b|\bpw\b|\bpwd\b|\bpsk\b)"))


def _rule(name: bytes) -> str:
    return "password" if judge.is_password(name) else "secret"


def _worth(value: bytes) -> bool:
    return not judge.harmless(value.strip())


def _pairs(pattern: bytes, data: bytes, lo: int, hi: int) -> Iterator[Place]:
    """Matches of `pattern`, whose first group is a telling name and whose last one that took part is the value."""
    for match in _telling(pattern).finditer(data, lo, hi):
        group = match.lastindex or 0
        start, end = match.span(group)
        name, value = match[1], data[start:end]
        if (
            group > 1
            and b"public" not in name.lower()
            and judge.is_secret(name, value, quoted=True, tight=True, level=files.CONFIG)
        ):
            yield start, end, _rule(name)


# --- files that hold nothing else -------------------------------------------------------------------------------------------------


def _whole(data: bytes, lo: int, hi: int) -> Iterator[Place]:
    for match in compiled(rb"(?m)^[ \t]*([^#\s\x00][^\r\n\x00]*)").finditer(data, lo, hi):
        start, end = match.span(1)
        yield start, start + len(data[start:end].rstrip()), "secret"


def _line(data: bytes, lo: int, hi: int) -> Iterator[Place]:
    """A file with a telling name and a single word in it: ``secrets/db_password.txt``, ``production.key``."""
    text = data[lo : min(hi, lo + _ONE_LINE + 1)]
    word = text.strip()
    if 0 < len(word) <= _ONE_LINE and hi - lo <= _ONE_LINE and not any(byte in b" \t\r\n\0" for byte in word) and _worth(word):
        start = lo + len(text) - len(text.lstrip())
        yield start, start + len(word), "secret"


def _netrc(data: bytes, lo: int, hi: int) -> Iterator[Place]:
    for match in compiled(rb"password[ \t\r\n]+([^ \t\r\n]+)").finditer(data, lo, hi):
        yield *match.span(1), "netrc"


def _pgpass(data: bytes, lo: int, hi: int) -> Iterator[Place]:
    for match in compiled(rb"(?m)^(?:(?:[^:\\\r\n]|\\.)*:){4}([^\r\n]+)").finditer(data, lo, hi):
        yield *match.span(1), "password"


def _htpasswd(data: bytes, lo: int, hi: int) -> Iterator[Place]:
    for match in compiled(rb"(?m)^[^#:\r\n][^:\r\n]*:([^\s]+)").finditer(data, lo, hi):
        yield *match.span(1), "password"


def _bundle(data: bytes, lo: int, hi: int) -> Iterator[Place]:
    pattern = rb"""(?m)^(BUNDLE_[A-Z0-9_]+):[ \t]*["']?([^\s"']+)"""
    for match in compiled(pattern).finditer(data, lo, hi):
        user, _, password = match[2].partition(b":")
        if password and not match[2].startswith((b"http", b"/")):
            start = match.start(2)
            if judge.is_strong(user):
                yield start, start + len(user), "secret"
            if not password.startswith(b"x-oauth-basic"):
                yield start + len(user) + 1, match.end(2), "password"


def _env(data: bytes, lo: int, hi: int) -> Iterator[Place]:
    for start, end in dotenv.values(data, lo, hi):
        yield start, end, "env"


# --- configuration ----------------------------------------------------------------------------------------------------------------


def _words(data: bytes, lo: int, hi: int) -> Iterator[Place]:
    """Lines of a name and a value with spaces between, and names that tell something only where nothing but settings stands."""
    yield from _pairs(
        rb"""(?m)^[ \t]*(?:set[ \t]+|proxy_set_header[ \t]+|fastcgi_param[ \t]+)?["']?"""
        rb"""([\w./:@-]*WORDS[\w-]*|masterauth|bindpw|rootpw)["']?[ \t]+(?:=[ \t]*)?"""
        rb"""(?:"([^"\r\n]+)"|'([^'\r\n]+)'|([^\s"'={;#][^\s;]*))""",
        data, lo, hi,
    )  # fmt: skip
    for match in compiled(
        rb"""(?mi)^[ \t]*["']?(pass|pw|psk|key|privatekey|presharedkey|wpa_passphrase)["']?[ \t]*[=:][ \t]*"""
        rb"""(?:"([^"\r\n]+)"|([^\s"'#;{][^\r\n]*))"""
    ).finditer(data, lo, hi):
        start, end = match.span(match.lastindex or 0)
        value = data[start:end].rstrip()
        if _worth(value) and (match[1].lower() != b"key" or judge.is_strong(value)):
            yield start, start + len(value), "secret"
    for match in compiled(rb"""(?i)[\w-]+_(?:pass|password|passwd)=(?:"([^"\r\n]+)"|'([^'\r\n]+)'|([^\s"']+))""").finditer(
        data, lo, hi
    ):
        start, end = match.span(match.lastindex or 0)
        if _worth(data[start:end]):
            yield start, end, "password"
    for match in compiled(rb"(?m)^[ \t]*user[ \t][^\r\n]*?[ \t]>([^\s]+)").finditer(data, lo, hi):
        yield *match.span(1), "password"


_BLOCK = re.compile(rb"(?:[|>][0-9]?[+-]?[0-9]?[ \t]*(?:#[^\n]*)?)\r?\n")


def _yaml(data: bytes, lo: int, hi: int) -> Iterator[Place]:
    if data.find(b"Secret", lo, hi) >= 0:
        yield from _kubernetes(data, lo, hi)
    # A telling name over a block: all of its lines.
    for match in _telling(
        rb"(?m)^([ \t-]*)[\"']?([\w.-]*WORDS[\w-]*)[\"']?[ \t]*:[ \t]*(?:&\w+[ \t]+)?[|>][0-9+-]{0,2}[ \t]*\r?\n"
    ).finditer(data, lo, hi):
        end = _deeper(data, match.end(), min(hi, match.end() + _LONGEST_BLOCK), len(match[1]))
        body = data[match.end() : end]
        start = match.end() + len(body) - len(body.lstrip())
        if start < end and (not judge.says_not(match[2]) or any(judge.is_strong(word) for word in body.split())):
            yield start, match.end() + len(body.rstrip()), _rule(match[2])
    # A telling name over a list.
    for match in _telling(rb"(?m)^([ \t]*)[\"']?([\w.-]*WORDS[\w-]*)[\"']?[ \t]*:[ \t]*\r?\n([ \t]*- )").finditer(data, lo, hi):
        at = match.start(3)
        while (item := _ITEM.match(data, at, hi)) is not None:
            start, end = item.span(1)
            value = data[start:end].rstrip()
            if b": " not in value and not value.endswith(b":") and _in_list(match[2], value.strip(b"\"'")):
                yield start, start + len(value), _rule(match[2])
            at = item.end()
    yield from _pairs(
        rb"(?m)^[ \t-]*[\"']?([\w.-]*WORDS[\w-]*)[\"']?[ \t]*:[ \t]*(?:&\w+|!!?\w+)[ \t]+[\"']?([^\s\"'#]+)", data, lo, hi
    )


_ITEM = re.compile(rb"[ \t]*- ([^\r\n]*)\r?\n?")


def _in_list(name: bytes, value: bytes) -> bool:
    """One of several values of a telling name: a list may as well be one of names."""
    if not _worth(value) or judge.says_not(name):
        return False
    return judge.is_strong(value) or (judge.is_password(name) and judge.is_secret(name, value, quoted=True, tight=False, level=0))


def _deeper(data: bytes, at: int, hi: int, indent: int) -> int:
    """Behind the lines from `at` on that are empty or indented by more than `indent`."""
    while at < hi:
        line_end = data.find(b"\n", at, hi)
        line_end = hi if line_end < 0 else line_end + 1
        line = data[at:line_end]
        if line.strip() and len(line) - len(line.lstrip(b" \t")) <= indent:
            break
        at = line_end
    return at


def _kubernetes(data: bytes, lo: int, hi: int) -> Iterator[Place]:
    """Every value below ``data`` and ``stringData`` of a Secret."""
    at = lo
    for piece in re.split(rb"(?m)^(?=---)", data[lo:hi]):
        stop = at + len(piece)
        if re.search(rb"(?m)^[ \t-]*kind:[ \t]*[\"']?Secret\b", piece):
            for block in re.finditer(rb"(?m)^([ \t-]*)(?:data|stringData):[ \t]*\r?\n", piece):
                first = at + block.end()
                yield from _mapping(data, first, _deeper(data, first, stop, len(block[1])))
        at = stop


_ENTRY = re.compile(rb"""(?m)^([ \t]+)["']?[\w.-]+["']?:[ \t]*(.*)\r?\n?""")


def _mapping(data: bytes, at: int, hi: int) -> Iterator[Place]:
    while at < hi:
        match = _ENTRY.match(data, at, hi)
        if match is None:
            line = data.find(b"\n", at, hi)
            at = hi if line < 0 else line + 1
            continue
        value = match[2].rstrip()
        at = match.end()
        if re.match(rb"(?:[|>][0-9+-]{0,2})?[ \t]*\Z", value):
            end = _deeper(data, at, hi, len(match[1]))
            body = data[at:end]
            if body.strip():
                yield at + len(body) - len(body.lstrip()), at + len(body.rstrip()), "secret"
            at = end
        elif not re.match(rb"\{\{.*\}\}\Z|[\"']{2}\Z", value):
            yield match.start(2), match.start(2) + len(value), "secret"


def _json(data: bytes, lo: int, hi: int) -> Iterator[Place]:
    """A Secret of Kubernetes as JSON."""
    if not re.search(rb'"kind"\s*:\s*"Secret"', data[lo:hi]):
        return
    for block in re.finditer(rb'"(?:data|stringData)"\s*:\s*\{([^{}]*)\}', data[lo:hi]):
        for value in re.finditer(rb':\s*"((?:[^"\\]|\\.)+)"', block[1]):
            yield lo + block.start(1) + value.start(1), lo + block.start(1) + value.end(1), "secret"


def _strong(data: bytes, lo: int, hi: int) -> Iterator[Place]:
    """In a file for secrets: values that look made by a machine, whatever they are called."""
    yield from _yaml(data, lo, hi)
    yield from _json(data, lo, hi)
    for match in compiled(rb"""[\w"'][ \t]*[:=][ \t]*(?:"([^"\r\n]{16,})"|'([^'\r\n]{16,})'|([^\s"'#,{}\[\]]{16,}))""").finditer(
        data, lo, hi
    ):
        start, end = match.span(match.lastindex or 0)
        if judge.is_strong(data[start:end]):
            yield start, end, "secret"


def _toml(data: bytes, lo: int, hi: int) -> Iterator[Place]:
    yield from _pairs(
        rb"""(?m)^[ \t]*["']?([\w.-]*WORDS[\w-]*)["']?[ \t]*=[ \t]*(?:'''([^']+)'''|\"\"\"([^"]+)\"\"\")""", data, lo, hi
    )


def _hcl(data: bytes, lo: int, hi: int) -> Iterator[Place]:
    yield from _pairs(
        rb'variable[ \t]+"([^"\r\n]*WORDS[^"\r\n]*)"\s*\{[^{}]{0,400}?\bdefault[ \t]*=[ \t]*"([^"\r\n]+)"', data, lo, hi
    )


def _tfstate(data: bytes, lo: int, hi: int) -> Iterator[Place]:
    """What ``random_password`` and its like made."""
    pattern = rb'"(result|b64_std|b64_url|bcrypt_hash|hex|private_key_openssh|private_key_pem_pkcs8)"\s*:\s*"((?:[^"\\]|\\.)+)"'
    if data.find(b'"random_', lo, hi) >= 0 or data.find(b'"tls_', lo, hi) >= 0:
        for match in compiled(pattern).finditer(data, lo, hi):
            yield *match.span(2), "secret"


def _har(data: bytes, lo: int, hi: int) -> Iterator[Place]:
    """The cookies of a recorded browser session."""
    for block in compiled(rb'"cookies"\s*:\s*\[([^\]]*)\]').finditer(data, lo, hi):
        for value in re.finditer(rb'"value"\s*:\s*"((?:[^"\\]|\\.)+)"', block[1]):
            yield block.start(1) + value.start(1), block.start(1) + value.end(1), "cookie"


def _xml(data: bytes, lo: int, hi: int) -> Iterator[Place]:
    yield from _pairs(rb"""(?:name|key|id)=["']([^"'<>]*WORDS[^"'<>]*)["'][^<>]{0,80}?\bvalue=["']([^"'<>]+)["']""", data, lo, hi)
    yield from _pairs(rb"""(?:name|key|id)=["']([^"'<>]*WORDS[^"'<>]*)["'][^<>/]{0,80}>\s*<value>([^<]+)<""", data, lo, hi)
    yield from _pairs(rb"<([\w.:-]*WORDS[\w.-]*)(?:[ \t][^<>/]{0,200})?>([^<>\s][^<>\r\n]*)</", data, lo, hi)
    yield from _pairs(rb"<key>([^<>]*WORDS[^<>]*)</key>\s*<string>([^<>]+)<", data, lo, hi)
    yield from _pairs(
        rb"<t[dh][^<>]{0,80}>\s*([\w.-]*WORDS[\w.-]*)\s*</t[dh]>\s*<td[^<>]{0,80}>(?:<[^<>]{1,80}>)*([^<>\s]+)<", data, lo, hi
    )


# --- tables -----------------------------------------------------------------------------------------------------------------------

_MOST_COLUMNS = 500


def _table(data: bytes, lo: int, hi: int) -> Iterator[Place]:
    """The columns of a table whose head names them."""
    end = data.find(b"\n", lo, hi)
    if end < 0:
        return
    head = data[lo:end]
    mark = max((b",", b";", b"\t", b"|"), key=head.count)
    names = [name.strip(b" \t\r\"'\xef\xbb\xbf") for name in head.split(mark)]
    columns = [n for n, name in enumerate(names) if len(name) <= 64 and _is_column(name)]  # noqa: PLR2004 - no name is longer
    if not columns or not head.count(mark) or len(names) > _MOST_COLUMNS:
        return
    quote = re.escape(mark)
    cell = re.compile(rb'"((?:[^"]|"")*)"|([^' + quote + rb"\r\n]*)")
    at = end + 1
    while at < hi:
        column = 0
        while at < hi:
            match = cell.match(data, at, hi)
            assert match is not None  # noqa: S101 - the second part matches nothing as well
            start, stop = match.span(1) if match.start(1) >= 0 else match.span(2)
            if column in columns and _worth(data[start:stop]):
                yield start, stop, _rule(names[column])
            at = match.end()
            if data[at : at + 1] != mark:
                break
            at, column = at + 1, column + 1
        line = data.find(b"\n", at, hi)
        at = hi if line < 0 else line + 1


def _is_column(name: bytes) -> bool:
    told = name.replace(b" ", b"_").decode("latin-1")
    from mothball.redact.structured import is_telling

    return is_telling(told) and not judge.says_not(told.encode("latin-1"))


def _sql(data: bytes, lo: int, hi: int) -> Iterator[Place]:
    """The columns of the rows that a dump inserts, or copies."""
    for match in compiled(rb"(?i)COPY[ \t]+[\w.\"]+[ \t]*\(([^()]+)\)[ \t]+FROM[ \t]+stdin;[ \t]*\r?\n").finditer(data, lo, hi):
        columns = [n for n, name in enumerate(match[1].split(b",")) if _is_column(name.strip(b' "`'))]
        at = match.end()
        while columns and at < hi and not data.startswith(b"\\.", at):
            line = data.find(b"\n", at, hi)
            line = hi if line < 0 else line
            start = at
            for n, field in enumerate(data[at:line].split(b"\t")):
                if n in columns and field != b"\\N" and _worth(field):
                    yield start, start + len(field.rstrip(b"\r")), "password"
                start += len(field) + 1
            at = line + 1
    for match in compiled(rb"(?i)INSERT[ \t]+INTO[ \t]+[^()\r\n]{1,200}\(([^()]+)\)\s*VALUES\s*").finditer(data, lo, hi):
        columns = [n for n, name in enumerate(match[1].split(b",")) if _is_column(name.strip(b' "`[]\r\n\t'))]
        if columns:
            yield from _rows(data, match.end(), hi, columns)


_CELL = re.compile(rb"\s*(?:[nN]?'((?:[^'\\]|''|\\.){0,8192})'|([^,()']+(?:\([^()]*\))?))\s*")


def _rows(data: bytes, at: int, hi: int, columns: list[int]) -> Iterator[Place]:
    while data[at : at + 1] == b"(":
        at += 1
        column = 0
        while (match := _CELL.match(data, at, hi)) is not None:
            if column in columns and match.start(1) >= 0 and _worth(match[1]):
                yield *match.span(1), "password"
            at, column = match.end(), column + 1
            if data[at : at + 1] != b",":
                break
            at += 1
        if data[at : at + 1] != b")":
            return
        at += 1
        gap = re.compile(rb"\s*,\s*").match(data, at, hi)
        if gap is None:
            return
        at = gap.end()


_FORMS: dict[str, _Form] = {
    "whole": _whole, "line": _line, "netrc": _netrc, "pgpass": _pgpass, "htpasswd": _htpasswd, "bundle": _bundle, "env": _env,
    "words": _words, "yaml": _yaml, "json": _json, "toml": _toml, "hcl": _hcl, "tfstate": _tfstate, "har": _har,
    "strong": _strong, "xml": _xml, "table": _table, "sql": _sql,
}  # fmt: skip
