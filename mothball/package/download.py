"""Fetching blobs from a registry: continued where it was cut, published only when the digest is right.

The bytes arrive in a file of the store's ``tmp/`` named after the blob, so that a run whose process was killed leaves its
part to the next. Nobody sweeps it while somebody holds its lock, and the collector does once nobody comes back for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import requests

from mothball.errors import Cancelled, Corrupt, MothballError, NoSpace, RegistryUnavailable
from mothball.package.distribution import TRIES, Distribution
from mothball.package.wire import PIECE, STALL_BYTES
from mothball.store.blobs import BlobStore, BlobWriter, full_disk_is_no_space
from mothball.store.manifest import Descriptor

_RESTARTS = 2
"""How often a blob whose bytes came in whole and are wrong is fetched anew."""
_RANGE = re.compile(r"bytes ([0-9]{1,18})-")


class PartWriter(BlobWriter):
    """A `BlobWriter` that goes on with what an earlier run has left; what a run leaves behind depends on why it ended."""

    def __init__(self, store: BlobStore, digest: str, report: Callable[[int], None] = lambda _: None) -> None:
        """`report` is called with the bytes that were there, as they are read again."""
        path = store.temp / f"pull-{digest[7:]}"
        fd = _claim(path)
        if fd is None:  # another process fetches the same blob; both will be right, and one of them first
            super().__init__(store)
            return
        self._store = store
        self._path = path
        self._fd = fd
        self._sha = hashlib.sha256()
        self.size = 0
        try:
            while piece := os.read(fd, PIECE):
                self._sha.update(piece)
                self.size += len(piece)
                report(self.size)
        except BaseException:
            os.close(fd)
            raise

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        error = exc[1] if len(exc) > 1 else None
        # Only what may be continued stays: not after a cancel or a wrong answer, and never on a full disk.
        final = isinstance(error, MothballError) and not error.retryable
        if self._fd >= 0 and (error is None or final or isinstance(error, (Cancelled, NoSpace))):
            self._path.unlink(missing_ok=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def digest(self) -> str:
        """The digest of what has arrived so far."""
        return f"sha256:{self._sha.hexdigest()}"

    def restart(self) -> None:
        """Forget everything that has arrived."""
        self.rewind((hashlib.sha256(), 0))


def _claim(path: Path) -> int | None:
    """The file, locked by this process and still under its name; None when another process has it."""
    with full_disk_is_no_space(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:  # else a sweeper was quicker, and took the name away
            return fd
    except BlockingIOError:
        pass
    os.close(fd)
    return None


class Download:
    """Fetches blobs of one repository into one store; `bytes` counts what came over the wire."""

    def __init__(self, remote: Distribution, blobs: BlobStore, report: Callable[[int], None]) -> None:
        """`report` is called with the bytes of the current blob that are here, often; what it raises ends the transfer."""
        self._remote = remote
        self._blobs = blobs
        self._report = report
        self._place = 0
        self.bytes = 0

    def fetch(self, wanted: Descriptor) -> None:
        """Store the blob `wanted`.

        `RegistryUnavailable` when the registry does not answer any more, `Corrupt` when it has other bytes than the manifest
        says, or fewer, however often it is asked.
        """
        self._place = 0
        with PartWriter(self._blobs, wanted.digest, lambda size: self._report(min(size, wanted.size))) as part:
            if part.size > wanted.size:
                part.restart()
            for number in range(_RESTARTS):
                self._receive(part, wanted)
                if part.digest == wanted.digest:
                    break
                if number + 1 == _RESTARTS:
                    raise self._corrupt(wanted, "the registry sends other bytes than its digest says")
                part.restart()
            part.commit()

    def _receive(self, part: PartWriter, wanted: Descriptor) -> None:
        failures = 0
        while part.size < wanted.size:
            before = part.size
            try:
                self._stream(part, wanted)
                problem: MothballError = self._corrupt(wanted, f"the registry sends only {part.size} of {wanted.size} bytes")
            except RegistryUnavailable as error:
                problem = error
            if part.size >= wanted.size:
                return
            failures = 0 if part.size - before >= STALL_BYTES else failures + 1
            if failures >= TRIES:
                raise problem
            waits = (
                problem
                if isinstance(problem, RegistryUnavailable)
                else RegistryUnavailable(registry=self._remote.registry, reason="")
            )
            self._remote.pause(failures, waits)

    def _stream(self, part: PartWriter, wanted: Descriptor) -> None:
        """One request; returns when the registry has no more to say, whether or not that was all."""
        headers = {"Range": f"bytes={part.size}-"} if part.size else {}
        response = self._remote.request(
            "GET", self._remote.url(f"blobs/{wanted.digest}"), headers=headers, expected={200, 206, 404, 416}, stream=True
        )
        with response:
            status = response.status_code
            if status == requests.codes.not_found:
                raise self._corrupt(wanted, "the registry does not have it")
            if status == requests.codes.requested_range_not_satisfiable:
                part.restart()
                return
            told = _RANGE.match(response.headers.get("Content-Range", ""))
            if status != requests.codes.partial_content or told is None or int(told[1]) != part.size:
                # It does not do ranges, or another one than was asked for: the beginning comes again.
                if status == requests.codes.partial_content:
                    raise RegistryUnavailable(
                        registry=self._remote.registry, reason="it sends another part of a blob than was asked for"
                    )
                part.restart()
            for piece in self._remote.pieces(response):
                if part.size + len(piece) > wanted.size:
                    raise self._corrupt(wanted, f"the registry sends more than {wanted.size} bytes")
                part.write(piece)
                self.bytes += len(piece)
                self._place = part.size
                self._report(part.size)

    def tick(self) -> None:
        """Report how far the current blob is."""
        self._report(self._place)

    def _corrupt(self, wanted: Descriptor, reason: str) -> Corrupt:
        return Corrupt(what=f"blob {wanted.digest} of {self._remote.reference}", reason=reason, digest=wanted.digest)
