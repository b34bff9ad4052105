"""What a file's name and first bytes say: text or not, a place for credentials or not, and the view on UTF-16 as bytes."""

from __future__ import annotations

from functools import lru_cache

HEAD = 8192
"""Bytes of the beginning that `is_text` looks at."""

CODE, CONFIG, CREDENTIALS = 0, 1, 2
"""How much a value beside a telling name must look like a secret: in code much, in configuration less, in a credential file not."""

_CREDENTIALS = frozenset(
    (
        b".netrc",
        b"_netrc",
        b".npmrc",
        b".yarnrc",
        b".yarnrc.yml",
        b".pypirc",
        b".git-credentials",
        b".dockercfg",
        b".pgpass",
        b".my.cnf",
        b".htpasswd",
        b".s3cfg",
        b".boto",
        b".vault-token",
        b".env",
        b".envrc",
        b".flaskenv",
        b"credentials",
        b"credentials.json",
        b"secrets.json",
        b"secrets.yml",
        b"secrets.yaml",
        b"secrets.toml",
        b"auth.json",
        b"hosts.yml",
        b"gradle.properties",
        b".terraformrc",
        b"credentials.toml",
        b"credentials.tfrc.json",
        b"pip.conf",
        b"nuget.config",
        b".databrickscfg",
    )
)
_CREDENTIAL_ENDS = (
    b".git/config",
    b".docker/config.json",
    b".kube/config",
    b"/.git/credentials",
    b".env",
    b".tfvars",
    b".tfvars.json",
)
_CONFIG_ENDS = (
    b".ini",
    b".cfg",
    b".conf",
    b".cnf",
    b".properties",
    b".toml",
    b".yml",
    b".yaml",
    b".config",
    b".env.example",
    b".service",
    b".xml",
)
_NETRC = frozenset((b".netrc", b"_netrc"))
_ENV_PREFIX = b".env."
_ENVS = frozenset((b".env", b".envrc", b".flaskenv"))
_ENVIRON = (b"environ", b"environment")
_LITTLE, _BIG = b"\xff\xfe", b"\xfe\xff"


def is_text(head: bytes) -> bool:
    """True when a file that begins with `head` (8 KiB are enough) is redacted as text: no NUL in it, or the mark of UTF-16."""
    return utf16(head) is not None or 0 not in head[:HEAD]


def utf16(head: bytes) -> str | None:
    """``little`` or ``big`` for bytes with the mark of UTF-16, else None (UTF-32 too, whose mark begins alike)."""
    if head[:2] == _LITTLE:
        return None if head[:4] == b"\xff\xfe\0\0" else "little"
    return "big" if head[:2] == _BIG else None


@lru_cache(maxsize=4096)
def _of_base(base: bytes) -> int:
    if base in _CREDENTIALS or (base.startswith(_ENV_PREFIX) and not base.endswith((b".example", b".sample", b".template"))):
        return CREDENTIALS
    return CONFIG if base.endswith(_CONFIG_ENDS) or base in _ENVIRON else CODE


def level_of(name: bytes) -> int:
    """`CREDENTIALS`, `CONFIG` or `CODE` for a file's name or path."""
    if not name:
        return CODE
    folded = name[-64:].lower()
    if folded.endswith(_CREDENTIAL_ENDS):
        return CREDENTIALS
    return _of_base(folded.rpartition(b"/")[2])


def is_credentials(name: bytes) -> bool:
    """True for the name or path of a file whose purpose is to hold credentials: `Redactor.learn` reads it before the others."""
    return level_of(name) == CREDENTIALS


@lru_cache(maxsize=4096)
def _form_of_base(base: bytes) -> str:
    if base in _NETRC:
        return "netrc"
    return "env" if base in _ENVS or base.endswith(b".env") or base.startswith(_ENV_PREFIX) else ""


def form_of(name: bytes) -> str:
    """``netrc`` or ``env`` for a file's name or path when its format tells more than its lines do, else an empty text."""
    return _form_of_base(name[-64:].lower().rpartition(b"/")[2]) if name else ""


_OTHER = bytes([0]) + b"\xff" * 255


def narrow(data: bytes, order: str) -> bytes:
    """UTF-16 as one byte a unit: ASCII as it is, every other unit as a byte of 0x80 or more. An odd last byte is left out."""
    whole = len(data) & ~1
    low, high = (data[0:whole:2], data[1:whole:2]) if order == "little" else (data[1:whole:2], data[0:whole:2])
    if high.count(0) == len(high):
        return low
    foreign = int.from_bytes(high.translate(_OTHER), "little") & int.from_bytes(b"\x80" * len(high), "little")
    return (int.from_bytes(low, "little") | foreign).to_bytes(len(low), "little")


def widen(ascii_text: bytes, order: str) -> bytes:
    """ASCII as UTF-16."""
    out = bytearray(2 * len(ascii_text))
    out[0 if order == "little" else 1 :: 2] = ascii_text
    return bytes(out)
