"""One purge, step by step: examine in place, move aside, look once more, delete, and the receipt of all that.

Killed between any two steps it leaves one of three things, which `recover` of the next run tells apart: the directory as it was;
the directory moved aside whole, which goes back; a deletion that was decided and has begun, which is finished.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from mothball.capture.types import CaptureOptions
from mothball.errors import Busy, Corrupt, OperationFailed, Oversize, PathNotAllowed
from mothball.purge.aside import Aside, State, open_aside, put_back, sibling_name
from mothball.purge.gitguard import git_losses, ignored_git_folders
from mothball.purge.look import Look, look
from mothball.purge.place import Others, Place, open_place, real_path
from mothball.purge.receipt import Gap, Receipt, Report, explain_gaps, gap_dicts, git_dicts, read_back
from mothball.purge.removal import delete
from mothball.purge.survey import Survey, mounts_below, survey, users_of
from mothball.settings import Settings
from mothball.store import Ref, Store
from mothball.store.read import show
from mothball.store.refs import LATEST
from mothball.store.tree import Tree

_UNLOOKED = "damaged"
"""Reason of a gap that leaves nothing to compare with."""


class Examination(msgspec.Struct, frozen=True):
    """What is known before anything is moved."""

    ref: Ref | None
    gaps: list[Gap]
    """What deletion would lose: with none of these the directory may go."""
    changed: list[Gap]
    """What differs from the capture, which a new one would hold."""
    busy: list[Gap]
    """Who works in it now."""
    git: list[dict[str, Any]]
    omitted: dict[str, int]
    identity: tuple[int, int]
    repositories: dict[bytes, int]
    git_items: dict[bytes, tuple[int, ...]]
    verified_at: int | None = None


class Purge:
    """The purge of one workspace's directory; get it from `open_purge`."""

    def __init__(
        self, place: Place, *, workspace: str, registration: str, settings: Settings, options: CaptureOptions,
        git_guard: bool, report: Report,
    ) -> None:  # fmt: skip
        self.place = place
        self._workspace = workspace
        self._registration = registration
        self._settings = settings
        self._options = options
        self._git_guard = git_guard
        self._report = report
        self._store = Store(settings.store_dir, fsync=settings.fsync)

    # -- what an earlier run left ----------------------------------------------------------------------------------------

    def recover(self, *, force: bool = False) -> Receipt | None:
        """Put back what an earlier run only moved aside; finish what it began to delete, and return that receipt.

        None when the directory is whole, or gone. With `force` what is left is deleted whatever it is. Raises `Busy` when it cannot
        be put back or another purge works there, `OperationFailed` for what cannot be told apart, what stays, and when a new
        directory has the name of a deleted one.
        """
        with open_aside(self.place, make=False) as aside:
            if aside is None:
                return None
            state, tree = aside.state(), aside.tree()
            try:
                mine = state is not None and self._mine(state)
                if tree is None:
                    if state is not None and mine and state.stage == "deleting" and not self._is_there():
                        return msgspec.convert(state.receipt, Receipt)
                    aside.remove()
                    return None
                found = os.fstat(tree)
                if state is None or not mine or (state.device, state.inode) != (found.st_dev, found.st_ino):
                    raise OperationFailed(
                        f"{aside.shown!r} is left of a deletion of which nothing more is known; look into it and move it away. "
                        "Nothing was deleted now"
                    )
                if state.stage == "aside":
                    aside.put_back()
                    aside.remove()
                    return None
                receipt = self._finish(aside, tree, state, force=force)
                if self._is_there():
                    aside.remove()
                    raise OperationFailed(
                        f"what was to be deleted of {self.place.path!r} is deleted (capture {state.digest} holds it), and a new "
                        "folder has that name by now. It was left alone: purge again if it is to go too"
                    )
                return receipt
            finally:
                if tree is not None:
                    os.close(tree)

    def put_back(self) -> bool:
        """Put back what an earlier run only moved aside, and leave alone what it began to delete; errors as `aside.put_back`."""
        return put_back(self.place, self._workspace, self._registration)

    def left_over(self) -> str:
        """What an earlier run left, in words; empty when it left nothing. Changes nothing."""
        with open_aside(self.place, make=False) as aside:
            if aside is None or not aside.has_tree():
                return ""
            state = aside.state()
            begun = state is not None and state.stage == "deleting"
            what = "has not deleted yet" if begun else "moved"
            return f"an earlier purge was interrupted, and what it {what} lies in {aside.shown!r}"

    def begun(self) -> bool:
        """True when an earlier run has begun to delete: only finishing it is left to do. Changes nothing."""
        with open_aside(self.place, make=False) as aside:
            state = None if aside is None else aside.state()
            return state is not None and self._mine(state) and state.stage == "deleting"

    def forget(self) -> None:
        """Remove what says how far a finished deletion came; the registry knows it by now."""
        with open_aside(self.place, make=False) as aside:
            if aside is not None:
                aside.remove()

    def _mine(self, state: State) -> bool:
        return (state.workspace, state.registration) == (self._workspace, self._registration)

    def _is_there(self) -> bool:
        fd = self.place.open()
        if fd is None:
            return False
        os.close(fd)
        return True

    def _finish(self, aside: Aside, tree: int, state: State, *, force: bool) -> Receipt:
        """Go on deleting what must be what the capture holds, or what stood there when it was examined, unless it is forced."""
        receipt: Receipt = msgspec.convert(state.receipt, Receipt)
        seen = survey(tree, self._report)
        self._refuse_mounts(tree, seen)
        captured: set[bytes] = set()
        if not state.forced and not force:
            gaps = list(seen.gaps)
            for folder, inode in seen.repositories().items():
                if inode not in state.repositories:
                    gaps.append(Gap(show(folder), "git", "a repository came there after it was examined"))
            with self._tree(state.digest) as held:
                found = look(tree, held, self._options, self._store, self._report, content=True, partly=True)
            gaps += found.gaps + found.changed + users_of((state.device, state.inode), seen)
            captured = found.captured
            if gaps:
                raise OperationFailed(
                    f"the deletion of {self.place.path!r} was interrupted, and what is left of it in {aside.shown!r} is not what "
                    f"was examined: {explain_gaps(gaps)}. Capture {state.digest} holds what is deleted already. Move what you need "
                    "out of there and purge again with --force --i-know"
                )
        self._delete(aside, tree, seen, captured)
        return receipt

    def _refuse_mounts(self, tree: int, seen: Survey) -> None:
        mounts = [gap for gap in seen.gaps if gap.reason == "mount"] or mounts_below(os.fsencode(real_path(tree)))
        if mounts:
            raise PathNotAllowed(f"{self.place.path!r} was not deleted: {explain_gaps(mounts)}", path=self.place.path)

    # -- a whole directory -----------------------------------------------------------------------------------------------

    def latest(self) -> Ref | None:
        """The latest capture of this very workspace in the store of this host."""
        return self._store.refs(self._workspace).find(LATEST)

    def examine(self, *, content: bool, now_ms: Callable[[], int]) -> Examination | None:
        """Look at the directory where it is, and read its latest capture back. Nothing is written. None: there is no directory.

        `content` compares files by content, not by size and times: slower, and exact. Raises `SourceMissing` for a directory that
        cannot be listed, and what `report` raises.
        """
        root = self.place.open()
        if root is None:
            return None
        try:
            found = os.fstat(root)
            seen = survey(root, self._report)
            gaps = mounts_below(self.place.real) + seen.gaps
            repositories = seen.repositories()
            git: list[dict[str, Any]] = []
            if self._git_guard and repositories:
                losses, git = git_losses(root, os.fsdecode(self.place.real), list(repositories), self._settings.workspace_roots)
                gaps += losses
            ref, looked, verified_at = self.latest(), Look(), None
            try:
                if ref is None:
                    gaps.append(Gap("", "no_capture", "nothing of it was ever captured on this host"))
                with self._tree(ref.digest if ref else None) as held:
                    looked = look(root, held, self._options, self._store, self._report, content=content)
                if ref is not None:
                    read_back(self._store, ref.digest, self._report)
                    verified_at = now_ms()
            except Oversize as error:
                gaps.append(Gap("", _UNLOOKED, error.message))
            except (Corrupt, OSError) as error:
                text = error.message if isinstance(error, Corrupt) else f"cannot be read: {error.strerror}"
                gaps.append(Gap("", _UNLOOKED, f"its capture {ref.digest if ref else ''} is damaged: {text}"))
            if self._git_guard:
                gaps += ignored_git_folders(root, self.place.real, list(repositories), looked.captured | looked.uncaptured)
            known = {gap.path for gap in gaps}
            return Examination(
                ref=ref,
                gaps=gaps + [gap for gap in looked.gaps if gap.path not in known],
                changed=looked.changed,
                busy=users_of((found.st_dev, found.st_ino), seen),
                git=git,
                omitted=dict(sorted(looked.omitted.items())),
                identity=(found.st_dev, found.st_ino),
                repositories=repositories,
                git_items=_git_items(seen),
                verified_at=verified_at,
            )
        finally:
            os.close(root)

    def run(self, known: Examination, *, force: bool, decided: Callable[[Receipt], None]) -> Receipt:
        """Delete the directory that was examined, and return the receipt.

        It is moved aside and compared with the capture once more, by content, while nobody can reach it. `decided` is called in the
        last moment, with the receipt, before the first name goes; what it raises puts the directory back. Without `force`
        anything that differs raises `Busy` with the directory back in its place: the next run captures it. Mount points are never
        overruled. `OperationFailed` when something of it had to stay.
        """
        with open_aside(self.place, make=True) as aside:
            if aside is None:
                raise Busy(what=f"{self.place.path!r}", reason="it went away while it was looked at")
            if aside.has_tree():
                raise Busy(what=f"{self.place.path!r}", reason="another purge of it was not finished; run it again")
            state = State(
                stage="aside", workspace=self._workspace, registration=self._registration, device=known.identity[0],
                inode=known.identity[1], forced=force, digest=known.ref.digest if known.ref else None,
                repositories=list(known.repositories.values()),
            )  # fmt: skip
            try:
                tree = aside.take(state)
            except BaseException:
                aside.remove()
                raise
            try:
                try:
                    seen, looked, missing = self._last_look(tree, known, force=force)
                    receipt = self._receipt(known, looked, missing)
                    decided(receipt)
                    aside.say(msgspec.structs.replace(state, stage="deleting", receipt=receipt.to_dict()))
                except BaseException:
                    aside.put_back()
                    aside.remove()
                    raise
                self._delete(aside, tree, seen, looked.captured)
            finally:
                os.close(tree)
            return receipt

    def _last_look(self, tree: int, known: Examination, *, force: bool) -> tuple[Survey, Look, list[Gap]]:
        root = os.fstat(tree)
        seen = survey(tree, self._report)
        self._refuse_mounts(tree, seen)
        busy = users_of((root.st_dev, root.st_ino), seen)
        if busy and not force:
            raise Busy(what=f"{self.place.path!r}", reason=f"{explain_gaps(busy)}; nothing was deleted")
        looked = Look()
        if known.ref is not None and not (force and any(gap.reason == _UNLOOKED for gap in known.gaps)):
            with self._tree(known.ref.digest) as held:
                looked = look(tree, held, self._options, self._store, self._report, content=True)
        changed = seen.gaps + looked.gaps + looked.changed
        if self._git_guard and _git_items(seen) != known.git_items:
            changed.append(Gap("", "git", "a repository of it changed while it was looked at"))
        now = self.latest()
        if (now.digest if now else None) != (known.ref.digest if known.ref else None):
            changed.append(Gap("", "changed", "another capture took the place of the one that was read back"))
        if changed and not force:
            reason = f"it changed after it was captured: {explain_gaps(changed)}; nothing was deleted"
            raise Busy(what=f"{self.place.path!r}", reason=reason)
        return seen, looked, list(dict.fromkeys([*known.gaps, *busy, *changed])) if force else []

    def _receipt(self, known: Examination, looked: Look, missing: list[Gap]) -> Receipt:
        return Receipt(
            digest=known.ref.digest if known.ref else None,
            generation=known.ref.generation if known.ref else 0,
            files=looked.files,
            bytes=looked.bytes,
            verified_at=known.verified_at,
            directory="deleted",
            omitted=dict(sorted(looked.omitted.items())),
            git=git_dicts(known.git),
            forced=gap_dicts(missing),
        )

    def _delete(self, aside: Aside, tree: int, seen: Survey, captured: set[bytes]) -> None:
        left = delete(tree, seen, captured, lambda done: self._report("delete", {"entries": done, "of": len(seen.items)}))
        if left or not aside.drop_tree():
            what = explain_gaps(left) or "something came while it was deleted"
            raise OperationFailed(
                f"{self.place.path!r} could not be deleted completely; what stayed lies in {aside.shown!r}: {what}. Move out what "
                "you need, mend what is in the way and purge again"
            )

    @contextmanager
    def _tree(self, digest: str | None) -> Iterator[Tree | None]:
        if digest is None:
            yield None
            return
        with Tree.open(self._store, digest) as tree:
            yield tree


