"""What the layouts of a store say: whose they are, which captures they name, and what is wrong with them.

Tolerant on purpose: this is read after a disaster, and one damaged index must not hide the others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from mothball.errors import Corrupt, InvalidParams, MothballError
from mothball.names import check_workspace_id, slug
from mothball.registry import Recovered
from mothball.registry.kept import recall
from mothball.registry.workspaces import DERIVED
from mothball.store import Ref, RefIndex, Store
from mothball.store.blobs import check_digest, read_regular
from mothball.store.manifest import load_manifest, reach
from mothball.store.refs import LATEST, RELEASED, SNAPSHOT

CREATED = "org.opencontainers.image.created"
_MAX_FENCE = 2**52  # Lua counts exactly to here, and no fence of ours comes near: they are ms
_DIGITS = re.compile(r"[0-9]{1,15}\Z")


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """One layout. `workspace` is None when nobody can tell whose it is; `problems` are sentences about the layout itself,
    `damaged` those about single refs, by name. `fence` is the highest that ever began here, 0 for none."""

    folder: str
    workspace: str | None
    refs: list[Ref]
    fence: int
    released: bool
    problems: list[str]
    damaged: dict[str, str]

    @property
    def empty(self) -> bool:
        """Nothing was ever captured here: a first capture that failed leaves such a layout."""
        return not self.refs and not self.problems

    @property
    def latest(self) -> Ref | None:
        return next((ref for ref in self.refs if ref.name == LATEST), None)

    @property
    def generation(self) -> int:
        """The highest generation that any ref names."""
        return max((_number(ref.get("generation")) for ref in self.refs), default=0)


def layouts(store: Store) -> Iterator[Layout]:
    """Every layout of `store`, by folder name. Damage is in the answer, never raised."""
    for folder in store.workspaces():
        yield read_layout(store, folder)


def read_layout(store: Store, folder: Path) -> Layout:
    """The layout in `folder`, looked at with everything its refs name: manifests are read, sizes compared, no content is read."""
    problems: list[str] = []
    index = RefIndex(store.root, "unknown")
    index.folder = folder
    refs: list[Ref] = []
    try:
        refs = index.list()
    except (MothballError, OSError) as error:
        problems.append(f"its index.json cannot be read: {_reason(error)}")
    workspace = _owner(folder.name, refs)
    if refs and workspace is None:
        problems.append("its captures do not say which workspace they are of")
    if refs or problems:
        problems += _fixed_parts(store, folder)
    fence = 0
    try:
        fence = int(read_regular(folder / "fence"))
        if not 0 <= fence <= _MAX_FENCE:
            raise ValueError
    except FileNotFoundError:
        pass
    except (OSError, ValueError, Corrupt):
        fence = 0
        problems.append(f"its fence file holds no number that was ever given; delete {folder / 'fence'}, or no job can work here")
    return Layout(
        folder=folder.name, workspace=workspace, refs=refs, fence=fence, released=_released(folder, fence), problems=problems,
        damaged={ref.name: reason for ref in refs if (reason := _damage(store, ref))},
    )  # fmt: skip


def recovered(layout: Layout, host: str) -> Recovered:
    """What `layout` knows of its workspace; raises `InvalidParams` when it is nobody's or does not say where it lies."""
    if layout.workspace is None:
        raise InvalidParams(f"{layout.folder}: {'; '.join(layout.problems) or 'nothing was captured'}")
    latest = layout.latest
    # The newest first: what it says was true last.
    refs = sorted(layout.refs, key=lambda ref: (ref.name == LATEST, _number(ref.get("generation"))), reverse=True)
    mine = [ref for ref in refs if ref.get("workspace") == layout.workspace]
    kept = next((found for ref in mine if (found := recall(ref.get("record")))), {})
    if "repo" not in kept and mine and mine[0].get("repo"):
        kept = {**kept, "repo": mine[0].get("repo")}
    if "number" not in kept and (derived := DERIVED.match(layout.workspace)) and derived[1] == kept.get("repo"):
        kept = {**kept, "number": int(derived[2])}
    path = kept.get("path") or next((ref.get("path") for ref in mine if ref.get("path")), "")
    if not isinstance(path, str) or not path:
        raise InvalidParams(f"{layout.folder}: its captures do not say which directory they are of")
    made = [time for ref in refs if (time := _made(ref)) is not None]
    return Recovered(
        id=layout.workspace,
        host=host,
        path=path,
        fence=layout.fence,
        generation=layout.generation,
        digest=latest.digest if latest else None,
        bytes=_number(latest.get("bytes")) if latest else 0,
        files=_number(latest.get("files")) if latest else 0,
        high_water_bytes=max((_number(ref.get("bytes")) for ref in refs), default=0),
        snapshots=sum(1 for ref in refs if SNAPSHOT.match(ref.name)),
        crash_reports=sum(1 for ref in refs if ref.name.startswith("crash-")),
        last_good_at=_made(latest) if latest else None,
        created_at=min(made, default=0),
        kept=kept,
    )


def is_folder(path: str) -> bool:
    """True for a folder that is there; a name that no file system takes (too long, a NUL) is none."""
    try:
        return Path(path).is_dir()
    except OSError:
        return False


def _released(folder: Path, fence: int) -> bool:
    """True when a collector noted the release of the workspace, and nothing began to work on it since (fences are ms)."""
    try:
        at = json.loads(read_regular(folder / RELEASED))["at"]
    except (OSError, Corrupt, ValueError, TypeError, KeyError, RecursionError):
        return False
    return isinstance(at, int) and fence <= at


def _owner(folder: str, refs: list[Ref]) -> str | None:
    """The id that the refs name and that belongs into this folder; a pulled capture may name the workspace it came from."""
    for name in {ref.get("workspace") for ref in refs}:
        try:
            if slug(check_workspace_id(name)) == folder:
                return name
        except InvalidParams:
            continue
    return None


def _fixed_parts(store: Store, folder: Path) -> list[str]:
    """What is wrong with the parts by which other tools recognise an image layout."""
    found = []
    try:
        version = json.loads(read_regular(folder / "oci-layout"))["imageLayoutVersion"]
    except (OSError, Corrupt, ValueError, TypeError, KeyError, RecursionError):
        version = None
    if version != "1.0.0":
        found.append("its oci-layout file is missing or damaged")
    try:
        same = (folder / "blobs").samefile(store.blobs.folder.parent)
    except OSError:
        same = False
    if not same:
        found.append("its blobs folder does not lead to the blobs of this store")
    return found


def _damage(store: Store, ref: Ref) -> str:
    """Why `ref` cannot be restored as a whole, "" when all it names is there; content is not read (that is `verify`)."""
    try:
        for blob in reach(lambda digest: load_manifest(store.blobs, check_digest(digest)), ref.digest, ref.size):
            check_digest(blob.digest)
            size = store.blobs.size(blob.digest)
            if size != blob.size:
                return f"blob {blob.digest} has {size} bytes, {blob.size} are expected"
    except (MothballError, OSError) as error:
        return _reason(error)
    return ""


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, MothballError) else str(error)


def _number(text: str) -> int:
    return int(text) if _DIGITS.match(text) else 0


def _made(ref: Ref) -> int | None:
    """When the capture was made, ms, by its host's clock."""
    try:
        moment = datetime.fromisoformat(ref.annotations.get(CREATED, ""))
    except ValueError:
        return None
    return max(0, int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000))
