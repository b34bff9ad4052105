"""Foreign images for tests, put together by hand as other tools write them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import zstandard

ARCH = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
PACKS: dict[str, Callable[[bytes], bytes]] = {"": bytes, "+gzip": gzip.compress, "+zstd": zstandard.compress}

Part = tuple[str, str, Any]
"""(kind of `TarInfo`: file, dir, link, hard, char; name; content or target)"""
_TYPES = {
    "file": tarfile.REGTYPE,
    "dir": tarfile.DIRTYPE,
    "link": tarfile.SYMTYPE,
    "hard": tarfile.LNKTYPE,
    "char": tarfile.CHRTYPE,
}


def tar_of(parts: Sequence[Part], *, modes: dict[str, int] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for kind, name, value in parts:
            info = tarfile.TarInfo(name)
            info.type, info.mtime = _TYPES[kind], 1_600_000_000
            info.mode = (modes or {}).get(name, 0o755 if kind == "dir" else 0o644)
            content = b""
            if kind == "file":
                content = value if isinstance(value, bytes) else value.encode()
                info.size = len(content)
            elif kind in {"link", "hard"}:
                info.linkname = value
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


class Layout:
    """An image layout in `folder`, one image at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "blobs" / "sha256").mkdir(parents=True)
        (folder / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')

    def blob(self, data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (self.folder / "blobs" / "sha256" / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    def image(
        self,
        *layers: bytes,
        pack: str = "+gzip",
        config: dict[str, Any] | None = None,
        tag: str = "t",
        arch: str = ARCH,
        layer_type: str = "",
        manifest_type: str = MANIFEST,
        diff_ids: list[str] | None = None,
    ) -> dict[str, Any]:
        """Write an image of `layers` (tars) and make it the only one of the index; returns its descriptor."""
        ids = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
        document = {
            "architecture": arch, "os": "linux", "config": config or {},
            "rootfs": {"type": "layers", "diff_ids": ids if diff_ids is None else diff_ids},
        }  # fmt: skip
        manifest = {
            "schemaVersion": 2,
            "mediaType": manifest_type,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **self.blob(json.dumps(document).encode())},
            "layers": [{"mediaType": layer_type or LAYER + pack, **self.blob(PACKS[pack](layer))} for layer in layers],
        }
        made = {"mediaType": manifest_type, **self.blob(json.dumps(manifest).encode())}
        self.index([{**made, "annotations": {"org.opencontainers.image.ref.name": tag}}])
        return made

    def index(self, manifests: list[dict[str, Any]]) -> None:
        (self.folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}))

    def archive(self, path: Path) -> Path:
        """The layout as one tar."""
        with tarfile.open(path, "w") as tar:
            tar.add(self.folder, arcname=".")
        return path