def _git_items(seen: Survey) -> dict[bytes, tuple[int, ...]]:
    """What the git folders look like from outside: any write to one changes some of it."""
    found: dict[bytes, tuple[int, ...]] = {}
    for item in seen.items:
        if b".git" in item.path.split(b"/"):
            found[item.path] = (
                item.inode,
                item.mtime_ns,
                0 if item.is_folder else item.ctime_ns,
                0 if item.is_folder else item.size,
            )
    return found


@contextmanager
def open_purge(
    path: str, *, workspace: str, registration: str, settings: Settings, options: CaptureOptions, others: Others, git_guard: bool,
    report: Report = lambda _name, _data: None,
) -> Iterator[Purge]:  # fmt: skip
    """The purge of `workspace`, whose directory is `path`. `others` are the other workspaces of this host; errors as `open_place`.

    `report` is called with step and progress; what it raises ends the purge: before a deletion began everything is put back.
    """
    with open_place(path, settings, others) as place:
        yield Purge(
            place, workspace=workspace, registration=registration, settings=settings, options=options, git_guard=git_guard,
            report=report,
        )  # fmt: skip


def put_back_interrupted(path: str, *, workspace: str, registration: str, settings: Settings) -> bool:
    """Give the directory `path` of a workspace its name again when a purge that nobody will run again only moved it aside.

    True when that was done. One look at a name when there is nothing to do; else errors as `open_place` and `aside.put_back`.
    """
    folder, name = os.path.split(os.fsencode(path))
    if not os.path.lexists(os.path.join(folder, sibling_name(name))):  # noqa: PTH118 -- bytes
        return False
    with open_place(path, settings, ()) as place:
        return put_back(place, workspace, registration)


__all__: Sequence[str] = ("Examination", "Purge", "open_purge", "put_back_interrupted")
