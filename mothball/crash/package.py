"""A crash package: one tar with ``report.json``, ``config.json`` and ``rootfs/``, redacted, scanned again, sealed if asked.

It is a bundle: unpacked anywhere, ``runc run`` starts it. The same report, capture, rules and key give the same bytes. It is
written to a file without a name, which gets one when nothing was found in its finished bytes; so whatever kills the writer
leaves nothing, and a sealing that fails leaves no clear file.

The report stands first and says what all that follows holds. So room is left for it, and what it does not need is filled with
the comment of its PAX header, which every tar passes over.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Protocol, cast

from mothball.crash.big import look_inside
from mothball.crash.content import any_secret, learn_credentials
from mothball.crash.facts import Packaged, PackageFacts
from mothball.crash.looker import Looker
from mothball.crash.members import Key
from mothball.crash.outfile import Move, OutFile, shifted, write_at
from mothball.crash.packages import CLEAR, SEALED
from mothball.crash.packing import Binaries, Packer
from mothball.crash.scanning import found_at, scan_package, scan_ranges, unredacted
from mothball.crash.staging import Desk, Looked, Looks, look_at_members, redact_members
from mothball.errors import AlreadyExists, InvalidParams, Oversize
from mothball.package.target import check_new
from mothball.seal.newfile import new_file
from mothball.store import Store
from mothball.store.artifact import REPORT_LIMIT, check_crash_name
from mothball.store.foreign import read_json
from mothball.store.hashing import Checking, digest_of
from mothball.store.manifest import canonical
from mothball.store.tarhead import BLOCK, header, padded
from mothball.store.tree import Tree

if TYPE_CHECKING:
    from mothball.package.rootfs import RootEntry
    from mothball.redact.engine import Redactor
    from mothball.redact.rescan import Finding

__all__ = ["Base", "PackageFacts", "Packaged", "write_package", "write_package_to"]

Report = Callable[[PackageFacts], bytes]
Seal = Callable[[BinaryIO, BinaryIO], None]
"""Called as ``seal(clear, sealed)``: reads the first to its end and writes the second. What it raises ends the package."""
Tick = Callable[..., None]
"""Called with ``step=`` (``learn``, ``pack``, ``again``, ``scan``, ``seal``), ``entries=`` and ``bytes=``, at least every few
megabytes; what it raises ends the package, and nothing is left of it."""

ROOM: Final = 64 * 1024
"""Bytes left for what the facts add to a report. One that needs more costs a second copy of the package, nothing else."""
MAX_CONFIG: Final = 4 * 1024**2
_PIECE: Final = 4 * 1024**2
_COMMENT: Final = b"a crash report by Mothball; unpacked it is a bundle for runc"
_FOLDER_MODE: Final = 0o700
_FILE_MODE: Final = 0o644


class Base(Protocol):
    """An image whose files lie below the workspace's in the package (see `mothball.package.base`)."""

    @property
    def reference(self) -> str: ...
    @property
    def digest(self) -> str: ...
    def entries(self) -> Iterator[RootEntry]:
        """The merged entries, sorted by path components."""


def write_package(
    store: Store,
    digest: str,
    *,
    report: Report,
    config: bytes,
    redactor: Redactor,
    folder: Path,
    name: str,
    binaries: Binaries = "include",
    base: Base | None = None,
    seal: Seal | None = None,
    tick: Tick = lambda **_: None,
) -> Packaged:
    """Write the package `name` (an id: ``.tar`` is added, ``.tar.age`` with `seal`) into `folder`, which is made 0700 (B-54).

    `digest` is that of the capture or of its crash report; `report` gives report.json for the facts of the package and is called
    twice or more, last with the facts that are true; `config` is the bundle's config.json. The file is 0600 and is there whole or
    not at all (B-55). Raises `Unredacted` when a secret is left in the finished bytes, `AlreadyExists` (also for the package of
    that name in its other form), `NoSpace`, `Corrupt`, and what `seal` and `tick` raise.
    """
    check_crash_name(name)
    folder.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
    other = folder / (name + (CLEAR if seal else SEALED))
    if os.path.lexists(other):
        raise AlreadyExists(f"{other} exists already; delete that package before the report is packaged again", path=str(other))
    return _write(
        store, digest, folder / (name + (SEALED if seal else CLEAR)), report, config, redactor, binaries, base, seal, tick
    )


