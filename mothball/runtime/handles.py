"""What a workspace's record says about its runtime: `{"driver": ..., handle}`, checked field by field.

A handle comes out of the registry, so it is anybody's text. It is checked when it is registered and again before it is used, and
what passes here can be an argument of a program or a part of a URL: it never begins with a dash, and never holds a slash, a space
or a quote, except for the one absolute path of runc.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from mothball.errors import InvalidParams

DRIVERS = ("none", "process", "runc", "systemd", "command", "docker", "podman")
MAX_PID = 2**22
MAX_HANDLE_TEXT = 1024
MAX_COMMAND_FIELDS = 32

_CONTAINER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}\Z")
_RUNC_CONTAINER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}\Z")
# A slice, a target or a socket is more than one workspace; `@` is an instance, `\\` an escape of systemd's own.
_UNIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9:_.@\\-]{0,200}\.(service|scope)\Z")
_COMMAND = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\Z")
_FIELD = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")
_BOOT_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
_NAMESPACE = re.compile(r"pid:\[[0-9]{1,20}\]\Z")
_PRINTABLE = re.compile(r"[\x21-\x7e]+\Z")
_MAX_TICKS = 2**63
_MAX_PORT = 65535

Check = Callable[[str, object], Any]


def check(raw: object) -> dict[str, Any]:
    """`raw` as a runtime, with the fields its driver knows; raises `InvalidParams` that names the field.

    None and ``{}`` stand for a workspace of which no runtime is known, and stay ``{}``.
    """
    if raw is None or raw == {}:
        return {}
    if not isinstance(raw, dict) or not all(isinstance(name, str) for name in raw):
        raise InvalidParams('runtime must be an object such as {"driver": "process", "pid": 4711, "start_time": 8812345}')
    driver = raw.get("driver")
    if not isinstance(driver, str) or driver not in DRIVERS:
        raise InvalidParams(f"runtime.driver {_shown(driver)}: use one of {', '.join(DRIVERS)}")
    fields = {name: value for name, value in raw.items() if name != "driver"}
    out: dict[str, Any] = {"driver": driver}
    if "health_url" in fields:
        if driver in {"none", "command"}:
            raise InvalidParams(
                f"runtime.health_url needs a driver that sees the workspace's own ports; {driver} does not"
                + (" (its `alive` can look at whatever it likes)" if driver == "command" else "")
            )
        out["health_url"] = health_url(fields.pop("health_url"))
    if driver == "command":
        return out | _command(fields)
    required, optional = _FIELDS[driver]
    known = required | optional
    if unknown := sorted(set(fields) - set(known)):
        names = ", ".join((*known, "health_url")) if known else "none"
        raise InvalidParams(f"runtime of driver {driver}: unknown field {_shown(unknown[0])}; known are {names}")
    if missing := [name for name in required if fields.get(name) is None]:
        hint = "; `handle_of_pid` or `mothball register --pid` reads both on the host" if driver == "process" else ""
        raise InvalidParams(f"runtime of driver {driver} needs {' and '.join(missing)}{hint}")
    return out | {name: test(f"runtime.{name}", fields[name]) for name, test in known.items() if fields.get(name) is not None}


def health_url(value: object) -> str:
    """`value` as a URL that a health probe may ask; raises `InvalidParams`.

    The host is written as an address (or ``localhost``, which is never looked up): a name could lead anywhere tomorrow.
    Whether the address and the port are the workspace's own is seen when it is asked.
    """
    if not isinstance(value, str) or len(value) > MAX_HANDLE_TEXT or not _PRINTABLE.match(value):
        raise InvalidParams(f"runtime.health_url must be a URL of at most {MAX_HANDLE_TEXT} printable ASCII characters")
    try:
        url = urlsplit(value)
        port, host = url.port, url.hostname
    except ValueError as error:
        raise InvalidParams(f"runtime.health_url cannot be read: {error}") from None
    if url.scheme not in {"http", "https"} or not host or port == 0:
        raise InvalidParams("runtime.health_url must look like http://127.0.0.1:8080/healthz")
    if "@" in url.netloc or url.fragment or "\\" in value:
        raise InvalidParams("runtime.health_url has neither user, password, fragment nor backslash")
    if host != "localhost":
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            raise InvalidParams(
                f"runtime.health_url: {host!r} is no address. Write 127.0.0.1, ::1, localhost or an address of the workspace: "
                "names are not looked up"
            ) from None
        if address.is_unspecified or address.is_multicast or getattr(address, "scope_id", None):
            raise InvalidParams(f"runtime.health_url: {host} is not the address of one workspace")
    return value


def _command(fields: dict[str, Any]) -> dict[str, Any]:
    """The handle of an operator's own driver: its name, and small plain values that it gets on standard input."""
    if "name" not in fields:
        raise InvalidParams("runtime of driver command needs name: that of the program in the folder MOTHBALL_RUNTIME_COMMANDS")
    if len(fields) > MAX_COMMAND_FIELDS:
        raise InvalidParams(f"runtime of driver command has {len(fields)} fields; at most {MAX_COMMAND_FIELDS} are allowed")
    out: dict[str, Any] = {"name": _match(_COMMAND, "lower-case letters, digits, _ and -")("runtime.name", fields["name"])}
    for name, value in fields.items():
        if not _FIELD.match(name):
            raise InvalidParams(
                f"runtime of driver command: {_shown(name)} is no field's name; use lower-case letters, digits and _"
            )
        if isinstance(value, str):
            if len(value) > MAX_HANDLE_TEXT or "\0" in value or not _is_utf8(value):
                raise InvalidParams(f"runtime.{name} must be a UTF-8 text of at most {MAX_HANDLE_TEXT} characters without NUL")
        elif not (value is None or isinstance(value, bool) or (isinstance(value, int) and abs(value) < _MAX_TICKS)):
            raise InvalidParams(f"runtime.{name} must be a text, a whole number, true, false or null")
        out[name] = value
    return out


