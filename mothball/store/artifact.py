"""Crash reports in the store: an OCI artifact each, whose layer is ``report.json`` and whose subject is the capture.

It is a ref of the workspace's layout like a snapshot, so the collector, the trash, usage and verification know it: as long as
somebody keeps the report, the capture it is about is kept too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from mothball.errors import Corrupt, InvalidParams, NotFound, Oversize
from mothball.store import Ref, Store
from mothball.store.manifest import (
    MEDIA_EMPTY,
    MEDIA_MANIFEST,
    PREFIX,
    Descriptor,
    Manifest,
    canonical,
    load_manifest,
    wanted_subject,
)
from mothball.store.refs import LATEST, REF_NAME
from mothball.store.trash import Trash

CRASH_TYPE: Final = "application/vnd.mothball.crash-report.v1"
"""The `artifactType` of a crash report."""
REPORT_MEDIA: Final = CRASH_TYPE + "+json"
"""The media type of its one layer, report.json."""
CRASH_PREFIX: Final = "crash-"
"""Beginning of the refs that are crash reports."""
REPORT_LIMIT: Final = 256 * 1024**2
"""Most bytes of a report."""
_EMPTY: Final = b"{}"
_TITLE: Final = "org.opencontainers.image.title"
_NAME = re.compile(r"crash-[A-Za-z0-9._-]{1,150}\Z")


def is_crash(name: str) -> bool:
    """True for the name of a ref that is a crash report."""
    return name.startswith(CRASH_PREFIX)


def no_image(name: str) -> InvalidParams:
    """The error for whoever wants the crash report `name` (or its digest) as an image or a tar."""
    return InvalidParams(
        f"{name} is a crash report and no image, and nothing was written: `mothball crash-reports fetch` writes its package, which "
        "runc runs; its files as they were captured are for `mothball restore`, `files`, `cat` and `diff`, here, with the same name"
    )


def check_crash_name(name: object) -> str:
    """`name` when it can name a crash report, else `InvalidParams`: it becomes a ref and a file name."""
    if not isinstance(name, str) or not _NAME.match(name):
        raise InvalidParams(f"{str(name)[:200]!r} is no id of a crash report; `mothball crash-reports` lists them")
    return name


def build_artifact(*, report: Descriptor, config: Descriptor, subject: Descriptor, annotations: Mapping[str, str]) -> bytes:
    """The manifest of a crash report."""
    return canonical(
        {
            "schemaVersion": 2,
            "mediaType": MEDIA_MANIFEST,
            "artifactType": CRASH_TYPE,
            "config": msgspec.to_builtins(config),
            "layers": [msgspec.to_builtins(report)],
            "subject": msgspec.to_builtins(Descriptor(MEDIA_MANIFEST, subject.digest, subject.size)),
            "annotations": dict(annotations),
        }
    )


def publish_report(
    store: Store,
    workspace: str,
    *,
    id: str,  # noqa: A002  # what everybody calls it
    report: bytes,
    subject: Descriptor,
    annotations: Mapping[str, str],
    fence: int,
    job: str,
) -> str:
    """Store `report` as the crash report `id` about the capture `subject` of `workspace`; returns the manifest's digest.

    `annotations` (keys without ``dev.mothball.``) come on top of what the capture's own ref says: workspace, repo, path, files,
    bytes. Done twice it is the same; a report that was amended replaces the one of its id. Raises `InvalidParams`, `Oversize`,
    `NoSpace`, `LeaseLost`, `TransientFailure` when a collector took the capture meanwhile.
    """
    check_crash_name(id)
    if len(report) > REPORT_LIMIT:
        raise Oversize(what=f"crash report {id}", size=len(report), limit=REPORT_LIMIT)
    refs = store.refs(workspace)
    about = _said_of(refs.list(), subject.digest)
    own = {PREFIX + key: value for key, value in annotations.items()}
    config, _ = store.blobs.put(_EMPTY)
    layer, _ = store.blobs.put(report)
    manifest = build_artifact(
        report=Descriptor(REPORT_MEDIA, layer, len(report), {_TITLE: "report.json"}),
        config=Descriptor(MEDIA_EMPTY, config, len(_EMPTY)),
        subject=subject,
        annotations={PREFIX + "crash": id, PREFIX + "workspace": workspace},
    )
    digest, _ = store.blobs.put(manifest)
    refs.publish(id, digest, len(manifest), {**about, PREFIX + "workspace": workspace, **own}, fence=fence, job=job)
    return digest


def _said_of(refs: list[Ref], digest: str) -> dict[str, str]:
    """What the ref of the capture says; the latest first, for a snapshot's has a number and a label of its own."""
    mine = sorted((ref for ref in refs if ref.digest == digest), key=lambda ref: ref.name != LATEST)
    if not mine:
        return {}
    # The state of git names branches as somebody chose them: a report has it without secrets, in its own document.
    own = {REF_NAME, *(PREFIX + key for key in ("snapshot", "at", "label", "note", "keep", "snapshot-job", "git"))}
    return {key: value for key, value in mine[0].annotations.items() if key not in own}