def write_package_to(
    store: Store,
    digest: str,
    *,
    report: Report,
    config: bytes,
    redactor: Redactor,
    path: Path,
    binaries: Binaries = "include",
    base: Base | None = None,
    seal: Seal | None = None,
    tick: Tick = lambda **_: None,
) -> Packaged:
    """`write_package` to a path of the caller's choice outside of the store. Errors as there, and as `check_new`."""
    return _write(store, digest, check_new(path, store.root), report, config, redactor, binaries, base, seal, tick)


def _write(
    store: Store,
    digest: str,
    place: Path,
    report: Report,
    config: bytes,
    redactor: Redactor,
    binaries: Binaries,
    base: Base | None,
    seal: Seal | None,
    tick: Tick,
) -> Packaged:
    with Tree.open(store, digest) as tree, new_file(place) as out, ExitStack() as stack, _no_cycle_collection():
        clear = out if seal is None else _unnamed(place.parent, stack)
        checking = stack.enter_context(Checking((layer.file.fileno(), layer.digest) for layer in tree.layers))
        made = _Package(
            tree,
            checking,
            clear,
            report,
            config,
            redactor,
            binaries,
            base,
            folder=place.parent,
            sync=store.fsync and seal is None,
            tick=tick,
        )
        facts, data = made.write()
        if seal is not None:
            tick(step="seal", bytes=0)
            clear.seek(0)
            seal(clear, out)
        out.flush()
        with ThreadPoolExecutor(1, thread_name_prefix="package-sync") as pool:
            # Whoever gives it its name makes sure of it once more, and has less to wait for then.
            synced = pool.submit(os.fdatasync, out.fileno()) if store.fsync else None
            sha, size = digest_of(out.fileno()).removeprefix("sha256:"), os.fstat(out.fileno()).st_size
            if synced is not None:
                synced.result()  # a disk tells an error once: to this call, and not to the next
    return Packaged(str(place), sha, size, seal is not None, facts, data)


class _Package:
    """One package on its way into `out`, which is empty and has no name."""

    def __init__(
        self,
        tree: Tree,
        checking: Checking,
        out: BinaryIO,
        report: Report,
        config: bytes,
        redactor: Redactor,
        binaries: Binaries,
        base: Base | None,
        *,
        folder: Path,
        sync: bool,
        tick: Tick,
    ) -> None:
        self._tree = tree
        self._checking = checking
        self._out = out
        self._report = report
        self._redactor = redactor
        self._config = _redacted_config(config, redactor)
        self._binaries = binaries
        self._base = base
        self._folder = folder
        self._sync = sync
        self._tick = tick
        self._shift = 0
        self._room = 0
        self._packer: Packer
        self._looked: Looked | None = None
        self._refused: dict[Key, list[str]] = {}
        self._inside: list[Finding] = []

    def write(self) -> tuple[PackageFacts, bytes]:
        """Pack and scan; once more when the scan knows values that the packing came to know too late. Raises `Unredacted`."""
        # First: files before the one that teaches come before it.
        learn_credentials(self._tree, self._redactor, lambda names: self._tick(step="learn", entries=names, bytes=0))
        self._pack("pack")
        data = self._finish()
        if found := [*self._inside, *self._scan(None)]:
            # A password that stands in app.py plainly and is a secret only by what config.py says of it: now it is known.
            self._redactor.remember()
            touched = None if self._shift else self._packer.touched(finding.offset for finding in found)
            if touched is None:
                self._pack("again")
            else:
                self._patch(touched)
                self._inside = []
            data = self._finish()
            # What was written anew may have told of more; if not, the rest was scanned for all that is known, byte for byte.
            again = None if touched is None or self._redactor.remember() or self._shift else touched
            found = [*self._inside, *self._scan(again)]
        if found:
            raise unredacted(self._out, found)
        self._checking.result()
        return self._packer.facts(), data

    def _pack(self, step: str) -> None:
        base = self._base
        self._room = len(_head(self._checked(PackageFacts()), self._config, 0)) + ROOM
        self._shift = 0
        self._out.truncate(0)
        progress = self._progress(step)
        name = None if base is None else f"{self._redactor.text(base.reference)} {base.digest}"
        fd, redactor = self._out.fileno(), self._redactor
        looked = Looked(redactor.known_values())
        with Desk() as desk:
            looks = (
                # Others wait for the first two; the third takes long, so it begins early.
                partial(any_secret, redactor),
                partial(redact_members, desk, redactor),
                partial(look_inside, fd, redactor),
                partial(look_at_members, desk, redactor, looked.known),
            )
            with Looker(looks, (fd,)) as looker, OutFile(self._out, self._room, sync=self._sync) as body:
                self._checking.start()  # not before the process: what a thread holds at that moment nobody lets go of in a fork
                ask = [partial(looker.ask, number) for number in range(len(looks))]
                asked = Looks(desk, ask[0], ask[1], ask[2], ask[3], looked)
                self._packer = Packer(
                    self._tree, body, redactor, binaries=self._binaries, progress=progress, looks=asked, refused=self._refused
                )
                inside = self._packer.run(() if base is None else base.entries(), name)
        self._refused.update(inside)
        files = self._packer.files
        self._inside = [found_at(rule, files[key].content) for key, rules in inside.items() for rule in rules]
        self._looked = looked

    def _patch(self, touched: list[Key]) -> None:
        """Write some files anew, and move what lies behind those that are longer or shorter now."""
        if not touched:
            return
        self._progress("again")
        with (
            tempfile.TemporaryFile("w+b", buffering=0, dir=self._folder) as file,
            OutFile(cast("BinaryIO", file), 0, sync=False) as spool,
        ):
            self._packer.patch(touched, self._out.fileno(), spool)

    def _progress(self, step: str) -> Tick:
        def progress(**done: Any) -> None:
            self._tick(step=step, **done)

        progress(entries=0, bytes=0)
        return progress

    def _finish(self) -> bytes:
        """Put the report and the config before the rest; returns the report."""
        data = self._checked(self._packer.facts())
        head = _head(data, self._config, self._room)
        self._shift = max(0, len(head) - self._room)
        if self._shift:
            fd = self._out.fileno()
            move = Move(self._room, os.fstat(fd).st_size, self._shift)
            shifted(fd, [move], lambda place: self._tick(step="move", bytes=place))
        write_at(self._out.fileno(), head, 0)
        return data

    def _checked(self, facts: PackageFacts) -> bytes:
        data = self._report(facts)
        if len(data) > REPORT_LIMIT:
            raise Oversize(what="the crash report", size=len(data), limit=REPORT_LIMIT)
        return data

    def _scan(self, keys: list[Key] | None) -> list[Finding]:
        """What is found in the finished bytes: in all of them, or in the report and in the files `keys`."""
        fd, files = self._out.fileno(), self._packer.files
        if keys is None:
            looked, self._looked = None if self._shift else self._looked, None
            return scan_package(fd, files.values(), self._shift, self._redactor, self._tick, looked)
        ranges = [(files[key].start, files[key].content + padded(files[key].size)) for key in keys if key in files]
        return scan_ranges(fd, [(0, self._room), *ranges], self._redactor, self._tick)