def _is_utf8(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    return repr(value)[:80]


def _match(pattern: re.Pattern[str], allowed: str) -> Check:
    def test(what: str, value: object) -> str:
        if not isinstance(value, str) or not pattern.match(value):
            raise InvalidParams(f"{what} {_shown(value)}: {allowed}, beginning with a letter or digit")
        return value

    return test


def _whole(least: int, most: int) -> Check:
    def test(what: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise InvalidParams(f"{what} {_shown(value)} must be a whole number from {least} to {most}")
        return value

    return test


def _folder(what: str, value: object) -> str:
    """An absolute path in its plainest spelling; whether it may be trusted is looked at on the host."""
    if (
        not isinstance(value, str) or len(value) > MAX_HANDLE_TEXT or not value.isprintable()
        or not value.startswith("/") or value.startswith("//") or ".." in value.split("/") or str(PurePosixPath(value)) != value
    ):  # fmt: skip
        raise InvalidParams(f"{what} {_shown(value)} must be an absolute path without '..', double or trailing slashes")
    return value


def _text(pattern: re.Pattern[str], example: str) -> Check:
    def test(what: str, value: object) -> str:
        if not isinstance(value, str) or not pattern.match(value):
            raise InvalidParams(f"{what} {_shown(value)} must look like {example}")
        return value

    return test


_ANY_CONTAINER = _match(_CONTAINER, "a container's id or name has 1-128 letters, digits, _ . -")
_FIELDS: dict[str, tuple[dict[str, Check], dict[str, Check]]] = {
    "none": ({}, {}),
    "process": (
        {"pid": _whole(2, MAX_PID), "start_time": _whole(0, _MAX_TICKS)},
        {
            "boot_id": _text(_BOOT_ID, "the text of /proc/sys/kernel/random/boot_id"),
            "pid_ns": _text(_NAMESPACE, "pid:[4026531836]"),
        },
    ),
    "runc": ({"container": _match(_RUNC_CONTAINER, "1-128 letters, digits and _ . + -")}, {"root": _folder}),
    "systemd": ({"unit": _match(_UNIT, "a unit that ends in .service or .scope")}, {}),
    "docker": ({"container": _ANY_CONTAINER}, {}),
    "podman": ({"container": _ANY_CONTAINER}, {}),
}
"""Of each driver: the fields it needs and those it may have."""
