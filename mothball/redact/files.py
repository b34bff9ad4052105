"""What a file's name and first bytes say: text or not, a place for credentials or not, and the view on UTF-16 as bytes."""

from __future__ import annotations

from functools import lru_cache

from mothball.redact.forms import form_of_name

HEAD = 8192
"""Bytes of the beginning that `is_text` looks at."""

CODE, CONFIG, CREDENTIALS, PROSE = 0, 1, 2, 3
"""How much a value beside a telling name must look like a secret: in code much, in configuration less, in a credential file not.

`PROSE` is for logs, notes, histories and error messages: as code, but ``password=hunter2`` names no variable there.
"""

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
        b"pip.ini",
        b"application_default_credentials.json",
        b"credentials.csv",
        b"auth.toml",
    )
)
_CREDENTIAL_ENDS = (b".env", b".tfvars", b".tfvars.json")
_TOOLS = {b"config": b"/.", b"config.json": b"/.docker/"}
"""Names that count as credentials only in the folder of a tool: ``.git/config``, ``.git/modules/x/config``, ``.aws/config``."""
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
_ENV_PREFIX = b".env."
_ENVS = frozenset((b".env", b".envrc", b".flaskenv"))
_ENVIRON = (b"environ", b"environment")
_CODE_ENDS = (b".js", b".cjs", b".mjs", b".ts", b".tsx", b".py", b".rb", b".php", b".json", b".yml", b".yaml", b".toml", b".md")
"""``.env.ts`` is a program and no file of variables."""
_PROSE_ENDS = (
    *(b".log", b".out", b".err", b".txt", b".history", b"_history", b".trace", b".stdout", b".stderr", b".mk", b".bat", b".cmd"),
    *(b".smb", b".creds"),
)
_PROSE = frozenset((b"makefile", b"gnumakefile", b"hosts", b"inventory", b"nohup.out"))
_HOLDING = frozenset(("whole", "pgpass", "htpasswd", "bundle", "netrc"))
"""Forms of files that are there for their credentials."""
_LITTLE, _BIG = b"\xff\xfe", b"\xfe\xff"


def is_text(head: bytes) -> bool:
    """True when a file that begins with `head` (8 KiB are enough) is redacted as text: no NUL in it, or the mark of UTF-16."""
    return utf16(head) is not None or 0 not in head[:HEAD]


def utf16(head: bytes) -> str | None:
    """``little`` or ``big`` for bytes with the mark of UTF-16, else None (UTF-32 too, whose mark begins alike)."""
    if head[:2] == _LITTLE:
        return None if head[:4] == b"\xff\xfe\0\0" else "little"
    return "big" if head[:2] == _BIG else None


_ORDINARY = (CODE, "")
_PROGRAMS = tuple(
    b".js .ts .map .mjs .cjs .mts .cts .tsx .jsx .flow .py .pyi .pyc .go .rs .java .c .h .cc .cpp .hpp .css .scss .md .png".split()
)
"""Names that end so are ordinary, and most of a tree's do: nothing else has to be looked up for them."""


@lru_cache(maxsize=8192)
def _of_base(base: bytes) -> tuple[int, str]:
    base = base.lower()
    env = base in _ENVS or base.endswith(b".env") or base.startswith(_ENV_PREFIX)
    form = "env" if env and not base.endswith(_CODE_ENDS) else form_of_name(base)
    sample = base.endswith((b".example", b".sample", b".template", b".dist"))
    if not sample and (env or form in _HOLDING or base in _CREDENTIALS or base.endswith(_CREDENTIAL_ENDS)):
        return CREDENTIALS, form
    if env or base.endswith(_CONFIG_ENDS) or base in _ENVIRON:
        return CONFIG, form
    return PROSE if base in _PROSE or base.endswith(_PROSE_ENDS) else CODE, form


def judged_as(name: bytes) -> tuple[int, str]:
    """For a file's name or path: its level (`CODE` to `PROSE`), and its form (`mothball.redact.formats`) when it has one."""
    folder, _, base = name.rpartition(b"/")
    if base.endswith(_PROGRAMS) and base[:1] != b".":
        return _ORDINARY
    if base in _TOOLS and _TOOLS[base] in b"/" + folder + b"/":
        return CREDENTIALS, "bundle" if folder.endswith(b".bundle") else ""
    return _of_base(base)


def level_of(name: bytes) -> int:
    """`CREDENTIALS`, `CONFIG`, `PROSE` or `CODE` for a file's name or path."""
    return judged_as(name)[0]


def form_of(name: bytes) -> str:
    """The form of a file's name or path when its format tells more than its lines do, else an empty text."""
    return judged_as(name)[1]


def is_credentials(name: bytes) -> bool:
    """True for the name or path of a file whose purpose is to hold credentials: `Redactor.learn` reads it before the others."""
    return level_of(name) == CREDENTIALS


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
