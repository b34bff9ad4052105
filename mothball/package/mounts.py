"""Which repositories of a registry have which blobs, as far as this host knows: it pushed them there.

A registry copies a blob from one of its repositories to another without any transfer, when it is told from where. This is
a cache: losing it costs an upload, a wrong line costs one question.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from mothball.names import slug
from mothball.store.blobs import file_lock, replace_file

MAX_BLOBS: Final = 20_000
"""Most blobs remembered per registry; the oldest go first."""
_REPOSITORIES: Final = 3


class Mounts:
    """The repositories of one registry. `folder` holds a file per registry, `temp` is on the same file system."""

    def __init__(self, folder: Path, temp: Path, registry: str) -> None:
        self._folder = folder
        self._path = folder / f"{slug(registry)}.json"
        self._temp = temp

    def repositories(self, digest: str, *, but: str) -> list[str]:
        """Where `digest` was pushed to, the latest first, without `but`."""
        return [name for name in self._load().get(digest, []) if name != but]

    def note(self, repository: str, digests: list[str]) -> None:
        """Remember that `repository` has `digests`."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with file_lock(self._folder / "lock", "the list of pushed blobs"):
            known = self._load()
            for digest in digests:
                before = known.pop(digest, [])
                known[digest] = [repository, *(name for name in before if name != repository)][:_REPOSITORIES]
            for digest in list(known)[: max(0, len(known) - MAX_BLOBS)]:
                del known[digest]
            replace_file(self._path, msgspec.json.encode(known), self._temp, sync=False)

    def _load(self) -> dict[str, list[str]]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, list[str]])
        except (OSError, msgspec.DecodeError):
            return {}
