"""Bringing back what a prune moved into quarantine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mothball.cache_fields import Cache
from mothball.errors import OperationFailed
from mothball.ocicache.types import Tick, UndeleteResult


def undelete(
    cache: Cache,
    *,
    data_dir: Path,
    roots: Sequence[Path] = (),
    host: str = "",
    digests: Sequence[str] = (),
    tick: Tick | None = None,
    wait_s: float = 0.0,
) -> UndeleteResult:
    """Move back what is in quarantine, all of it or `digests`; never over what was pulled again. Raises as `prune` does."""
    raise OperationFailed(reason=f"{cache.path!r}: undelete is not available in this build")
