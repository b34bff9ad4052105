"""Whether the entries of a cache hold what their names say (N-04)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mothball.cache_fields import Cache
from mothball.errors import OperationFailed
from mothball.ocicache.types import Leases, Tick, VerifyResult


def verify(
    cache: Cache,
    *,
    data_dir: Path,
    roots: Sequence[Path] = (),
    host: str = "",
    delete: bool = False,
    grace_ms: int = 600_000,
    leases: Leases | None = None,
    tick: Tick | None = None,
    wait_s: float = 0.0,
) -> VerifyResult:
    """Read every entry; with `delete`, remove those whose content does not match their name. Raises as `prune` does."""
    raise OperationFailed(reason=f"{cache.path!r}: verifying is not available in this build")
