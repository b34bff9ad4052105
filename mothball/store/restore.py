"""Bringing a capture back as a directory (design.md, section 5).

A new directory is made beside its target and renamed when it is complete, so a target is never half there; a run that was
ended is continued by the next, which hashes again what it finds. A directory with content is compared first and then
changed file by file, each in one step. Whatever is written is verified, nothing is written through a link or outside.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from mothball.errors import AlreadyExists, Busy, InvalidParams, LeaseLost, MothballError, NoSpace
from mothball.store.folders import Folders
from mothball.store.frames import Frames, units
from mothball.store.left_out import LeftOut
from mothball.store.merge import Found
from mothball.store.read import show
from mothball.store.restore_mark import MARK, read_mark, remove_mark, write_mark
from mothball.store.restore_merge import Comparison, Overwrite, Work, check_space
from mothball.store.restore_result import Action, RestoreResult, bounded
from mothball.store.restore_target import Sibling, Target, open_sibling, open_target
from mothball.store.selection import Patterns, Selection, select
from mothball.store.tree import Tree
from mothball.store.unpack import Unpacker, free_temp

__all__ = ["Overwrite", "RestoreResult", "bounded", "check_target", "discard", "restore"]

Progress = Callable[[str, dict[str, Any]], None]
"""Called often with the step (``compare``, ``write``, ``finish``) and counts; what it raises ends the restore."""

_Item = TypeVar("_Item")
OVERWRITE: Final = ("never", "changed", "always")
_VERSION: Final = 1
_TICK_EVERY: Final = 256
_TICK_SECONDS: Final = 0.05


def restore(
    tree: Tree,
    target: Path,
    *,
    include: Sequence[str] = (),
    overwrite: Overwrite | None = None,
    delete_extra: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    roots: tuple[Path, ...] | None = None,
    by: str = "",
) -> RestoreResult:
    """Write the content of `tree` to the directory `target`.

    `include`: only what these patterns choose (see `Patterns`). `overwrite`: what happens to what is there when the target
    has content; without it such a target is `AlreadyExists`. `delete_extra` deletes what the capture does not have, but never
    a `.git` nor what the capture left out. `roots`: the target must lie below one of them, and no link may stand on the way;
    None: anywhere outside the store. `dry_run` writes nothing at all. `by`: who restores, for `discard`.

    Raises `InvalidParams`, `NotFound` (nothing matches), `AlreadyExists`, `PathNotAllowed` (a link, another root), `NoSpace`,
    `Busy` (another restore writes there), `Corrupt` (nothing wrong is left under its name), `OperationFailed`, and what
    `progress` raises. A new target is there whole or not at all. What was written so far stays beside it when the same call
    may succeed later, and the same call then goes on; after other errors it is removed.
    """
    if overwrite is not None and overwrite not in OVERWRITE:
        raise InvalidParams(f"overwrite must be one of {', '.join(OVERWRITE)}, not {str(overwrite)[:100]!r}")
    if delete_extra and overwrite not in {"changed", "always"}:
        raise InvalidParams("deleting what the capture does not have needs overwrite 'changed' or 'always'")
    patterns = Patterns(include)
    omitted = LeftOut(tree) if delete_extra else None
    if omitted is not None and omitted.cut:
        raise InvalidParams(
            "this capture left out more than its list has room for, so it cannot be told what is foreign: nothing is deleted; "
            "restore without deleting"
        )
    with open_target(target, roots, tree.blobs.root) as place:
        run = _Restore(tree, place, tuple(include), patterns, progress, dry_run=dry_run, by=by)
        delete = (patterns, omitted) if omitted is not None else None
        return run.run(overwrite, delete)


def discard(target: Path, *, roots: tuple[Path, ...] | None = None, store: Path, by: str | None = None) -> bool:
    """Remove what an unfinished restore to `target` left beside it; True when there was something. Errors as `restore`.

    With `by` only what a restore by that one left.
    """
    with open_target(target, roots, store) as place, open_sibling(place, make=False) as sibling:
        if sibling is None:
            return False
        known = sibling.state()
        if by is not None and known and known.get("by") != by:
            return False
        sibling.remove()
        return True


def check_target(target: Path, *, roots: tuple[Path, ...] | None, store: Path) -> None:
    """Raise what `restore` would raise for the place alone: another root, a link, a file, no folder above it."""
    with open_target(target, roots, store) as place:
        place.look()


class _Restore:
    """One restore to one open target."""

    def __init__(
        self, tree: Tree, target: Target, include: tuple[str, ...], patterns: Patterns, progress: Progress | None,
        *, dry_run: bool, by: str,
    ) -> None:  # fmt: skip
        self._tree = tree
        self._target = target
        self._wanted = {"version": _VERSION, "digest": tree.digest, "include": list(include)}
        """What a run must have in common with the one it continues."""
        self._by = by
        self._patterns = patterns
        self._progress = progress or (lambda _step, _counts: None)
        self._dry = dry_run
        self._began = time.monotonic()
        self._selection = Selection()
        self._skipped = 0

    def run(self, overwrite: Overwrite | None, delete: tuple[Patterns, LeftOut] | None) -> RestoreResult:
        look = self._target.look()
        fill = False
        if look == "folder" and overwrite is None:
            done = self._published()
            if done is not None:
                return done
            fill = self._begun()
            if not fill:
                raise AlreadyExists(
                    f"{str(self._target.path)!r} is not empty; choose another target, or say what happens to what is there "
                    "(overwrite: never, changed or always)"
                )
        self._progress("compare", {"files": 0})
        self._selection = select(self._tree, self._patterns, known=delete is not None)
        if look == "empty" and overwrite is None:
            fill = not self._target.replaceable()
        if fill or (look != "absent" and overwrite is not None):
            return self._into(overwrite, delete)
        return self._new()

    # -- a new directory -----------------------------------------------------------------------------------------------

    def _new(self) -> RestoreResult:
        if self._dry:
            return self._planned(Work(self._selection))
        with open_sibling(self._target) as sibling:
            assert sibling is not None  # noqa: S101 - it is made when it is not there
            try:
                return self._build(sibling)
            except LeaseLost:
                raise  # whoever holds the lease now goes on with it
            except MothballError as error:
                if not error.retryable:
                    sibling.remove()
                raise

    def _build(self, sibling: Sibling) -> RestoreResult:
        known = sibling.state()
        if sibling.has_tree():
            if not known:
                sibling.drop_tree()  # its removal has begun
            elif not self._is_same(known):
                self._refuse_other(known)
        wanted = {**self._wanted, "by": self._by}
        sibling.say(wanted)
        fd, there = sibling.tree()
        try:
            work = self._compare(fd, "changed", None) if there else Work(self._selection)
            try:
                check_space(fd, work, str(self._target.path))
            except NoSpace:
                if not there:
                    sibling.remove()
                raise
            root = self._selection.folders[0]
            work.dress = [found for found in work.dress if found.row.path]
            result = self._perform(fd, work, replace=there)
            now = os.fstat(fd)
            sibling.say({**wanted, "inode": [now.st_dev, now.st_ino]})
            sibling.publish()
            # Only now: a folder that its owner may not write cannot be moved.
            self._dress_root(fd, root)
        finally:
            os.close(fd)
        sibling.remove()
        return msgspec.structs.replace(result, resumed=there, seconds=self._seconds(), owner_skipped=self._skipped)

    def _refuse_other(self, known: dict[str, Any]) -> None:
        what = f"capture {str(known.get('digest', '(not said)'))[:80]}"
        if known.get("digest") == self._tree.digest:
            what = f"the same capture with other include patterns ({', '.join(map(str, known.get('include') or ['none']))[:200]})"
        raise Busy(
            f"an unfinished restore of {show(os.fsencode(what))} to {str(self._target.path)!r} waits in "
            f"{self._target.sibling_path!r}; finish it by the same command, or remove that folder"
        )

    def _is_same(self, known: dict[str, Any]) -> bool:
        return all(known.get(key) == value for key, value in self._wanted.items())

    def _published(self) -> RestoreResult | None:
        """The result of a run that was ended after the rename: its tree is the target already, unless that has changed since."""
        if self._dry:
            return None
        with open_sibling(self._target, make=False) as sibling:
            if sibling is None or sibling.has_tree():
                return None
            known = sibling.state()
            fd = self._target.open()
            try:
                now = os.fstat(fd)
                if not known or (self._is_same(known) and known.get("inode") == [now.st_dev, now.st_ino]):
                    self._selection = select(self._tree, self._patterns)
                    if self._is_there(fd):
                        if known:
                            self._dress_root(fd, self._selection.folders[0])
                        sibling.remove()
                        return self._result(unchanged=self._selection.count, resumed=True)
            finally:
                os.close(fd)
            sibling.remove()
        return None

    def _is_there(self, fd: int) -> bool:
        """True when all that was chosen is in the open folder as captured."""
        try:
            work = self._compare(fd, "changed", None)
        except AlreadyExists:
            return False
        return not (work.files or work.links or work.folders or work.groups or work.metadata or work.remove)

    def _dress_root(self, fd: int, root: Found) -> None:
        with Frames(self._tree.layers) as frames:
            unpacker = Unpacker(frames, Folders(fd), replace=False)
            unpacker.dress_folder(root)
        self._skipped += unpacker.tally.owner_skipped

    # -- a directory with content --------------------------------------------------------------------------------------

    def _begun(self) -> bool:
        """True when a run of this restore found the target empty, began to fill it and was ended."""
        fd = self._target.open()
        try:
            return self._is_same(read_mark(fd) or {})
        finally:
            os.close(fd)

    def _into(self, overwrite: Overwrite | None, delete: tuple[Patterns, LeftOut] | None) -> RestoreResult:
        """Change what is there. Without `overwrite` it was empty, or has what a run of this restore began to fill it with."""
        fd = self._target.open()
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(what=f"target {str(self._target.path)!r}", reason="another restore writes it") from None
            begun = overwrite is None and self._is_same(read_mark(fd) or {})
            work = self._compare(fd, overwrite or "changed", delete)
            if overwrite is None and (work.replaced or work.remove):
                shown = show((work.replaced or work.remove)[0])
                raise AlreadyExists(
                    f"{shown!r} in {str(self._target.path)!r} is not what the restore that was ended there wrote; "
                    "say what happens to what is there (overwrite: never, changed or always)"
                )
            if self._dry:
                return self._planned(work)
            check_space(fd, work, str(self._target.path))
            root = [found for found in work.dress if not found.row.path]
            work.dress = [found for found in work.dress if found.row.path]
            marks = all(found.row.path != MARK for found in self._selection.files)  # else it is the capture's own
            if overwrite is None and not begun and marks:
                write_mark(fd, self._wanted)
            result = self._perform(fd, work, replace=True)
            if marks:
                remove_mark(fd)
            for found in root:
                self._dress_root(fd, found)
            self._drop_same()
            return msgspec.structs.replace(result, resumed=begun, seconds=self._seconds(), owner_skipped=self._skipped)
        finally:
            os.close(fd)

    def _drop_same(self) -> None:
        """What a run that was to make the target left beside it is of no more use, now that the target is there."""
        with suppress(MothballError), open_sibling(self._target, make=False) as sibling:
            known = sibling.state() if sibling is not None else {}
            if sibling is not None and (not known or self._is_same(known)):
                sibling.remove()

    def _compare(self, fd: int, overwrite: Overwrite, delete: tuple[Patterns, LeftOut] | None) -> Work:
        total, told = self._selection.count, 0.0

        def tick(number: int) -> None:
            nonlocal told
            now = time.monotonic()
            if now - told > _TICK_SECONDS:
                told = now
                self._progress("compare", {"files": number, "total_files": total})

        with Folders(fd, lift=not self._dry) as folders:
            try:
                return Comparison(self._selection, folders, overwrite, delete=delete, tick=tick).run()
            finally:
                folders.restore_modes()

    # -- both ----------------------------------------------------------------------------------------------------------

    def _perform(self, fd: int, work: Work, *, replace: bool) -> RestoreResult:
        temp = free_temp(found.row.path for found in self._selection.entries)
        with Frames(self._tree.layers, units(work.files)) as frames, Folders(fd, lift=True) as folders:
            unpacker = Unpacker(frames, folders, replace=replace, temp=temp)
            try:
                kept = self._write(unpacker, work)
            finally:
                for found in work.dress:
                    folders.lifted.pop(found.row.path, None)
                folders.restore_modes()
        tally = unpacker.tally
        self._skipped += tally.owner_skipped
        return self._result(
            written=tally.files + tally.links + len(work.folders),
            written_bytes=tally.bytes,
            unchanged=work.unchanged,
            metadata=len(work.metadata),
            kept=len(work.kept) + len(kept),
            deleted=len(work.remove) + len(work.delete) - len(kept),
            actions=[Action("keep", show(path)) for path in (*work.kept, *kept)]
            + [Action("delete", show(path)) for path in (*work.remove, *work.delete) if path not in kept],
        )

    def _write(self, unpacker: Unpacker, work: Work) -> set[bytes]:
        """Do all of `work`; returns what of `work.delete` is still there, because somebody filled it meanwhile."""
        tally = unpacker.tally
        step = "write"

        def tick() -> None:
            counts = {"files": tally.files, "total_files": work.count, "bytes": tally.bytes, "total_bytes": work.size}
            self._progress(step, counts)

        def ticking(items: Sequence[_Item]) -> Iterator[_Item]:
            for number, found in enumerate(items):
                if number % _TICK_EVERY == 0:
                    tick()
                yield found

        for path in ticking(work.remove):
            unpacker.remove(path)
        for found in ticking(work.folders):
            if found.row.path:
                unpacker.folder(found)
        for unit in units(work.files):
            unpacker.unit(unit, tick)
        for found in ticking(work.links):
            unpacker.link(found)
        for first, names in work.groups.items():
            for found in ticking(names):
                unpacker.further(first, found)
        step = "finish"
        for found in ticking(work.metadata):
            unpacker.metadata(found, work.inodes[found.row.path])
        kept = {path for path in ticking(work.delete) if not unpacker.remove(path)}
        for found in ticking(sorted(work.dress, key=lambda each: each.row.path.count(b"/"), reverse=True)):
            unpacker.dress_folder(found)
        tick()
        return kept

    def _planned(self, work: Work) -> RestoreResult:
        return self._result(
            written=len(work.made()),
            written_bytes=sum(found.row.size for found in work.files),
            unchanged=work.unchanged,
            metadata=len(work.metadata),
            kept=len(work.kept),
            deleted=len(work.remove) + len(work.delete),
            actions=work.actions(),
            dry_run=True,
        )

    def _result(self, **counts: Any) -> RestoreResult:
        chosen = self._selection
        return RestoreResult(
            target=str(self._target.path),
            digest=self._tree.digest,
            files=len(chosen.files) + sum(map(len, chosen.groups.values())),
            folders=len(chosen.folders),
            links=len(chosen.links),
            bytes=chosen.size,
            seconds=self._seconds(),
            **counts,
        )

    def _seconds(self) -> float:
        return round(time.monotonic() - self._began, 6)
