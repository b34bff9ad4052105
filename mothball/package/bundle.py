"""A capture as an OCI runtime bundle: ``config.json`` and ``rootfs/``, which ``runc run`` starts as it is (B-110 to B-113).

Made from a stored capture, which never changes (B-111: the reference packed a tree that others went on editing), beside its
name and renamed when it is whole. With a base image its files lie around the workspace, without one there is only what the
workspace brings along itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Final

import msgspec

from mothball.errors import AlreadyExists, InvalidParams, PathNotAllowed
from mothball.package.base import Base
from mothball.package.bundle_spec import DEFAULT_PIDS, WORKSPACE, check_bundle, check_command, check_env, runtime_spec
from mothball.package.rootfs import SAFE_BITS, WORKSPACE_DIR, RootEntry, skeleton
from mothball.package.target import new_folder
from mothball.package.writetree import TreeWriter
from mothball.store import Store
from mothball.store.below import check_path, lies_in, open_below
from mothball.store.blobs import full_disk_is_no_space
from mothball.store.folders import explained
from mothball.store.read import ContentReader, FrameCache
from mothball.store.tree import Found, Tree

__all__ = ["BundleResult", "check_place", "scratch_dir", "skeleton", "workspace_entries", "write_bundle"]

Tick = Callable[..., None]
"""Called often with ``step=``, ``files=`` and ``bytes=``; what it raises ends the work, and nothing is left."""

_DEFAULT_COMMAND: Final = ("/bin/sh",)
_PIECE: Final = 1024**2


class BundleResult(msgspec.Struct, frozen=True):
    """The bundle at `path` holds the capture `digest` and is started as `args`.

    `files` counts regular files of rootfs with all their names, `bytes` their content. `left_out`: (path, reason) of what the
    base image has and no bundle gets, at most 1000 of `left_out_count`. `notes` say in plain words what may surprise.
    """

    path: str
    digest: str
    args: list[str]
    rootless: bool
    files: int
    bytes: int
    base: str = ""
    base_digest: str = ""
    left_out_count: int = 0
    left_out: list[tuple[str, str]] = []
    notes: list[str] = []


def write_bundle(
    store: Store,
    digest: str,
    to: Path,
    *,
    command: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    cwd: str = WORKSPACE,
    rootless: bool = False,
    owner: tuple[int, int] | None = None,
    writable: bool = False,
    memory: int | None = None,
    pids: int | None = DEFAULT_PIDS,
    base: Base | None = None,
    roots: tuple[Path, ...] | None = None,
    tick: Tick = lambda **_: None,
) -> BundleResult:
    """Write the capture `digest` as a bundle into the new folder `to`, whole or not at all.

    `command`: what to start, else what `base` says, else ``/bin/sh``; `env` adds to the base's. `rootless`: for `owner` (uid,
    gid; default: who runs this), to whom everything belongs then. `writable`: the command may write into rootfs. `memory`
    (bytes) and `pids` go into config.json. With `roots`, `to` must lie below one of them and no link on the way is followed.

    Raises `AlreadyExists`, `PathNotAllowed`, `InvalidParams`, `Corrupt` (names the blob), `NoSpace`; nothing is left then.
    """
    uid, gid = owner or (os.geteuid(), os.getegid())
    if owner is not None and owner != (os.geteuid(), os.getegid()) and os.geteuid() != 0:
        raise InvalidParams("only root can write a bundle for another user")
    variables = {**(base.env if base else {}), **(env or {})}
    args = check_command(list(command) or (base.args if base and base.args else list(_DEFAULT_COMMAND)))
    config = runtime_spec(
        args=args, env=variables, cwd=cwd, rootless=rootless, uid=uid, gid=gid, memory=memory, pids=pids, readonly=not writable
    )
    with Tree.open(store, digest) as tree, _folder(to, store, roots) as folder, full_disk_is_no_space(to):
        rootfs = folder / "rootfs"
        rootfs.mkdir(mode=0o755)

        def report() -> None:
            tick(step="bundle", files=out.files, bytes=out.bytes)

        with TreeWriter(rootfs, f"capture {digest}", owner=owner if os.geteuid() == 0 else None, tick=report) as out:
            out.add(RootEntry(b"", "d", 0o755))
            for entry in skeleton(base.entries() if base else ()):
                if entry.path == WORKSPACE_DIR:
                    for each in workspace_entries(tree):
                        out.add(each)
                else:
                    out.add(entry)
            out.finish()
        (folder / "config.json").write_bytes(config)
        folder.chmod(0o755 if rootless and owner else 0o700)
        if owner is not None and os.geteuid() == 0:
            for path in (folder, folder / "config.json"):
                os.chown(path, *owner)
        check_bundle(folder)
        return BundleResult(
            path=str(to.expanduser().absolute()), digest=tree.digest, args=args, rootless=rootless, files=out.files,
            bytes=out.bytes, base=base.reference if base else "", base_digest=base.digest if base else "",
            left_out_count=base.left_out_count if base else 0, left_out=base.left_out if base else [],
            notes=list(_notes(tree, base, args, check_env(variables)["PATH"], writable=writable)),
        )  # fmt: skip


def workspace_entries(tree: Tree) -> Iterator[RootEntry]:
    """The capture's entries as they lie below ``rootfs/``: its root is ``workspace``. Sorted; content is verified as it is read."""
    frames = FrameCache()
    names: dict[tuple[int, bytes], bytes] = {}
    for found in tree.rows():
        row = found.row
        path = _below(row.path)
        if row.type == "l":
            yield RootEntry(path, "l", SAFE_BITS, found.mtime_ns, link=row.link)
            continue
        if row.type == "d":
            yield RootEntry(path, "d", row.mode, found.mtime_ns)
            continue
        if row.type == "h":
            key = (found.layer, row.link)
            if key not in names:
                first = tree.first_name(found)  # None: a layer above took the first name away, this one carries the content
                names[key] = row.path if first is None else first
            if names[key] != row.path:
                yield RootEntry(path, "h", row.mode, found.mtime_ns, link=_below(names[key]))
                continue
        yield RootEntry(path, "f", row.mode, found.mtime_ns, row.size, b"", _content(tree, found, frames))


