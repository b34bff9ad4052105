"""What a tar is: a crash package, a bundle or any other; read to its end, so that a cut one is noticed."""

from __future__ import annotations

import json
from typing import Any, BinaryIO, Final

from mothball.package.bundle_spec import MAX_SPEC
from mothball.package.stim_parts import CONFIG, ROOTFS
from mothball.package.tarread import BLOCK, TarMember, TarReader

REPORT: Final = b"report.json"
MAX_REPORT: Final = 16 * 1024**2
"""Bytes; ours are far smaller, and a document of nothing but brackets takes fifty times its size in memory."""
_SHOWN: Final = 300
_ARGS: Final = 50
_SCHEMA: Final = "dev.mothball.crash-report/"


def is_tar(head: bytes) -> bool:
    """True when `head`, the first 512 bytes of a file, are the header of a POSIX or GNU tar."""
    return len(head) == BLOCK and head[257:262] == b"ustar"


def look(src: BinaryIO, what: str) -> dict[str, Any]:
    """Facts of the tar `src` from its beginning in JSON types; `Corrupt` for one that is damaged or cut, as `TarReader` else.

    What stands in it was written by somebody else: escape it before a terminal gets it.
    """
    src.seek(0)
    reader = TarReader(src.read, what)
    members = files = size = 0
    report: Any = None
    config: Any = None
    rootfs = False
    for member in reader:
        members += 1
        files += member.kind in {"f", "h"}
        size += member.size
        if member.path == REPORT:
            report = _document(reader, member, MAX_REPORT)
        elif member.path == CONFIG:
            config = _document(reader, member, MAX_SPEC)
        rootfs = rootfs or member.path == ROOTFS or member.path.startswith(ROOTFS + b"/")
    bundle = isinstance(config, dict) and rootfs
    ours = isinstance(report, dict) and str(report.get("schema", "")).startswith(_SCHEMA)
    found: dict[str, Any] = {
        "format": "crash-package" if bundle and ours else "bundle" if bundle else "tar",
        "members": members,
        "files": files,
        "content_size": size,
    }
    if ours:
        found["report"] = _summary(report)
    if bundle:
        process = config.get("process")
        args = process.get("args") if isinstance(process, dict) else None
        found["oci_version"] = _plain(config.get("ociVersion"))
        found["args"] = [_plain(each) for each in args[:_ARGS]] if isinstance(args, list) else None
    return found


def _document(reader: TarReader, member: TarMember, limit: int) -> Any:
    if member.kind != "f" or member.size > limit:
        return None
    try:
        return json.loads(b"".join(reader.pieces()))
    except (ValueError, RecursionError):
        return None


def _summary(report: dict[str, Any]) -> dict[str, Any]:
    """What one wants to know first; a part that is not as the schema has it is None."""

    def part(name: str) -> dict[str, Any]:
        value = report.get(name)
        return value if isinstance(value, dict) else {}

    found = {
        "schema": report.get("schema"),
        "id": report.get("id"),
        "time": report.get("time"),
        "workspace": part("workspace").get("id"),
        "repo": part("workspace").get("repo"),
        "title": part("error").get("title"),
        "signature": part("error").get("signature"),
        "capture": part("capture").get("digest"),
        "source": part("capture").get("source"),
        "files": part("package").get("files"),
        "redactions": part("redactions").get("total"),
    }
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: Any) -> str | int | None:
    """`value` when it can be shown as it is, cut to what one line holds; None for anything else somebody put there."""
    if isinstance(value, str):
        return value[:_SHOWN]
    return value if isinstance(value, int) else None
