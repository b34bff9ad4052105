"""Pruning one cache: the whole way of a request, from the name of a directory to the figures of what went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mothball.cache_fields import Cache, CachePolicy
from mothball.errors import OperationFailed
from mothball.ocicache.types import LastUse, Leases, Pressure, PruneResult, Tick


def prune(
    cache: Cache,
    policy: CachePolicy,
    *,
    data_dir: Path,
    roots: Sequence[Path] = (),
    host: str = "",
    dry_run: bool = False,
    everything: bool = False,
    pressure: Pressure | None = None,
    last_use: LastUse | None = None,
    leases: Leases | None = None,
    tick: Tick | None = None,
    wait_s: float = 0.0,
) -> PruneResult:
    """Remove from `cache` what `policy` says, or `everything`, and say what went and what stayed.

    `data_dir` and the workspace `roots` are never pruned, and the lock of the cache lies below `data_dir`; `wait_s`: how long to
    wait for another process that prunes it. `pressure`: only when the disk is fuller than its high mark, until its low mark.

    A missing directory is all zeros (N-08). Raises `PathNotAllowed` (no place for a cache, a link on the way), `InvalidParams`
    (not a directory, ``unrecognised``), `Busy` (leased, pruned by another process), `Corrupt` (an index that cannot be read),
    `OperationFailed`; nothing was changed then.
    """
    raise OperationFailed(reason=f"{cache.path!r}: pruning is not available in this build")
