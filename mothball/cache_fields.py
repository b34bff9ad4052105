"""What is said of pull caches: which folders of a host are declared as caches, and the words of the policy that keeps them small.

A cache is declared in the setting ``image_caches``, and only what is declared is ever pruned. The words are BuildKit's: a floor
(``reserve``), a cap (``max_bytes``) and free space (``min_free``), and ``older_than`` for what nobody uses. Nothing here looks at a
disk or decides anything: that is `mothball.ocicache`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Final, Literal, cast, get_args

import msgspec

from mothball import durations, sizes
from mothball.durations import quote
from mothball.errors import InvalidParams, PathNotAllowed

Kind = Literal["flat", "blobs", "shared", "layout", "blobinfo"]
"""``flat``: files ``sha256:<hex>`` (crane); ``blobs``: ``blobs/sha256/<hex>`` without an index; ``shared``: ``sha256/<hex>`` to
which OCI layouts refer (skopeo); ``layout``: an OCI image layout; ``blobinfo``: the blob-info cache of containers/image."""
KINDS: Final = get_args(Kind)
DEFAULT_POLICY: Final = "older_than=30d"
MAX_CACHES: Final = 64
MAX_PATH_CHARS: Final = 512
"""A heartbeat names all of them and has a limit of its own."""
MAX_LAYOUTS: Final = 256
MAX_KEEP: Final = 256
MAX_KEEP_CHARS: Final = 128
MAX_QUARANTINE_MS: Final = 30 * 86_400_000
_EXAMPLE = "older_than=30d,max_bytes=10GiB,min_free=15%"
_KEEP = re.compile(r"(?:sha256:)?[0-9a-f*?\[\]!-]{1,100}\Z")
_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)%\Z")
_SYSTEM_TREES = ("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/sbin", "/sys", "/usr")
"""Nothing in these is a cache of anybody's."""
_SYSTEM_FOLDERS = (
    "/", "/home", "/media", "/mnt", "/opt", "/private", "/root", "/run", "/run/user", "/srv", "/tmp", "/Users", "/var",  # noqa: S108
    "/var/cache", "/var/lib", "/var/local", "/var/log", "/var/mail", "/var/opt", "/var/run", "/var/spool", "/var/tmp",  # noqa: S108
)  # fmt: skip
"""These hold caches, and are none."""
_OF_HOME = ("", ".cache", ".config", ".gnupg", ".local", ".local/share", ".local/state", ".ssh")
_HOMES = ("/home", "/Users")


class CachePolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What may leave a cache. Times are ms, sizes are bytes on disk; None is no limit. `merge` makes one."""

    older_than: int | None = None
    """What nobody used for longer than this goes."""
    max_bytes: int | None = None
    """Cap: above it the least recently used goes first."""
    reserve: int = 0
    """Floor: when the cache holds no more than this, nothing goes."""
    min_free: int | None = None
    """Bytes of the file system that are to be free; below that the least recently used goes first."""
    min_free_percent: float | None = None
    """The same as per cent of the file system's size; one of both is None."""
    keep: tuple[str, ...] = ()
    """Digests, or patterns of digests (``*``, ``?``, ``[...]``), as lower-case hex without ``sha256:``."""
    grace: int = 600_000
    """What was written less than this ago stays."""
    quarantine: int = 3_600_000
    """How long what was removed can be brought back; the space is free after that. 0: at once."""

    def wanted_free(self, total: int) -> int | None:
        """Bytes that are to be free on a file system of `total` bytes."""
        return self.min_free if self.min_free_percent is None else int(total * self.min_free_percent / 100)


class Cache(msgspec.Struct, frozen=True, kw_only=True):
    """One declared cache: its folder, what it was said to be (None: look), layouts that refer to it, policy words of its own."""

    path: str
    kind: Kind | None = None
    layouts: tuple[str, ...] = ()
    own: dict[str, Any] = {}

    def policy(self, default: Mapping[str, Any]) -> CachePolicy:
        """The policy of this cache: its own words over those of `default`."""
        return merge(default, self.own)


FIELDS: Final = ("older_than", "max_bytes", "reserve", "min_free", "keep", "grace", "quarantine")


def parse_text(text: str) -> dict[str, Any]:
    """The words of ``older_than=30d,max_bytes=10GiB,min_free=15%,keep=0a*|sha256:1b...``, checked.

    A pair that is none, an unknown word, one given twice and an unreadable value are `InvalidParams`; an empty text is no words.
    """
    return check(_pairs(text.split(",")) if text.strip() else {})


