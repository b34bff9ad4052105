"""Blobs: content under its sha256, written once, checked when read.

A blob appears under its name only when all its bytes are on disk: temp file, fsync, rename, fsync of the folder. Readers
therefore never meet half a blob, and a crash leaves at most a file in ``tmp/`` that `sweep_temp` removes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from io import FileIO
from pathlib import Path

from mothball.errors import Busy, Corrupt, InvalidParams, NoSpace
from mothball.store.below import FILE_FLAGS

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_FULL = {errno.ENOSPC, errno.EDQUOT}
LOCK_SECONDS = 10.0
"""Locks are held for a few file operations; a holder that keeps one longer is stopped or on a dead disk."""
_POLL_SECONDS = 0.003
"""How often a waiter looks: shorter than the pauses that a collector makes for those who wait for it."""
TEMP_GRACE_SECONDS = 60
"""A temp file younger than this is left alone: its writer may not have locked it yet."""
_FUTURE_SECONDS = 3600


def check_digest(digest: object) -> str:
    """`digest` when it has the form ``sha256:<64 hex>``, else `InvalidParams`; it is about to become a path."""
    if not isinstance(digest, str) or not _DIGEST.match(digest):
        raise InvalidParams(f"{digest!r} is not a sha256 digest")
    return digest


def is_digest(digest: object) -> bool:
    """True for what has the form ``sha256:<64 hex>``."""
    return isinstance(digest, str) and _DIGEST.match(digest) is not None


@contextmanager
def full_disk_is_no_space(path: Path) -> Iterator[None]:
    """Turn a full disk or quota into `NoSpace`, which says where."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise NoSpace(path=str(path)) from error
        raise


