"""Hashing many blobs from disk, on all cores: sha256 of one blob cannot be split, two blobs can be read side by side."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Final

from mothball.errors import Corrupt
from mothball.store.blobs import BlobStore

MAX_THREADS: Final = 8
"""More than this only makes the disk seek."""
PIECE: Final = 1024**2
POLL_SECONDS: Final = 0.2
"""The longest time between two calls of `progress`, however large a blob is."""


def rehash(blobs: BlobStore, digests: Iterable[str], progress: Callable[[int], None]) -> Iterator[tuple[str, Exception | None]]:
    """Every digest with what is wrong with its blob, `Corrupt` or `OSError`, in the order in which they are done.

    `progress` is called from this thread with the bytes read so far; what it raises ends the work. Blobs are read from disk, not
    from the page cache, which could show what the disk has lost.
    """
    work = _Work(blobs)
    waiting = iter(digests)
    threads = min(MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="rehash") as pool:
        try:
            running: dict[Future[None], str] = {}
            while True:
                for digest in islice(waiting, 2 * threads - len(running)):
                    running[pool.submit(work.check, digest)] = digest
                if not running:
                    return
                done, _ = wait(running, POLL_SECONDS, FIRST_COMPLETED)
                progress(work.bytes)
                for future in done:
                    digest, error = running.pop(future), future.exception()
                    if error is not None and not isinstance(error, (Corrupt, OSError)):
                        raise error
                    yield digest, error
        finally:
            work.stop.set()


class Checking:
    """Holds open blobs against their digests, in a thread that begins with `start`. Use as a context manager: leaving it ends that.

    They are read where their descriptors are, wherever those stand, and out of the page cache if they are there.
    """

    def __init__(self, blobs: Iterable[tuple[int, str]]) -> None:
        """`blobs` are (descriptor, digest)."""
        self._blobs = list(blobs)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="check-blobs")
        self._done: Future[None] | None = None

    def __enter__(self) -> Checking:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self) -> None:
        """Begin, if that was not done."""
        if self._done is None:
            self._done = self._pool.submit(self._check)

    def result(self) -> None:
        """Wait for the end. Raises `Corrupt` for the first blob that is not what its digest says."""
        self.start()
        if self._done is not None:
            self._done.result()

    def _check(self) -> None:
        for fd, digest in self._blobs:
            if (found := digest_of(fd, self._stop)) != digest:
                raise Corrupt(what=f"blob {digest}", reason=f"its content has the digest {found}", digest=digest)


class _Stopped(Exception):
    """Somebody ended the work."""


def digest_of(fd: int, stop: threading.Event | None = None, seen: Callable[[int], None] = lambda _: None) -> str:
    """The digest of an open file, wherever the descriptor stands; `seen` is told the size of each piece.

    `stop` ends it with an error of its own. Raises `OSError`.
    """
    sha, place = hashlib.sha256(), 0
    with memoryview(bytearray(PIECE)) as view:
        while count := os.preadv(fd, [view], place):
            sha.update(view[:count])
            seen(count)
            if stop is not None and stop.is_set():
                raise _Stopped
            place += count
    return f"sha256:{sha.hexdigest()}"


class _Work:
    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._lock = threading.Lock()
        self.bytes = 0
        self.stop = threading.Event()

    def check(self, digest: str) -> None:
        with self._blobs.open(digest) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found = digest_of(file.fileno(), self.stop, self._seen)
        if found != digest:
            raise Corrupt(what=f"blob {digest}", reason=f"its content has the digest {found}")

    def _seen(self, count: int) -> None:
        with self._lock:
            self.bytes += count
