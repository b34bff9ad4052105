"""What the tests of collection share: facts without a registry, time that passes, and what a store holds."""

from __future__ import annotations

import os
import time

from mothball.store import Ref, Store
from mothball.store.collect import CollectReport, collect
from mothball.store.manifest import load_manifest
from mothball.store.survey import Standing
from mothball.store.trash import Trash

GRACE, TRASH, TOMBSTONE = 3600.0, 7200.0, 86_400.0
DAY = 86_400.0


class Registry:
    """Facts from memory."""

    def __init__(self, **standing: Standing) -> None:
        self.known: dict[str, Standing] = dict(standing)
        self.digests: dict[str, str | None] = {}

    def standing(self, workspace: str) -> Standing:
        return self.known.get(workspace, "unknown")

    def registered(self) -> list[tuple[str, str | None]]:
        return [(each, self.digests.get(each)) for each, standing in self.known.items() if standing == "known"]


def age(store: Store, seconds: float = DAY) -> None:
    """Make everything older by `seconds`, as if that time had passed."""
    for path in [*store.root.rglob("*")]:
        found = path.lstat()
        os.utime(path, (found.st_atime - seconds, found.st_mtime - seconds), follow_symlinks=False)
    runs = Trash(store).blobs
    for path in sorted(runs.iterdir()) if runs.is_dir() else []:
        path.rename(path.with_name(str(int(path.name) - int(seconds * 1000))))


def run(store: Store, **options: object) -> CollectReport:
    values: dict[str, object] = {"grace_s": GRACE, "trash_s": TRASH, "tombstone_s": TOMBSTONE, **options}
    return collect(store, **values)  # type: ignore[arg-type]


def garbage(store: Store, content: bytes = b"nobody names me") -> str:
    return store.blobs.put(content)[0]


def forget(store: Store, workspace: str, name: str) -> Ref:
    """As the forget command does: bury, then take out of the index."""
    refs = store.refs(workspace)
    ref = refs.get(name)
    Trash(store).bury_ref(workspace, ref, "test", int(time.time() * 1000))
    refs.replace(lambda before: [each for each in before if each.name != name])
    return ref


def blobs_of(store: Store, digest: str) -> list[str]:
    manifest = load_manifest(store.blobs, digest)
    return [digest, manifest.config.digest, *(each.digest for each in manifest.layers)]


def blob_names(store: Store) -> set[str]:
    return {f"sha256:{path.name}" for path in store.blobs.folder.iterdir()}
