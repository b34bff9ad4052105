"""A cache in figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mothball.cache_fields import Cache
from mothball.errors import OperationFailed
from mothball.ocicache.types import LastUse, Tick, Usage


def usage(
    cache: Cache,
    *,
    data_dir: Path,
    roots: Sequence[Path] = (),
    host: str = "",
    unused_for_ms: int = 30 * 86_400_000,
    last_use: LastUse | None = None,
    tick: Tick | None = None,
) -> Usage:
    """Size, count, oldest, newest and unused of `cache`, whatever it is; nothing is written. Raises as `prune` does."""
    raise OperationFailed(reason=f"{cache.path!r}: measuring is not available in this build")
