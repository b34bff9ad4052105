"""Damaged or missing blobs of a store, fetched again from a registry that a capture was pushed to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec

from mothball.errors import Cancelled, Corrupt, LeaseLost, MothballError, NotFound, RegistryDenied, RegistryUnavailable
from mothball.package.distribution import Distribution
from mothball.package.reference import parse_reference
from mothball.package.remote import fetch_blobs
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.blobs import check_digest
from mothball.store.manifest import MEDIA_MANIFEST, Descriptor

Progress = Callable[..., None]
_FATAL: Final = (RegistryDenied, RegistryUnavailable, Cancelled, LeaseLost)


class RepairResult(msgspec.Struct, frozen=True):
    """`repaired` digests are in the store again, whole; `failed` ones are as they were, each with the reason."""

    repaired: list[str]
    failed: list[tuple[str, str]]


def repair(
    store: Store, digests: Iterable[str], reference: str, settings: Settings, *, progress: Progress | None = None
) -> RepairResult:
    """Fetch the blobs `digests` (layers, configs, manifests) from the repository `reference` (``REGISTRY/REPO``).

    A blob is replaced in one step and only by bytes of its own digest; what cannot be had is reported, not raised. A registry
    that is down or refuses is `RegistryUnavailable` or `RegistryDenied`; what was repaired by then stays repaired.
    """
    place = parse_reference(reference, repository_only=True)
    wanted = list(dict.fromkeys(check_digest(digest) for digest in digests))
    store.prepare()
    repaired: list[str] = []
    failed: list[tuple[str, str]] = []
    with Distribution(place, settings) as remote:
        for number, digest in enumerate(wanted):
            report = _numbered(progress or (lambda **_: None), number, len(wanted))
            remote.tick = report
            try:
                _fetch(store, remote, digest, report)
                repaired.append(digest)
            except _FATAL:
                raise
            except MothballError as error:
                failed.append((digest, error.message))
    return RepairResult(repaired, failed)


def _numbered(progress: Progress, number: int, total: int) -> Progress:
    def report(**fields: Any) -> None:
        progress(**{**fields, "step": "repair", "blobs": number, "total_blobs": total})

    return report


def _fetch(store: Store, remote: Distribution, digest: str, report: Progress) -> None:
    """One blob, or one manifest, which registries keep apart. Its size is the registry's word, its digest the proof."""
    size = remote.patiently(lambda: remote.blob_size(digest))
    if size is not None:
        fetch_blobs(store, [Descriptor("application/octet-stream", digest, size)], remote, report)
        return
    try:
        data, _ = remote.patiently(lambda: remote.get_manifest(digest, MEDIA_MANIFEST))
    except NotFound:
        raise NotFound(f"{remote.reference} does not have it", what="blob", id=digest) from None
    if hashlib.sha256(data).hexdigest() != digest[7:]:
        raise Corrupt(what=f"manifest {digest} of {remote.reference}", reason="the registry sends other bytes than its digest says")
    store.blobs.put(data)
