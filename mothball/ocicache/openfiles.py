"""Which files processes have open, by device and inode: asked of /proc just before something goes."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

_FRESH_S: Final = 1.0
_OURS: Final = re.compile(r"[0-9a-f]{64}|blob-info-cache")
_MAX: Final = 1_000_000


class OpenFiles:
    """The open files of one device. Asked anew when the answer is older than a second; what others' processes have open is
    seen only by root, but for what they have locked. Where there is no /proc nothing is seen."""

    def __init__(self, device: int, paths: Sequence[str] = ()) -> None:
        """`paths`: folders of which every open file counts, whatever its name is; elsewhere only names of blobs do."""
        self._device = device
        self._paths = tuple(each + "/" for each in paths)
        self._at = float("-inf")
        self._found: set[int] = set()

    def __contains__(self, inode: int) -> bool:
        if time.monotonic() - self._at > _FRESH_S:
            self._found = self._look()
            self._at = time.monotonic()
        return inode in self._found

    def _look(self) -> set[int]:
        found: set[int] = set()
        own = str(os.getpid())
        with suppress(OSError), os.scandir("/proc") as processes:
            for process in processes:
                if process.name.isdecimal() and process.name != own:
                    self._of(f"/proc/{process.name}/fd", found)
                if len(found) > _MAX:
                    break
        self._locked(found)
        # Our own descriptors of the cache are those of this prune; another thread of this process may pull.
        self._of("/proc/self/fd", found)
        return found

    def _locked(self, found: set[int]) -> None:
        """What is locked is open: databases are. Also what other users' processes have locked is listed."""
        device = b"%02x:%02x:" % (os.major(self._device), os.minor(self._device))
        with suppress(OSError, ValueError), open("/proc/locks", "rb") as locks:  # noqa: PTH123 - /proc
            for line in locks:
                found.update(int(each[len(device) :]) for each in line.split() if each.startswith(device))

    def _of(self, folder: str, found: set[int]) -> None:
        try:
            names = os.listdir(folder)  # noqa: PTH208 - thousands of them
        except OSError:  # ended, or another user's
            return
        for name in names:
            with suppress(OSError):
                # The name first: to ask for the state of a file on a mount that hangs would hang here too.
                link = os.readlink(f"{folder}/{name}")  # noqa: PTH115 - thousands of them
                if not _OURS.search(link) and not link.startswith(self._paths):
                    continue
                seen = os.stat(f"{folder}/{name}")  # noqa: PTH116 - thousands of them
                if seen.st_dev == self._device and stat.S_ISREG(seen.st_mode):
                    found.add(seen.st_ino)
