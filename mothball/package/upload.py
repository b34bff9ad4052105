"""Sending blobs to a registry: what is there is not sent, what was begun is continued.

A blob goes up in chunks where the registry takes chunks, so that a connection which breaks costs one chunk at most and
usually less: the registry says how far it came. The address of an upload is kept beside the store (it is a capability,
hence a file of the owner alone), so that the next run continues the upload of one that was killed.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Final, Literal, NoReturn
from urllib.parse import urlencode

import msgspec
import requests

from mothball.errors import Corrupt, OperationFailed, RegistryUnavailable
from mothball.package.distribution import TRIES, Distribution, whole
from mothball.package.wire import STALL_BYTES
from mothball.store.blobs import replace_file
from mothball.store.hashing import digest_of
from mothball.store.manifest import Descriptor

CHUNK: Final = 32 * 1024**2
"""Bytes of one request of a large blob, unless the registry asks for larger ones; blobs up to this size go in one."""
KEPT_SECONDS: Final = 86_400
"""How long the address of an interrupted upload is kept; registries forget it after some days at most."""
_RANGE: Final = re.compile(r"(?:bytes=)?0-([0-9]{1,18})\Z")
_NO_CHUNKS: Final = frozenset({400, 404, 405, 411, 413, 415, 501})
_OCTETS: Final = "application/octet-stream"
Kind = Literal["uploaded", "mounted", "skipped"]


class _Piece:
    """Bytes of an open file as the body of one request; every read is reported."""

    def __init__(self, file: FileIO, start: int, end: int, report: Callable[[int], None]) -> None:
        self._fd = file.fileno()
        self._place = start
        self._end = end
        self._report = report
        self._length = end - start

    def __len__(self) -> int:
        return self._length

    def read(self, count: int = -1) -> bytes:
        left = self._end - self._place
        data = os.pread(self._fd, left if count < 0 else min(count, left), self._place)
        self._place += len(data)
        self._report(self._place)
        return data


class _Session(msgspec.Struct, frozen=True):
    url: str


class _NoChunks(Exception):
    """This registry does not take a blob in several requests."""


class Upload:
    """Sends blobs to one repository; `bytes` counts what went over the wire and arrived."""

    def __init__(self, remote: Distribution, sessions: Path, temp: Path, report: Callable[[int], None]) -> None:
        """`sessions` is a folder for addresses of unfinished uploads, `temp` one on the same file system.

        `report` is called with the bytes of the current blob that are sent, often; what it raises ends the transfer.
        """
        self._remote = remote
        self._sessions = sessions
        self._temp = temp
        self._report = report
        self._chunk = CHUNK
        self._chunked = True
        self._place = 0
        self.bytes = 0

    def send(self, blob: Descriptor, file: FileIO, mount_from: list[str]) -> Kind:
        """Bring `blob`, open as `file`, into the repository. `mount_from`: repositories of the registry that may have it.

        `RegistryUnavailable`, `RegistryDenied`, or `Corrupt` when the file is not what its digest says.
        """
        remote = self._remote
        self._place = 0
        if remote.patiently(lambda: remote.has_blob(blob.digest, blob.size)):
            self._forget(blob)
            return "skipped"
        for repository in mount_from:
            if remote.patiently(lambda name=repository: self._mount(blob, name)):  # type: ignore[misc]
                return "mounted"
        try:
            self._upload(blob, file)
        except _NoChunks:
            self._chunked = False
            self._forget(blob)
            self._upload(blob, file)
        self._forget(blob)
        return "uploaded"

    def tick(self) -> None:
        """Report how far the current blob is."""
        self._report(self._place)

    def _sent(self, place: int) -> None:
        self._place = place
        self._report(place)

    def _mount(self, blob: Descriptor, repository: str) -> bool:
        """Ask the registry to take the blob from another of its repositories; it may begin an upload instead."""
        url = self._remote.url("blobs/uploads/") + "?" + urlencode({"mount": blob.digest, "from": repository})
        # A registry that denies access to that repository, or knows no mounting, means: send it.
        response = self._remote.request("POST", url, body=bytes, expected={201, 202, 400, 401, 403, 404, 405})
        response.close()
        if response.status_code == requests.codes.accepted:
            self._remember(blob, response.headers.get("Location", ""))
        return bool(response.status_code == requests.codes.created)

    # -- one blob ------------------------------------------------------------------------------------------------------

    def _upload(self, blob: Descriptor, file: FileIO) -> None:
        url, offset = self._continued(blob)
        resumed, failures, lost, farthest = offset > 0, 0, False, offset
        while True:
            try:
                if lost:
                    if self._remote.has_blob(blob.digest, blob.size):
                        return  # it had arrived; only the answer was lost
                    url, offset = self._status(url)
                    # A few bytes more are no progress: a registry that loses each part would be sent it for ever.
                    failures, lost = 0 if offset >= farthest + STALL_BYTES else failures, False
                    farthest = max(farthest, offset)
                if not url:
                    url, offset = self._begin(blob), 0
                if self._chunked and blob.size - offset > self._chunk:
                    url, offset = self._patch(url, blob, file, offset)
                    self._remember(blob, url)
                    failures, farthest = 0 if offset > farthest else failures, max(farthest, offset)
                elif self._finish(url, blob, file, offset):
                    return
                elif resumed:
                    # The registry has put together something else: what an earlier run left was not what it seemed.
                    url, offset, resumed = "", 0, False
                else:
                    self._blame(blob, file)
            except RegistryUnavailable as error:
                failures, lost = failures + 1, True
                if failures >= TRIES:
                    raise
                self._remote.pause(failures - 1, error)

    def _begin(self, blob: Descriptor) -> str:
        response = self._remote.request("POST", self._remote.url("blobs/uploads/"), body=bytes, expected={202})
        response.close()
        self._chunk = max(self._chunk, whole(response.headers.get("OCI-Chunk-Min-Length", "")) or 0)
        return self._remember(blob, response.headers.get("Location", ""))

    def _patch(self, url: str, blob: Descriptor, file: FileIO, start: int) -> tuple[str, int]:
        """Send one chunk; returns where to go on and from which byte."""
        end = min(start + self._chunk, blob.size)
        response = self._remote.request(
            "PATCH",
            url,
            headers={"Content-Type": _OCTETS, "Content-Range": f"{start}-{end - 1}"},
            body=lambda: _Piece(file, start, end, self._sent),
            expected={202, 416, *_NO_CHUNKS},
        )
        response.close()
        if response.status_code == requests.codes.accepted:
            told = _RANGE.match(response.headers.get("Range", ""))
            arrived = int(told[1]) + 1 if told else end
            if arrived <= start:
                raise RegistryUnavailable(registry=self._remote.registry, reason="it took nothing of a part of a blob")
            self.bytes += min(arrived, end) - start
            return self._remote.absolute(response.headers.get("Location", url)), min(arrived, end)
        if start == 0 and response.status_code in _NO_CHUNKS:
            raise _NoChunks
        raise RegistryUnavailable(registry=self._remote.registry, reason=f"it answers {response.status_code} to a part of a blob")

    def _finish(self, url: str, blob: Descriptor, file: FileIO, start: int) -> bool:
        """Send the rest and close the upload; False when the registry says that the whole has another digest."""
        target = url + ("&" if "?" in url else "?") + urlencode({"digest": blob.digest})
        headers = {"Content-Type": _OCTETS}
        if start and start < blob.size:
            headers["Content-Range"] = f"{start}-{blob.size - 1}"
        response = self._remote.request(
            "PUT",
            target,
            headers=headers,
            body=lambda: _Piece(file, start, blob.size, self._sent),
            expected={201, 204, 400, 404, 416},
        )
        response.close()
        if response.status_code in {requests.codes.not_found, requests.codes.requested_range_not_satisfiable}:
            raise RegistryUnavailable(registry=self._remote.registry, reason="it has forgotten an upload that was under way")
        if response.status_code == requests.codes.bad_request:
            return False
        self.bytes += blob.size - start
        return True

    def _status(self, url: str) -> tuple[str, int]:
        """Where an upload stands, ``("", 0)`` when it has to begin again."""
        if not url:
            return "", 0
        response = self._remote.request("GET", url, expected={200, 204, 400, 404, 405})
        response.close()
        told = _RANGE.match(response.headers.get("Range", ""))
        # "0-0" is what some say about one byte and about none; a new upload is cheaper than a wrong one.
        if response.status_code not in {requests.codes.ok, requests.codes.no_content} or told is None or told[1] == "0":
            return "", 0
        return self._remote.absolute(response.headers.get("Location", url)), int(told[1]) + 1

    def _blame(self, blob: Descriptor, file: FileIO) -> NoReturn:
        """The registry refuses the whole content: say whose fault it is."""
        found = digest_of(file.fileno(), seen=lambda _: self.tick())
        if found != blob.digest:
            reason = f"its content has the digest {found}; `mothball verify --repair-from` fetches it again"
            raise Corrupt(what=f"blob {blob.digest}", reason=reason, digest=blob.digest)
        raise OperationFailed(reason=f"registry {self._remote.registry} refuses blob {blob.digest}, which is what its digest says")

    # -- sessions ------------------------------------------------------------------------------------------------------

    def _session(self, blob: Descriptor) -> Path:
        name = f"{self._remote.registry}/{self._remote.repository}@{blob.digest}"
        return self._sessions / hashlib.sha256(name.encode()).hexdigest()[:40]

    def _continued(self, blob: Descriptor) -> tuple[str, int]:
        try:
            url = msgspec.json.decode(self._session(blob).read_bytes(), type=_Session).url
        except (OSError, msgspec.DecodeError):
            return "", 0
        remote = self._remote
        found = remote.patiently(lambda: self._status(remote.absolute(url)))
        return found if found[1] <= blob.size else ("", 0)

    def _remember(self, blob: Descriptor, location: str) -> str:
        url = self._remote.absolute(location)
        replace_file(self._session(blob), msgspec.json.encode(_Session(url)), self._temp, sync=False)
        return url

    def _forget(self, blob: Descriptor) -> None:
        self._session(blob).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove addresses that are too old to be of use."""
        for path in self._sessions.iterdir():
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                    path.unlink()