def _below(path: bytes) -> bytes:
    return WORKSPACE_DIR + b"/" + path if path else WORKSPACE_DIR


def _content(tree: Tree, found: Found, frames: FrameCache) -> Callable[[], Iterator[bytes]]:
    def pieces() -> Iterator[bytes]:
        reader = ContentReader(tree.layers[found.layer], found.row, frames)
        left = found.row.size  # a raw reader fills a buffer of the size it is asked for: 1 MiB for each small file takes its time
        while left > 0 and (piece := reader.read(min(left, _PIECE))):
            left -= len(piece)
            yield piece

    return pieces


def _folder(to: Path, store: Store, roots: tuple[Path, ...] | None) -> AbstractContextManager[Path]:
    """The new folder, below `roots` opened component by component: what stands in an argument may be swapped by its workspace."""
    if roots is None:
        return new_folder(to, store.root)
    return _BelowRoots(to, store, roots)


def check_place(to: Path, store: Store, roots: tuple[Path, ...]) -> None:
    """Raise what `write_bundle` would raise for the place alone."""
    os.close(_open_parent(to, store, roots)[0])


def scratch_dir(data_dir: Path) -> Path:
    """The folder, made when it is missing, in which a host keeps what it needs while it makes or runs a bundle."""
    folder = data_dir / "bundles"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _open_parent(to: Path, store: Store, roots: tuple[Path, ...]) -> tuple[int, str]:
    """A descriptor of the folder above `to`, reached through no link, and the name in it, which nothing has yet."""
    root, parts = check_path(str(to), roots, "path of a bundle")
    try:
        fd = open_below(root, parts[:-1])
    except FileNotFoundError:
        raise InvalidParams(f"{to.parent} is not a folder; nothing was written") from None
    except OSError as error:
        raise explained(error, os.fsencode(to.parent)) from None
    try:
        parent = Path(f"/proc/self/fd/{fd}")
        if lies_in(parent.resolve(), store.root):
            raise PathNotAllowed(f"{to} is inside the store at {store.root}; choose another place", path=str(to))
        if os.path.lexists(parent / parts[-1]):
            raise AlreadyExists(f"{to} exists already and is not replaced; choose another name", path=str(to))
    except BaseException:
        os.close(fd)
        raise
    return fd, parts[-1]


class _BelowRoots(AbstractContextManager[Path]):
    def __init__(self, to: Path, store: Store, roots: tuple[Path, ...]) -> None:
        self._store = store
        self._fd, self._name = _open_parent(to, store, roots)
        self._inner: AbstractContextManager[Path] | None = None

    def __enter__(self) -> Path:
        try:
            self._inner = new_folder(Path(f"/proc/self/fd/{self._fd}") / self._name, self._store.root)
            return self._inner.__enter__()
        except BaseException:
            os.close(self._fd)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool | None:
        try:
            assert self._inner is not None  # noqa: S101 - entered
            return self._inner.__exit__(kind, error, trace)
        finally:
            os.close(self._fd)


def _notes(tree: Tree, base: Base | None, args: list[str], path: str, *, writable: bool) -> Iterator[str]:
    if not _has_program(tree, base, args[0], path):
        hint = "" if base else "; without --base a bundle holds nothing but the workspace"
        yield f"the program {args[0]!r} is not in the bundle{hint}"
    if not writable:
        yield "the command can write to /tmp only; --writable lets it change the bundle"
    if base and base.left_out_count:
        yield f"{base.left_out_count:,} entries of {base.reference} were left out (devices)"


def _has_program(tree: Tree, base: Base | None, name: str, path: str) -> bool:
    """True when the program is seen in the base, or in the workspace. Links of the workspace are not followed: they may be."""
    places = [name] if "/" in name else [f"{folder}/{name}" for folder in path.split(":")]
    for place in places:
        full = os.path.normpath(os.path.join(WORKSPACE, place))  # noqa: PTH118 - a path of the bundle, not of this host
        below = full.removeprefix(WORKSPACE + "/")
        if below != full and tree.exists(below):
            return True
    return base is not None and base.has_program(name, path)
