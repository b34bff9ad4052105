"""Mothball: a worker fleet that captures, snapshots, packages, stops and reclaims workspaces.

``from mothball import Fleet`` is all that a producer needs; it is loaded on first use so that importing the package
stays cheap in programs that only want names or errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Fleet", "__version__"]

if TYPE_CHECKING:
    from mothball.client import Fleet


def __getattr__(name: str) -> Any:
    if name == "Fleet":
        from mothball.client import Fleet

        return Fleet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
