"""The trash: what was forgotten or collected, until nobody can want it back.

``trash/refs/<workspace>/`` has one file per ref that was taken out of an index; ``trash/blobs/<ms>/`` has the blobs that one
collection moved aside, under the time of that collection (this host's clock, as the age of blobs is). A ref is buried before
it leaves its index and its blobs are moved only after that, so as long as a buried ref is here its blobs are too.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from mothball.errors import Corrupt, MothballError, NotFound
from mothball.names import check_workspace_id, slug
from mothball.store import Ref, Store
from mothball.store.blobs import check_digest, full_disk_is_no_space, read_regular, replace_file, sync_folder
from mothball.store.foreign import read_json
from mothball.store.manifest import PREFIX, Manifest, load_manifest, reach
from mothball.store.refs import RELEASED, SNAPSHOT, Refs

_RUN = re.compile(r"[0-9]{1,15}\Z")
_TRIES = 5
_KEEP = PREFIX + "keep"
_NUMBER = PREFIX + "snapshot"


class Buried(msgspec.Struct, frozen=True):
    """A ref that left its index: of which workspace, why, and when (ms of Redis TIME, or of this host's clock without Redis).

    `job` asked for it, if one did: run again after a kill, it has to know its own work from that of others.
    """

    workspace: str
    ref: Ref
    reason: str
    at: int
    job: str = ""


class Undeleted(msgspec.Struct, frozen=True):
    """A ref that is back. `name` differs from `was` when another capture has that name now; it is empty when the ref cannot come
    back, and `problem` says why."""

    was: str
    name: str
    digest: str
    problem: str = ""


_encode = msgspec.json.Encoder(order="deterministic").encode


class Trash:
    """The trash of one store. Cheap to build; a collection makes its folders, or whoever puts something in first."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.root = store.root / "trash"
        self.refs = self.root / "refs"
        self.blobs = self.root / "blobs"

    def prepare(self) -> None:
        """Make the folders before the disk is full: then not even one file can be made for each."""
        for folder in (self.root, self.refs, self.blobs):
            folder.mkdir(mode=0o700, exist_ok=True)

    # -- refs ----------------------------------------------------------------------------------------------------------

    def bury_ref(self, workspace: str, ref: Ref, reason: str, at_ms: int, *, job: str = "") -> None:
        """Keep `ref` here before it leaves the index of `workspace`; idempotent, and on disk when this returns.

        Done first, a crash leaves a ref that is in both places, which harms nothing; done last, it would leave none.
        """
        folder = self.refs / slug(check_workspace_id(workspace))
        data = _encode(Buried(workspace, ref, reason, at_ms, job))
        fresh = False
        for attempt in range(_TRIES):
            with full_disk_is_no_space(folder):
                fresh = fresh or not folder.is_dir()
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                replace_file(folder / _file_name(ref), data, self.store.blobs.temp, sync=self.store.fsync)
                break
            except FileNotFoundError:  # a collector removed the folder because it was empty
                if attempt == _TRIES - 1:
                    raise
        if self.store.fsync and fresh:
            for made in (self.refs, self.root, self.store.root):
                sync_folder(made)

    def buried(self, workspace: str | None = None, *, without: Container[Path] = ()) -> list[Buried]:
        """What can be undeleted, of one workspace or of all, oldest first. Files that cannot be read are left out."""
        files = (path for path in self.ref_files(workspace) if path not in without)
        found = [entry for path in files if (entry := _load(path)) is not None]
        return sorted(found, key=lambda entry: (entry.at, entry.workspace, entry.ref.name))

    def ref_files(self, workspace: str | None = None) -> Iterator[Path]:
        """The files of buried refs; their mtime is when they came here."""
        wanted = slug(workspace) if workspace is not None else None
        for folder in _listed(self.refs, stat.S_ISDIR):
            if wanted in (None, folder.name):
                yield from _listed(folder, stat.S_ISREG)

    # -- blobs ---------------------------------------------------------------------------------------------------------

    def runs(self) -> list[tuple[int, Path]]:
        """(ms, folder) of each collection that moved something aside, oldest first."""
        return sorted((int(path.name), path) for path in _listed(self.blobs, stat.S_ISDIR) if _RUN.match(path.name))

    def free_run(self, ms: int) -> Path:
        """The folder of a run at `ms`, or so little later that no run has its name."""
        while os.path.lexists(folder := self.blobs / str(ms)):
            ms += 1
        return folder

    def find(self, digest: str) -> Path | None:
        """Where in the trash the blob lies, None when it does not."""
        name = check_digest(digest)[7:]
        return next((path / name for _, path in reversed(self.runs()) if (path / name).is_file()), None)

    def put_back(self, digest: str) -> bool:
        """Make the blob count as just used, bringing it back from the trash if it is there; False when it is in neither place.

        Held against collectors and against writers of the same blob: theirs is newer and must not be replaced by this one.
        """
        target = self.store.blobs.path(digest)
        with self.store.blobs.collecting():
            for _ in range(_TRIES):
                with suppress(FileNotFoundError):
                    os.utime(target)
                    return True
                found = self.find(digest)
                if found is None:
                    return False
                # A collection that empties this run, or gives it a true name, does so without the lock: then look again.
                with suppress(FileNotFoundError):
                    os.utime(found)  # before it is back: it must never be seen there with its old age
                    found.rename(target)
                    if self.store.fsync:
                        sync_folder(target.parent)
                    return True
        return False


def undelete(store: Store, workspace: str, name: str | None = None, *, keep: bool = True) -> list[Undeleted]:
    """Bring back the buried ref `name` (or digest) of `workspace`, or all of them, with their blobs; idempotent.

    With `keep` a snapshot gets the keep flag, else the retention that took it would take it again. A name that another capture
    has by now becomes the next ``snap-<n>``. One that is damaged keeps no other from coming back. Raises `NotFound` when nothing of
    that name is in the trash, `Corrupt` when of all that is asked for the blobs are not there any more.
    """
    trash = Trash(store)
    chosen = [entry for entry in trash.buried(workspace) if name is None or name in (entry.ref.name, entry.ref.digest)]
    if not chosen:
        raise _nothing(store, trash, workspace, name)
    if name is not None:
        chosen = chosen[-1:]
    problems: dict[int, str] = {}
    for place, entry in enumerate(chosen):
        try:
            _bring_blobs(trash, entry)
        except Corrupt as error:
            problems[place] = error.message
            if len(problems) == len(chosen):
                raise
    refs = store.refs(workspace)
    names: dict[int, str] = {}

    def change(before: Refs) -> Refs:
        after = {ref.name: ref for ref in before}
        # The newest first: of two lives of a workspace the last one's ``latest`` is the latest.
        for place in reversed(range(len(chosen))):
            if place in problems:
                continue
            back = _again(chosen[place].ref, after, refs.last_snapshot)
            names[place] = back.name
            if back.name not in after:
                flag = {_KEEP: "1"} if keep and SNAPSHOT.match(back.name) else {}
                after[back.name] = msgspec.structs.replace(back, annotations={**back.annotations, **flag})
        return list(after.values())

    for attempt in range(_TRIES):
        refs.prepare()
        # Whoever brings captures back wants the layout to stay; the next collection asks the registry again.
        (refs.folder / RELEASED).unlink(missing_ok=True)
        try:
            refs.replace(change)
            break
        except FileNotFoundError:  # a collector had decided before, and took the layout away
            if attempt == _TRIES - 1:
                raise
    # The buried files stay until their time is over: to remove one here could race with somebody who forgets the ref again.
    return [
        Undeleted(entry.ref.name, names.get(place, ""), entry.ref.digest, problems.get(place, ""))
        for place, entry in enumerate(chosen)
    ]


def _again(ref: Ref, taken: dict[str, Ref], last: int) -> Ref:
    """`ref` under a name that is free, or what already stands for it among `taken`."""
    here = taken.get(ref.name)
    if here is None:
        return ref
    # A crash report of that name is the same one, amended; it must never come back as a snapshot, for it is no tree.
    if here.digest == ref.digest or ref.name.startswith("crash-"):
        return here
    same = next((each for each in taken.values() if each.digest == ref.digest and SNAPSHOT.match(each.name)), None)
    if same is not None:
        return same
    numbers = [int(match[1]) for each in taken if (match := SNAPSHOT.match(each))]
    number = max([last, *numbers]) + 1
    return msgspec.structs.replace(ref, name=f"snap-{number}", annotations={**ref.annotations, _NUMBER: str(number)})


def _bring_blobs(trash: Trash, entry: Buried) -> None:
    def bring(digest: str) -> None:
        if not trash.put_back(digest):
            raise Corrupt(
                what=f"the forgotten capture {entry.ref.name!r} of workspace {entry.workspace!r}",
                reason=f"blob {digest} is neither in the store nor in the trash",
            )

    def manifest(digest: str) -> Manifest:
        bring(digest)
        return load_manifest(trash.store.blobs, digest)

    for blob in reach(manifest, entry.ref.digest, entry.ref.size):
        bring(blob.digest)


def _nothing(store: Store, trash: Trash, workspace: str, name: str | None) -> NotFound:
    known = ", ".join(entry.ref.name for entry in trash.buried(workspace)) or "nothing"
    here = ", ".join(ref.name for ref in store.refs(workspace).list()) or "none"
    what = f"no forgotten capture {name!r}" if name is not None else "nothing"
    return NotFound(
        f"the trash of this host has {what} of workspace {workspace!r}; it has: {known}. Captures that were not forgotten: {here}",
        what="forgotten capture",
        id=name or workspace,
    )


def _file_name(ref: Ref) -> str:
    return f"{slug(ref.name)}@{check_digest(ref.digest)[7:23]}.json"


def _load(path: Path) -> Buried | None:
    try:
        return read_json(read_regular(path), Buried, f"buried ref {path.name}")
    except (OSError, MothballError):
        return None


def _listed(folder: Path, kind: Callable[[int], bool]) -> list[Path]:
    """What of `kind` is in `folder`, never through a link: who deletes what is listed here must not delete elsewhere."""
    found = []
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in sorted(folder.iterdir()):
            with suppress(FileNotFoundError):
                if kind(path.lstat().st_mode):
                    found.append(path)
    return found


def now_ms() -> int:
    """This host's clock in ms."""
    return time.time_ns() // 1_000_000