def check(raw: object) -> dict[str, Any]:
    """`raw` as a JSON mapping of policy words that `merge` can read; durations and sizes stay texts. Raises `InvalidParams`."""
    if not isinstance(raw, Mapping):
        raise InvalidParams(f"a cache policy is a mapping such as {{'older_than': '30d'}}, not {type(raw).__name__}")
    out: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in FIELDS:
            raise InvalidParams(f"cache policy: unknown word {quote(name)}; known are {', '.join(FIELDS)}")
        read = _READERS[name](f"cache policy: {name}", value)
        out[name] = list(read) if name == "keep" else value
    return out


def merge(*levels: Mapping[str, Any]) -> CachePolicy:
    """The policy that `levels`, the weakest first, add up to; raises `InvalidParams`, also for a floor above the cap."""
    values: dict[str, Any] = {}
    for level in levels:
        for name, value in check(level).items():
            read = _READERS[name](f"cache policy: {name}", value)
            if name == "min_free":
                values["min_free"], values["min_free_percent"] = read
            else:
                values[name] = read
    policy = CachePolicy(**values)
    if policy.max_bytes is not None and policy.reserve >= policy.max_bytes:
        raise InvalidParams(
            f"cache policy: reserve={sizes.show(policy.reserve)} must be less than max_bytes={sizes.show(policy.max_bytes)}: "
            "reserve is what always stays, max_bytes is what the cache may grow to"
        )
    return policy


def to_dict(policy: CachePolicy) -> dict[str, Any]:
    """`policy` as words that `check` and `merge` read back."""
    percent = policy.min_free_percent
    return {
        "older_than": durations.show(policy.older_than),
        "max_bytes": sizes.show(policy.max_bytes),
        "reserve": sizes.show(policy.reserve),
        "min_free": sizes.show(policy.min_free) if percent is None else f"{percent:g}%",
        "keep": list(policy.keep),
        "grace": durations.show(policy.grace) if policy.grace else "0",
        "quarantine": durations.show(policy.quarantine) if policy.quarantine else "0",
    }


def declared(text: str) -> tuple[Cache, ...]:
    """The caches of ``PATH[,field=value...][;PATH...]``. Raises `InvalidParams`.

    Fields: ``kind``, ``layouts`` (folders, separated by ``|``) and the words of a policy. Two caches that hold each other are
    refused: what one of them keeps the other would take.
    """
    found = [_cache(entry.strip()) for entry in text.split(";") if entry.strip()]
    if len(found) > MAX_CACHES:
        raise InvalidParams(f"{len(found)} caches are declared; at most {MAX_CACHES} of one host can be")
    for number, one in enumerate(found):
        for other in found[:number]:
            if overlaps(one.path, other.path):
                raise InvalidParams(f"the caches {one.path!r} and {other.path!r} hold each other; declare one of them")
    return tuple(found)


def _cache(entry: str) -> Cache:
    where, *rest = entry.split(",")
    path = clean_path(where.strip(), "a cache")
    if len(path) > MAX_PATH_CHARS:
        raise InvalidParams(f"the path of a cache must not be longer than {MAX_PATH_CHARS} characters: {quote(path)}")
    words = _pairs(rest)
    kind = check_kind(words.pop("kind", None), f"cache {path!r}")
    named = [part.strip() for part in words.pop("layouts", "").split("|") if part.strip()]
    if len(named) > MAX_LAYOUTS:
        raise InvalidParams(f"cache {path!r}: {len(named)} layouts are named; at most {MAX_LAYOUTS} can be")
    if named and kind not in (None, "shared"):
        raise InvalidParams(f"cache {path!r}: layouts refer into a shared blob folder; kind={kind} has none")
    try:
        own = check(words)
    except InvalidParams as error:
        raise InvalidParams(f"cache {path!r}: {error.message}") from None
    return Cache(path=path, kind=kind, layouts=tuple(clean_path(each, "a layout") for each in named), own=own)


def check_kind(value: object, what: str = "cache") -> Kind | None:
    """`value` as a kind; None says nothing. Raises `InvalidParams`."""
    if value is None or value in KINDS:
        return cast("Kind | None", value)
    raise InvalidParams(f"{what}: unknown kind {quote(value)}; known are {', '.join(KINDS)}")


def clean_path(text: str, what: str) -> str:
    """`text` as an absolute path without ``.``, ``..`` and double slashes; ``~`` is this user's home. Raises `InvalidParams`."""
    path = os.path.expanduser(text)  # noqa: PTH111 - pathlib raises for a user who has no home
    if not path.startswith("/") or "\0" in path:
        raise InvalidParams(f"the path of {what} must be absolute, such as /var/cache/oci, not {quote(text)}")
    if ".." in path.split("/"):
        raise InvalidParams(f"the path of {what} must not have '..' in it: {quote(text)}")
    return "/" + os.path.normpath(path).lstrip("/")


