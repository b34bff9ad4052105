"""The way of blobs into the trash: one folder per collection, and a file that says how much is in it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

import msgspec

from mothball.errors import MothballError, NoSpace
from mothball.store import Store
from mothball.store.blobs import read_regular, replace_file, sync_folder
from mothball.store.foreign import read_json
from mothball.store.trash import Trash

TOTAL: Final = "total"
"""File of a run's folder, written when the run is over: without it (after a kill) every blob is looked at again."""


class Total(msgspec.Struct, frozen=True):
    """How many blobs a run moved, and their bytes."""

    blobs: int
    bytes: int


def read_total(folder: Path) -> Total | None:
    """What a run wrote down; None when it was killed."""
    with suppress(OSError, MothballError):
        return read_json(read_regular(folder / TOTAL), Total, TOTAL)
    return None


class Mover:
    """Moves blobs into one folder of the trash, which is made with the first of them."""

    def __init__(self, store: Store, run: int) -> None:
        """`run` names the folder: ms of this host's clock."""
        self._store = store
        self._folder = Trash(store).free_run(run)
        self._target = -1
        self._moved = self._bytes = 0
        self.source = os.open(store.blobs.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def move(self, name: str, size: int) -> None:
        """One rename; the caller holds the store's lock and has just seen that the blob is old."""
        if self._target < 0:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._target = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        os.rename(name, name, src_dir_fd=self.source, dst_dir_fd=self._target)
        self._moved += 1
        self._bytes += size

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self._target >= 0 and kind is None:
                data = msgspec.json.encode(Total(self._moved, self._bytes))
                with suppress(NoSpace):  # it only saves time
                    replace_file(self._folder / TOTAL, data, self._store.blobs.temp, sync=False)
            if self._target >= 0 and self._store.fsync:
                # The new names first: a power cut may leave a blob in both folders, but in one at least.
                os.fsync(self._target)
                sync_folder(self._folder.parent)
                os.fsync(self.source)
        finally:
            for fd in (self._target, self.source):
                if fd >= 0:
                    os.close(fd)