def _head(data: bytes, config: bytes, room: int) -> bytes:
    """The members before the rootfs, in exactly `room` bytes, or in as many as they need when that is more."""
    members = b"".join(
        header(name, b"0", _FILE_MODE, 0, 0, len(content), 0) + content.ljust(padded(len(content)), b"\0")
        for name, content in ((b"report.json", data), (b"config.json", config))
    )
    size = max(BLOCK, room - len(members) - BLOCK)
    text = _COMMENT.ljust(size - len(b" comment=\n") - len(str(size)))
    record = b"%d comment=%b\n" % (size, text)
    return header(b"PaxHeaders/0", b"x", _FILE_MODE, 0, 0, size, 0) + record + members


def _redacted_config(config: bytes, redactor: Redactor) -> bytes:
    """config.json with its arguments and environment redacted; the same bytes when there is nothing to redact."""
    if len(config) > MAX_CONFIG:
        raise Oversize(what="config.json", size=len(config), limit=MAX_CONFIG)
    document = read_json(config, dict, "config.json")
    process = document.get("process")
    if not isinstance(process, dict):
        raise InvalidParams("config.json has no process; the bundle could not be started")
    args, env = process.get("args"), process.get("env")
    new = dict(process)
    if isinstance(args, list):
        new["args"] = redactor.argv([str(each) for each in args])
    if isinstance(env, list):
        pairs = [str(each).partition("=") for each in env]
        hidden = redactor.env({name: value for name, _, value in pairs})
        new["env"] = [f"{name}={value}" for name, value in hidden.items()]
    return config if new == process else canonical({**document, "process": new})


def _unnamed(folder: Path, stack: ExitStack) -> BinaryIO:
    """A file without a name in `folder`: a clear package that is to be sealed must not outlive its writer."""
    return cast("BinaryIO", stack.enter_context(tempfile.TemporaryFile("w+b", buffering=_PIECE, dir=folder)))


@contextmanager
def _no_cycle_collection() -> Iterator[None]:
    """Packing makes many small objects and no cycles; looking for them among a table of contents takes long."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
