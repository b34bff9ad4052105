"""JSON trees, environments, command lines and paths: where the structure says what a value is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mothball.redact import files, judge
from mothball.redact.builtin import WORDS

if TYPE_CHECKING:
    from mothball.redact.engine import Redactor

_DEEPEST = 200
_LONGEST_COMPONENT = 255
_EXACT = frozenset(
    (
        *("auth", "pass", "passwd", "password", "pwd", "pw", "pin", "otp", "secret", "token"),
        *("cookie", "cookies", "set-cookie", "authorization", "apikey", "dsn"),
    )
)
_FLAG = re.compile(r"--?([A-Za-z][\w.-]*)\Z")
_ASSIGNED = re.compile(r"(--?)?([A-Za-z_][\w.-]*)=(.*)\Z", re.DOTALL)
_SHORT_PASSWORD = re.compile(r"-p(?=\S)")
_PASSWORD_TOOLS = frozenset(["mysql", "mysqldump", "mysqladmin", "mariadb", "sshpass"])
_USER_FLAGS = frozenset(("-u", "--user", "--proxy-user", "-U"))


@lru_cache(maxsize=1)
def _words() -> re.Pattern[str]:
    return re.compile(WORDS.decode(), re.IGNORECASE)


@lru_cache(maxsize=8192)
def is_telling(name: str) -> bool:
    """True when a value of this name is a secret by its name alone: ``DB_PASSWORD``, ``apiKey``, ``X-Auth-Token``."""
    short = name[:256]
    return short.lower() in _EXACT or _words().search(f"_{short}") is not None


def document(redactor: Redactor, obj: Any, depth: int = 0) -> Any:
    """`obj` redacted; nested deeper than 200 it is replaced as a whole."""
    if isinstance(obj, str):
        return redactor.text(obj)
    if depth > _DEEPEST:
        return None
    if isinstance(obj, Mapping):
        return _mapping(redactor, obj, depth)
    if isinstance(obj, (list, tuple)):
        return [document(redactor, item, depth + 1) for item in obj]
    return obj


def _mapping(redactor: Redactor, obj: Mapping[Any, Any], depth: int) -> dict[Any, Any]:
    out: dict[Any, Any] = {}
    named = next((obj[key] for key in ("name", "key", "Name", "Key") if isinstance(obj.get(key), str)), None)
    for key, value in obj.items():
        shown = redactor.text(key) if isinstance(key, str) else key
        while shown in out:
            shown = f"{shown}+"
        name = named if named is not None and key in ("value", "Value") and is_telling(named) else key
        out[shown] = (
            _of_name(redactor, name, value, depth)
            if isinstance(name, str) and is_telling(name)
            else document(redactor, value, depth + 1)
        )
    return out


def _of_name(redactor: Redactor, name: str, value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return _value(redactor, name, value)
    if isinstance(value, (list, tuple)):
        return [_of_name(redactor, name, item, depth + 1) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and judge.is_password(name.encode("utf-8", "surrogatepass")):
        return _value(redactor, name, str(value)) if abs(value) >= 10**4 else value
    return document(redactor, value, depth + 1)


def _value(redactor: Redactor, name: str, value: str) -> str:
    """The value of a telling name: redacted as a whole unless it is harmless or holds a whole sentence of its own."""
    raw_name, raw = name.encode("utf-8", "surrogatepass"), value.encode("utf-8", "surrogatepass")
    if redactor.allowed(raw) or (judge.says_not(raw_name) and not judge.is_strong(raw)):
        return redactor.text(value)
    if not judge.is_secret(raw_name, raw, quoted=True, tight=True, level=files.CREDENTIALS):
        return redactor.text(value)
    return redactor.whole_secret("password" if judge.is_password(raw_name) else "secret", value)


def environment(redactor: Redactor, env: Mapping[str, str]) -> dict[str, str]:
    """See `Redactor.env`."""
    return {
        redactor.text(name): _value(redactor, name, value) if is_telling(name) else redactor.text(value)
        for name, value in env.items()
    }


def arguments(redactor: Redactor, argv: list[str]) -> list[str]:
    """See `Redactor.argv`."""
    argv = _as_lines(redactor, argv)
    out: list[str] = []
    tool = argv[0].rpartition("/")[2] if argv else ""
    name: str | None = None
    for item in argv:
        if name is not None and not (item.startswith("--") and len(item) > 2):  # noqa: PLR2004 - '--' itself
            out.append(_value(redactor, name, item))
            name = None
            continue
        name = None
        if match := _ASSIGNED.match(item):
            dashes, key, value = match.groups()
            out.append(
                f"{dashes or ''}{redactor.text(key)}={_value(redactor, key, value)}" if is_telling(key) else redactor.text(item)
            )
        elif (match := _FLAG.match(item)) and is_telling(match[1]):
            name = match[1]
            out.append(redactor.text(item))
        elif tool in _PASSWORD_TOOLS and item == "-p":
            name = "password"
            out.append(item)
        elif tool in _PASSWORD_TOOLS and _SHORT_PASSWORD.match(item):
            out.append("-p" + _value(redactor, "password", item[2:]))
        elif out and argv[len(out) - 1] in _USER_FLAGS and ":" in item:
            user, _, password = item.partition(":")
            out.append(f"{redactor.text(user)}:{_value(redactor, 'password', password)}")
        else:
            out.append(redactor.text(item))
    return out


def _as_lines(redactor: Redactor, argv: list[str]) -> list[str]:
    """What only the words before a word tell, as a shell would have them: ``docker login -p x``, ``IDENTIFIED BY 'x'``."""
    for quote in (b"", b"'"):
        words = [word.encode("utf-8", "surrogatepass") for word in argv]
        line = b" ".join(quote + word + quote for word in words)
        spans = redactor.spans(line, 0, len(line), files.PROSE)
        if not spans:
            continue
        begin = 0
        for number, word in enumerate(words):
            begin += len(quote)
            inside = [
                span._replace(start=max(0, span.start - begin), end=min(len(word), span.end - begin))
                for span in spans
                if span.start < begin + len(word) and span.end > begin
            ]
            if inside:
                argv = [
                    *argv[:number],
                    redactor.replace(word, inside, 0, len(word)).decode("utf-8", "surrogatepass"),
                    *argv[number + 1 :],
                ]
            begin += len(word) + len(quote) + 1
    return argv


def path_name(redactor: Redactor, path: bytes) -> bytes:
    """Each component by itself, then the path as a whole for what only both together tell."""
    out = b"/".join(_component(redactor, part) for part in path.split(b"/"))
    for _ in range(3):
        spans = redactor.spans(out, 0, len(out), files.CODE)
        if not spans:
            break
        out = b"/".join(_component(redactor, part) for part in _cut(redactor, out, spans).split(b"/"))
    return out


def _cut(redactor: Redactor, path: bytes, spans: list[Any]) -> bytes:
    pieces: list[bytes] = []
    at = 0
    for span in spans:
        pieces.append(path[at : span.start])
        inside = path[span.start : span.end].split(b"/")
        pieces.append(
            b"/".join(
                redactor.replace(part, [span._replace(start=0, end=len(part))], 0, len(part)) if part else part for part in inside
            )
        )
        at = span.end
    return b"".join([*pieces, path[at:]])


def _component(redactor: Redactor, part: bytes) -> bytes:
    out = redactor.data(part)
    if len(out) <= _LONGEST_COMPONENT or out is part:
        return out
    return redactor.pseudonym("name", part)