def load_artifact(store: Store, digest: str) -> Manifest:
    """The manifest of the crash report `digest`; `InvalidParams` when it is something else, `Corrupt`."""
    manifest = load_manifest(store.blobs, digest)
    if manifest.artifact_type != CRASH_TYPE or len(manifest.layers) != 1 or manifest.layers[0].media_type != REPORT_MEDIA:
        raise InvalidParams(f"{digest} is not a crash report; `mothball crash-reports` lists them")
    return manifest


def load_report(store: Store, digest: str) -> bytes:
    """report.json of the crash report whose manifest is `digest`, verified. Raises `Corrupt`, `InvalidParams`, `Oversize`."""
    layer = load_artifact(store, digest).layers[0]
    if layer.size > REPORT_LIMIT:
        raise Oversize(what=f"crash report {digest}", size=layer.size, limit=REPORT_LIMIT)
    data = store.blobs.read(layer.digest, limit=REPORT_LIMIT)
    if len(data) != layer.size:
        raise Corrupt(what=f"blob {layer.digest}", reason=f"it has {len(data)} bytes, its manifest says {layer.size}")
    return data


def subject_of(store: Store, digest: str) -> Descriptor:
    """The manifest of the capture that the crash report `digest` is about. Raises `Corrupt`, `InvalidParams`."""
    manifest = load_artifact(store, digest)
    subject = wanted_subject(digest, manifest)
    if subject is None:
        raise Corrupt(what=f"crash report {digest}", reason="it names no capture as its subject", digest=digest)
    return subject


def forget_report(
    store: Store,
    workspace: str,
    id: str,  # noqa: A002
    *,
    reason: str,
    at_ms: int,
    fence: int | None = None,
    job: str = "",
) -> bool:
    """Take the crash report `id` out of the workspace's index into the trash; False when it is not there (any more).

    It can be undeleted for a while; its blobs go when a collection finds that nothing else names them. Raises `LeaseLost`,
    `NoSpace`, `Corrupt` for an index that cannot be read.
    """
    check_crash_name(id)
    refs = store.refs(workspace)
    gone: list[Ref] = []

    def change(before: list[Ref]) -> list[Ref]:
        gone[:] = [ref for ref in before if ref.name == id]
        for ref in gone:
            Trash(store).bury_ref(workspace, ref, reason, at_ms, job=job)
        return [ref for ref in before if ref.name != id]

    if not refs.exists:
        return False
    refs.replace(change, fence=fence, job=job)
    return bool(gone)


def note_keep(store: Store, workspace: str, id: str, *, keep: bool) -> bool:  # noqa: A002
    """Say in the ref of the crash report `id` that retention is to leave it alone, or that no more; True when that was new.

    The registry knows it first; what is said here outlives it. Raises `Corrupt`, `NoSpace`.
    """
    changed = False

    def change(before: list[Ref]) -> list[Ref]:
        nonlocal changed
        out: list[Ref] = []
        for ref in before:
            if ref.name == id and (ref.get("keep") == "1") != keep:
                said = {**ref.annotations, PREFIX + "keep": "1"} if keep else dict(ref.annotations)
                if not keep:
                    said.pop(PREFIX + "keep", None)
                out.append(msgspec.structs.replace(ref, annotations=said))
                changed = True
            else:
                out.append(ref)
        return out

    store.refs(workspace).replace(change)
    return changed


def find_report(store: Store, workspace: str, id: str) -> Ref:  # noqa: A002
    """The ref of the crash report `id`; `NotFound`."""
    ref = store.refs(workspace).find(check_crash_name(id))
    if ref is None:
        raise NotFound(f"workspace {workspace!r} has no crash report {id!r} on this host", what="crash report", id=id)
    return ref