def overlaps(one: str, other: str) -> bool:
    """True when both are the same folder, or one lies in the other."""
    a, b = PurePosixPath(one), PurePosixPath(other)
    return a.is_relative_to(b) or b.is_relative_to(a)


def check_place(path: str, *, roots: Sequence[str], data_dir: str) -> None:
    """Raise `PathNotAllowed` for a folder that is no place for a cache, whatever it holds and whoever declared it.

    ``/``, system folders, homes and what is usually in them, a workspace root and what holds one, and the data dir.
    """
    place = PurePosixPath(path)
    for tree in _SYSTEM_TREES:
        if place.is_relative_to(tree):
            raise _refused(path, f"it lies in {tree}, which belongs to the system")
    if path in _SYSTEM_FOLDERS:
        raise _refused(path, "it holds everything else, not one cache")
    if place.parent.as_posix() in _HOMES:
        raise _refused(path, "it is somebody's home folder")
    for home in _homes():
        if any(PurePosixPath(home, each).is_relative_to(place) for each in _OF_HOME):
            raise _refused(path, f"it is, or holds, a folder of the home {home}")
    for root in roots:
        if PurePosixPath(root).is_relative_to(place):
            raise _refused(path, f"it is, or holds, the workspace root {root}")
    if overlaps(path, data_dir):
        raise _refused(path, f"it is, holds or lies in the data dir {data_dir}, where the captures are")


def _refused(path: str, why: str) -> PathNotAllowed:
    return PathNotAllowed(f"{path!r} cannot be a cache: {why}", path=path)


def _homes() -> set[str]:
    """Homes of this process's user. Not those of every user: a directory service may have a million, and take minutes."""
    found = {"/root", os.path.expanduser("~")}  # noqa: PTH111 - as above
    try:
        import pwd

        found.add(pwd.getpwuid(os.geteuid()).pw_dir)
    except (ImportError, KeyError):  # a container's user without an entry
        pass
    return {each for each in found if each.startswith("/") and each != "/"}


def _pairs(parts: Sequence[str]) -> dict[str, str]:
    out: dict[str, str] = {}
    for part in parts:
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not name or not equals or not value:
            raise InvalidParams(f"cache: {quote(part.strip())} is not field=value; write for example {_EXAMPLE}")
        if name in out:
            raise InvalidParams(f"cache: {quote(name)} is given twice")
        out[name] = value
    return out


def _span(longest: int | None) -> Callable[[str, object], int]:
    def read(what: str, value: object) -> int:
        if value in ("0", "0s"):
            return 0
        found = durations.parse(value, what)
        if found is None or (longest is not None and found > longest):
            raise InvalidParams(f"{what}={quote(value)} must end: at most {durations.show(longest or durations.MAX_MS)}, or 0")
        return found

    return read


def _floor(what: str, value: object) -> int:
    if value in (0, "0"):
        return 0
    found = sizes.parse(value, what)
    if found is None:
        raise InvalidParams(f"{what} must be a size, or 0 for none; a cache of which nothing may go is not declared")
    return found


def _free(what: str, value: object) -> tuple[int | None, float | None]:
    if isinstance(value, str) and (found := _PERCENT.match(value.strip())):
        percent = float(found[1])
        if not 0 < percent < 100:  # noqa: PLR2004 - per cent
            raise InvalidParams(f"{what}={quote(value)} must be more than 0% and less than 100%")
        return None, percent
    return sizes.parse(value, what), None


def _patterns(what: str, value: object) -> tuple[str, ...]:
    parts = [part.strip() for part in value.split("|") if part.strip()] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or len(parts) > MAX_KEEP:
        raise InvalidParams(f"{what} must be at most {MAX_KEEP} digests or patterns, separated by '|'")
    out = []
    for each in parts:
        if not isinstance(each, str) or len(each) > MAX_KEEP_CHARS or not _KEEP.match(each):
            raise InvalidParams(f"{what}: {quote(each)} is no digest and no pattern of one; write sha256:<hex>, or such as 0a1b*")
        out.append(each.removeprefix("sha256:"))
    return tuple(dict.fromkeys(out))


_READERS: Final[dict[str, Callable[[str, object], Any]]] = {
    "older_than": lambda what, value: durations.parse(value, what),
    "max_bytes": lambda what, value: sizes.parse(value, what),
    "reserve": _floor,
    "min_free": _free,
    "keep": _patterns,
    "grace": _span(None),
    "quarantine": _span(MAX_QUARANTINE_MS),
}
