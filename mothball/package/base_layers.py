"""The layers of a foreign image, merged in memory: names and places, never a path of the host.

Whiteouts hide what lies below them, a parent that is a link is followed as if the image's root were the whole world, and what
would lead out of that world is refused (zip-slip has no disk to slip on). Content stays in the layers' tars until it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Final

from mothball.errors import InvalidParams
from mothball.package.rootfs import SAFE_BITS, RootEntry
from mothball.package.tarread import MAX_PATH, TarMember
from mothball.store.read import show

_WHITEOUT: Final = b".wh."
_OPAQUE: Final = b".wh..wh..opq"
_OF_AUFS: Final = b".wh..wh."
_MAX_LINKS: Final = 40
"""As many as the kernel follows in one path."""
MAX_LEFT_OUT: Final = 1000
"""How many paths that were left out are named; all are counted."""


class _Node:
    """A file, folder or link; a file with several names is one node in several folders."""

    __slots__ = ("children", "kind", "layer", "link", "mode", "mtime_ns", "size", "start")

    def __init__(self, kind: str, mode: int = 0o755, mtime_ns: int = 0) -> None:
        self.kind = kind
        self.mode = mode
        self.mtime_ns = mtime_ns
        self.children: dict[bytes, _Node] = {}
        self.link = b""
        self.layer = self.size = self.start = 0


Pieces = Callable[[int, int, int], Iterator[bytes]]
"""(layer, start, size) -> the bytes there, in pieces."""


class MergedLayers:
    """Apply layers from the lowest up, then read `entries`. Errors name `what` and the path."""

    def __init__(self, what: str, pieces: Pieces) -> None:
        self._what = what
        self._pieces = pieces
        self._root = _Node("d")
        self.left_out: list[tuple[str, str]] = []
        self.left_out_count = 0

    def apply(self, layer: int, members: Iterable[TarMember], tick: Callable[[], None]) -> None:
        """Put layer number `layer` on top. `InvalidParams` for a name that leads out or a link to what is not there."""
        rest: list[TarMember] = []
        for member in members:
            name = member.path.rpartition(b"/")[2]
            if name.startswith(_WHITEOUT):
                self._hide(member.path, name)  # of lower layers only: nothing of this one is there yet
            else:
                rest.append(member)
        for number, member in enumerate(rest):
            if number % 1024 == 0:
                tick()
            if member.path:
                self._add(layer, member)
            elif member.kind == "d":
                self._root.mode, self._root.mtime_ns = member.mode, member.mtime_ns

    def entries(self, without: Collection[bytes] = ()) -> Iterator[RootEntry]:
        """All that is visible, sorted by path components, without the folders `without` directly below the root."""
        seen: dict[_Node, bytes] = {}
        stack = [(name, node) for name, node in self._sorted(self._root) if name not in without]
        while stack:
            path, node = stack.pop()
            if len(path) > MAX_PATH:
                raise InvalidParams(f"{self._what} has the path {show(path[:200])!r}..., which is longer than {MAX_PATH} bytes")
            if node.kind == "f" and (first := seen.setdefault(node, path)) != path:
                yield RootEntry(path, "h", node.mode & SAFE_BITS, node.mtime_ns, link=first)
            elif node.kind == "f":
                yield RootEntry(path, "f", node.mode & SAFE_BITS, node.mtime_ns, node.size, b"", self._content(node))
            elif node.kind == "l":
                yield RootEntry(path, "l", SAFE_BITS, node.mtime_ns, link=node.link)
            else:
                yield RootEntry(path, "d", node.mode & (SAFE_BITS | 0o1000), node.mtime_ns)
                stack += [(path + b"/" + name, below) for name, below in self._sorted(node)]

    def find(self, path: bytes) -> RootEntry | None:
        """What `path` leads to inside, through links; None when it is not there."""
        node = self._walk(path.strip(b"/"), make=False, last=True)
        return None if node is None else RootEntry(path, "d" if node.kind == "d" else "f", node.mode, size=node.size)

    def _content(self, node: _Node) -> Callable[[], Iterator[bytes]]:
        return lambda: self._pieces(node.layer, node.start, node.size)

    @staticmethod
    def _sorted(folder: _Node) -> list[tuple[bytes, _Node]]:
        """For a stack: the last is the first."""
        return sorted(folder.children.items(), reverse=True)

    def _hide(self, path: bytes, name: bytes) -> None:
        folder = self._walk(path.rpartition(b"/")[0], make=False, last=True)
        if folder is None or folder.kind != "d":
            return
        if name == _OPAQUE:
            folder.children.clear()
        elif not name.startswith(_OF_AUFS):
            folder.children.pop(name[len(_WHITEOUT) :], None)

    def _add(self, layer: int, member: TarMember) -> None:
        above, _, name = member.path.rpartition(b"/")
        folder = self._walk(above, make=True, last=True)
        if folder is None or folder.kind != "d":
            raise InvalidParams(f"{self._what} has {show(member.path[:200])!r} below what is no folder")
        before = folder.children.get(name)
        if member.kind == "x":
            folder.children.pop(name, None)
            self.left_out_count += 1
            if len(self.left_out) < MAX_LEFT_OUT:
                self.left_out.append((show(member.path), "device"))
            return
        if member.kind == "h":
            target_above, _, target_name = member.link.rpartition(b"/")
            target_folder = self._walk(target_above, make=False, last=True)
            target = target_folder.children.get(target_name) if target_folder is not None else None
            if target is None or target.kind == "d":
                link = f"hard link {show(member.path[:200])!r} to {show(member.link[:200])!r}"
                raise InvalidParams(f"{self._what} has the {link}, which is no file in it")
            folder.children[name] = target
            return
        if member.kind == "d" and before is not None and before.kind == "d":
            before.mode, before.mtime_ns = member.mode, member.mtime_ns
            return
        node = folder.children[name] = _Node(member.kind, member.mode, member.mtime_ns)
        node.layer, node.start, node.size, node.link = layer, member.start, member.size, member.link

    def _walk(self, path: bytes, *, make: bool, last: bool) -> _Node | None:
        """The node at `path`, links followed inside the root; with `make` missing folders are made. None when it is not there.

        `InvalidParams` when a link leads out of the root, or in a circle.
        """
        chain = [self._root]
        todo = list(reversed(path.split(b"/"))) if path else []
        links = 0
        while todo:
            part = todo.pop()
            if part in {b"", b"."}:
                continue
            if part == b"..":
                if len(chain) == 1:
                    raise InvalidParams(f"{self._what}: {show(path[:200])!r} leads out of the image through a link; it was refused")
                chain.pop()
                continue
            folder = chain[-1]
            if folder.kind != "d":
                return None
            node = folder.children.get(part)
            if node is None:
                if not make:
                    return None
                node = folder.children[part] = _Node("d")
            if node.kind == "l" and (todo or last):
                links += 1
                if links > _MAX_LINKS or len(todo) > MAX_PATH:
                    raise InvalidParams(f"{self._what}: {show(path[:200])!r} leads through too many links")
                if node.link.startswith(b"/"):
                    chain = [self._root]
                todo += reversed(node.link.split(b"/"))
                continue
            chain.append(node)
        return chain[-1]
