"""Other tools' pull caches on a host: what they are, what they hold, and what goes from them (rows N-01 to N-15).

`prune`, `verify`, `undelete` and `usage` take a declared `Cache` (`mothball.cache_fields`); which caches are declared, and who may
ask, is not decided here. A directory is only pruned while it looks like nothing but a pull cache.
"""

from mothball.ocicache.types import Found, Kind, Lease, Pressure, Problem, PruneResult, UndeleteResult, Usage, VerifyResult

__all__ = [
    "Found", "Kind", "Lease", "Pressure", "Problem", "PruneResult", "UndeleteResult", "Usage", "VerifyResult",
]  # fmt: skip
