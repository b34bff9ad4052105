"""Reading a directory and writing it as an OCI image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mothball.capture.types import CaptureOptions, CaptureRequest, CaptureResult, Omission

__all__ = ["CaptureOptions", "CaptureRequest", "CaptureResult", "Omission", "capture_workspace"]

if TYPE_CHECKING:
    from mothball.capture.capture import capture_workspace


def __getattr__(name: str) -> Any:
    # Producers import the result type only; the machinery (zstandard) is loaded where captures run.
    if name == "capture_workspace":
        from mothball.capture.capture import capture_workspace

        return capture_workspace
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