def sync_folder(path: Path) -> None:
    """Make renames inside `path` survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def file_lock(path: Path, what: str, *, exclusive: bool = True, wait: float = LOCK_SECONDS) -> Iterator[None]:
    """An flock on `path` (made when missing), among all processes of this host; raises `Busy` after `wait` seconds.

    What is locked when this returns is the file that has the name now: a layout may be taken away while somebody waits for it.
    """
    deadline = time.monotonic() + wait
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _flock(fd, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH, what, deadline)
            if _is(path, fd):
                yield
                return
        finally:
            os.close(fd)


def _flock(fd: int, kind: int, what: str, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise Busy(what=what, reason="another process holds its lock") from None
            time.sleep(_POLL_SECONDS)
        else:
            return


def _is(path: Path, fd: int) -> bool:
    """True when `fd` is the file that `path` names."""
    mine = os.fstat(fd)
    try:
        named = path.lstat()
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (named.st_dev, named.st_ino)


def replace_file(path: Path, data: bytes | bytearray, temp: Path, *, sync: bool = True) -> None:
    """Atomically give `path` the content `data`; `temp` is a folder on the same file system."""
    scratch = temp / f"file-{os.getpid()}-{secrets.token_hex(6)}"
    with full_disk_is_no_space(path):
        fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                fcntl.flock(fd, fcntl.LOCK_EX)  # tells `sweep_temp` that its writer lives, however slow the disk
                file.write(data)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            scratch.rename(path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
        if sync:
            sync_folder(path.parent)


def read_regular(path: Path) -> bytes:
    """All of a small file of the store's own. A FIFO in its place would hang the reader, and a link lead it out of the store.

    Raises `Corrupt` for what is no regular file, `FileNotFoundError`, `OSError`.
    """
    try:
        fd = os.open(path, FILE_FLAGS)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO}:
            raise Corrupt(what=str(path), reason="it is no regular file") from None
        raise
    with FileIO(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Corrupt(what=str(path), reason="it is no regular file")
        return file.readall()


class BlobWriter:
    """One blob on its way: `write`, then `commit`; leaving the ``with`` block without commit removes it."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._sha = hashlib.sha256()
        self.size = 0
        self._path = store.temp / f"blob-{os.getpid()}-{secrets.token_hex(6)}"
        with full_disk_is_no_space(self._path):
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`; raises `NoSpace` on a full disk."""
        self._sha.update(data)
        view = memoryview(data)
        with full_disk_is_no_space(self._path):
            while view:
                view = view[os.write(self._fd, view) :]
        self.size += len(data)

    def flush(self) -> None:
        """Start and finish writing what has arrived so far, so that `commit` has little left to wait for."""
        with full_disk_is_no_space(self._path):
            os.fdatasync(self._fd)

    def mark(self) -> tuple[object, int]:
        """A point to which `rewind` returns."""
        return self._sha.copy(), self.size

    def rewind(self, mark: tuple[object, int]) -> None:
        """Forget everything written after `mark`."""
        sha, self.size = mark
        self._sha = sha.copy()  # type: ignore[attr-defined]  # hashlib's object type has no public name before 3.12
        os.ftruncate(self._fd, self.size)
        os.lseek(self._fd, self.size, os.SEEK_SET)

    def commit(self) -> tuple[str, bool]:
        """Publish; returns (digest, True when the store did not have it yet)."""
        digest = f"sha256:{self._sha.hexdigest()}"
        target = self._store.path(digest)
        # A blob that is there already is replaced all the same: its bytes may have rotted, and these are known to be good.
        new = not target.exists()
        if self._store.fsync:
            self.flush()
        with full_disk_is_no_space(target), self._store.in_use():
            try:
                self._path.rename(target)
            except IsADirectoryError:
                reason = f"{target} is a folder; move it away and run this again"
                raise Corrupt(what=f"blob {digest}", reason=reason, digest=digest) from None
            if self._store.fsync:
                sync_folder(target.parent)
        os.close(self._fd)
        self._fd = -1
        return digest, new


class BlobStore:
    """``<root>/blobs/sha256``. `fsync` False is for benchmarks and tests only."""

    def __init__(self, root: Path, *, fsync: bool = True) -> None:
        self.root = root
        self.folder = root / "blobs" / "sha256"
        self.temp = root / "tmp"
        self.fsync = fsync
        self._lock = root / "lock"

    def prepare(self) -> None:
        """Make the folders; idempotent."""
        for folder in (self.root, self.root / "blobs", self.folder, self.temp):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        return self.folder / check_digest(digest)[7:]

    def exists(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def size(self, digest: str) -> int:
        """Bytes of the blob; raises `Corrupt` when it is missing."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            raise Corrupt(what=f"blob {digest}", reason="it is missing from the store") from None

    def open(self, digest: str) -> FileIO:
        """The blob for random reads. Content is not checked here: callers check what they read."""
        try:
            # A FIFO or a link in place of a blob must neither hang a reader nor lead it out of the store.
            fd = os.open(self.path(digest), FILE_FLAGS)
        except FileNotFoundError:
            raise Corrupt(what=f"blob {digest}", reason="it is missing from the store") from None
        except OSError as error:
            if error.errno in {errno.ELOOP, errno.ENXIO}:
                raise Corrupt(what=f"blob {digest}", reason="it is no regular file") from None
            raise
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise Corrupt(what=f"blob {digest}", reason="it is no regular file")
        return FileIO(fd, "rb")

    def read(self, digest: str, limit: int = 16 * 1024**2) -> bytes:
        """The whole blob, at most `limit` bytes, checked against its digest; raises `Corrupt`."""
        with self.open(digest) as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise Corrupt(what=f"blob {digest}", reason=f"it is larger than {limit} bytes")
        if hashlib.sha256(data).hexdigest() != digest[7:]:
            raise Corrupt(what=f"blob {digest}", reason="its content does not match its digest")
        return data

    def check(self, digest: str) -> int:
        """Re-hash a blob of any size from disk; returns its bytes, raises `Corrupt`."""
        with self.open(digest) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
        if found != digest[7:]:
            raise Corrupt(what=f"blob {digest}", reason=f"its content has the digest sha256:{found}")
        return size

    def reuse(self, digest: str, size: int) -> bool:
        """True when the blob is there with `size` bytes; its age is reset first, so that no collector takes it meanwhile."""
        with self.in_use():
            return self.touch(digest, size)

    def touch(self, digest: str, size: int) -> bool:
        """`reuse` for a caller that holds `in_use` already."""
        path = self.path(digest)
        try:
            os.utime(path)
            return path.stat().st_size == size
        except FileNotFoundError:
            return False

    def in_use(self) -> AbstractContextManager[None]:
        """Held by whoever makes a blob count: no collector takes anything away meanwhile. For a few file operations only.

        A collector decides by age and then renames; a blob touched or replaced between the two would be lost without this.
        """
        return file_lock(self._lock, "the store", exclusive=False)

    def collecting(self) -> AbstractContextManager[None]:
        """The other side of `in_use`: held by a collector while it looks at the age of a few blobs and moves them."""
        return file_lock(self._lock, "the store")

    def writer(self) -> BlobWriter:
        return BlobWriter(self)

    def put(self, data: bytes) -> tuple[str, bool]:
        """Store `data`; returns (digest, True when it is new)."""
        with self.writer() as writer:
            writer.write(data)
            return writer.commit()

    def sweep_temp(self) -> int:
        """Remove temp files whose writer is dead (nobody holds their lock); returns how many."""
        removed = 0
        for path in self.temp.iterdir():
            try:
                # Far in the future was a clock that was wrong: such a file would stay until that day comes.
                if -_FUTURE_SECONDS < time.time() - path.lstat().st_mtime < TEMP_GRACE_SECONDS:
                    continue
                fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
                removed += 1
            except BlockingIOError:
                pass
            finally:
                os.close(fd)
        return removed
