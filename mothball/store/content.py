"""Does a layer hold what its table of contents says? Its tar, member by member, against the rows.

A table is what every reader goes by, a tar what every other tool unpacks: when they differ, two people see two trees.
"""

from __future__ import annotations

from collections.abc import Callable

from mothball.errors import Corrupt
from mothball.store import Store
from mothball.store.manifest import Descriptor
from mothball.store.read import Layer, show
from mothball.store.tarstream import Member, TarStream
from mothball.store.toc import TocRow, sort_key
from mothball.store.tree import open_layer

_ROOT = b"workspace"


def compare_content(layer: Layer, report: Callable[[int], None]) -> tuple[str, int]:
    """Hold the tar of a layer against its table of contents; returns the tar's diff id and its bytes.

    `report` is called with the bytes read so far, once per member and per frame; what it raises goes through. `Corrupt` names the
    blob.
    """
    toc = layer.toc
    stream = TarStream(layer, report)
    rows = (row for row in toc.rows() if row.type != "m")
    whiteouts: set[bytes] = set()
    replaced: set[bytes] = set()
    content = 0
    for member in stream.members():
        report(stream.bytes)
        path = _relative(stream, member)
        folder, _, name = path.rpartition(b"/")
        if name.startswith(b".wh."):
            if member.type != "f" or member.size or len(name) <= len(b".wh.") or name == b".wh..wh..opq":
                raise stream.fault(f"a whiteout that is none, {show(path)}")
            whiteouts.add(folder + b"/" + name[4:] if folder else name[4:])
            continue
        row = next(rows, None)
        if row is None or row.path != path:
            raise stream.fault(f"{show(path)} where the table of contents has {show(row.path) if row else 'no more entries'}")
        if reason := _difference(layer, row, member):
            raise stream.fault(f"{show(path)}: {reason}")
        if row.type != "d" and toc.removes(path):
            replaced.add(path)
        content += row.size if row.type == "f" else 0
    if (row := next(rows, None)) is not None:
        raise stream.fault(f"{show(row.path)} of the table of contents is not in it")
    if not whiteouts <= set(toc.removed) or set(toc.removed) - whiteouts - replaced:
        raise toc.corrupt("its whiteouts are not the removals of its table of contents")
    if content != toc.content:
        raise toc.corrupt(f"its files have {content} bytes, its table of contents says {toc.content}")
    return stream.diff_id, stream.bytes


def compare_layer(store: Store, descriptor: Descriptor, number: int, report: Callable[[int], None]) -> tuple[str, int]:
    """`compare_content` of layer `number` of a manifest, which is opened for it. Raises what `open_layer` raises as well."""
    layer = open_layer(store, descriptor, number)
    try:
        return compare_content(layer, report)
    finally:
        layer.file.close()


def check_diff_id(descriptor: Descriptor, found: str, said: str) -> None:
    """Raise `Corrupt` unless the diff id that was `found` is the one that the image's config says."""
    if found != said:
        reason = f"its content has the diff id {found}, its config says {said[:100]}"
        raise Corrupt(what=f"layer {descriptor.digest}", reason=reason, digest=descriptor.digest)


def _relative(stream: TarStream, member: Member) -> bytes:
    """The member's path as the table of contents has it."""
    path = member.path.removesuffix(b"/") if member.type == "d" else member.path
    if path == _ROOT:
        return b""
    if not path.startswith(_ROOT + b"/"):
        raise stream.fault(f"{show(path)} is not below workspace/")
    return path[len(_ROOT) + 1 :]


def _difference(layer: Layer, row: TocRow, member: Member) -> str | None:
    """What differs between a row and its member, None when they agree. The tar has whole seconds, rounded down."""
    toc = layer.toc
    if row.type != member.type:
        return f"type {member.type}, not {row.type}"
    pairs = (
        ("mode", member.mode, row.mode),
        ("owner", (member.uid, member.gid), (row.uid, row.gid)),
        ("mtime", member.mtime, row.mtime_ns // 10**9),
    )
    for name, found, expected in pairs:
        if found != expected:
            return f"{name} {found}, not {expected}"
    if row.type == "f":
        if member.size != row.size:
            return f"{member.size} bytes, not {row.size}"
        if row.size and member.start != toc.starts[row.frame] + row.offset:
            return "its content does not lie where the table of contents says"
        if member.sha256 != row.sha256:
            return "its content does not match its sha256"
    elif row.type == "l":
        if member.link != row.link:
            return f"a link to {show(member.link)}, not to {show(row.link)}"
    elif row.type == "h":
        if member.link != _ROOT + b"/" + row.link:
            return f"a hard link to {show(member.link)}, not to {show(row.link)}"
        first = toc.find(row.link)
        if first is None or first.type != "f" or sort_key(first.path) >= sort_key(row.path):
            return f"a hard link to {show(row.link)}, which is no file before it"
        if (first.size, first.sha256, first.frame, first.offset) != (row.size, row.sha256, row.frame, row.offset):
            return "its content is not that of its first name"
    return None
