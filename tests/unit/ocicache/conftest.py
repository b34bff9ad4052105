"""Fixtures of the pull caches' tests: real folders with real blobs, aged by their times."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mothball.cache_fields import Cache, CachePolicy
from mothball.ocicache import settle
from mothball.ocicache.prune import prune
from mothball.ocicache.types import PruneResult

DAY = 86_400
MS_DAY = DAY * 1000
OLD = CachePolicy(older_than=30 * MS_DAY, grace=0)
OLD_NOW = CachePolicy(older_than=30 * MS_DAY, grace=0, quarantine=0)
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


def disk(path: Path) -> int:
    """Disk bytes below a folder, each file once."""
    found = [each.lstat() for each in path.rglob("*") if not each.is_dir()]
    return sum({(each.st_dev, each.st_ino): each.st_blocks * 512 for each in found}.values())


def names(path: Path) -> set[str]:
    """What is in a folder."""
    return set(os.listdir(path))


def asides(folder: Path) -> list[str]:
    """The asides that lie in a folder."""
    return [each for each in os.listdir(folder) if "mothball-aside" in each]


class CacheYard:
    """One host's caches below a folder, and its data folder beside."""

    def __init__(self, base: Path) -> None:
        self.data_dir = base / "data"
        self.home = base / "caches"
        self.path = self.home / "oci"
        self.home.mkdir(parents=True)

    def blob(self, folder: Path, content: bytes, days: float = 0, *, name: str = "{}", lying: bool = False) -> Path:
        """A blob of `content` that was written and read last `days` ago."""
        folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(content + (b"!" if lying else b"")).hexdigest()
        path = folder / name.format(digest)
        path.write_bytes(content)
        self.age(path, days)
        return path

    @staticmethod
    def age(path: Path, days: float) -> None:
        """As if written and read `days` ago."""
        then = time.time() - days * DAY
        os.utime(path, (then, then))

    def flat(self, *days: float, size: int = 5000) -> list[Path]:
        """A flat cache with one blob for each age."""
        texts = [f"{number}".encode().ljust(size, b".") for number, _ in enumerate(days)]
        return [self.blob(self.path, text, age, name="sha256:{}") for text, age in zip(texts, days, strict=True)]

    def prune(self, policy: CachePolicy = OLD_NOW, **how: Any) -> PruneResult:
        """Prune the cache; `kind`, `layouts` and `path` are of its declaration."""
        layouts = tuple(map(str, how.pop("layouts", ())))
        cache = Cache(path=str(how.pop("path", self.path)), kind=how.pop("kind", None), layouts=layouts)
        return prune(cache, policy, data_dir=self.data_dir, **how)

    def cache(self, **said: Any) -> Cache:
        """The cache as it was declared."""
        return Cache(path=str(self.path), **said)

    # -- layouts -------------------------------------------------------------------------------------------------------

    def document(self, pool: Path, value: dict[str, Any], media: str, days: float = 100) -> dict[str, Any]:
        """Store a JSON document and return its descriptor."""
        data = json.dumps(value).encode()
        path = self.blob(pool, data, days)
        return {"mediaType": media, "digest": f"sha256:{path.name}", "size": len(data)}

    def layer(self, pool: Path, text: str, days: float = 100, media: str = LAYER) -> dict[str, Any]:
        """Store a layer and return its descriptor."""
        data = text.encode().ljust(4500, b"-")
        path = self.blob(pool, data, days)
        return {"mediaType": media, "digest": f"sha256:{path.name}", "size": len(data)}

    def image(self, pool: Path, text: str, days: float = 100, **more: Any) -> dict[str, Any]:
        """Store an image of one layer and return the descriptor of its manifest."""
        config = self.document(pool, {"config": text}, CONFIG, days)
        value = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [self.layer(pool, text, days)], **more}
        return self.document(pool, value, MANIFEST, days)

    @staticmethod
    def index(layout: Path, manifests: Sequence[dict[str, Any]], *, days: float = 1) -> None:
        """Write what makes a folder an OCI layout."""
        layout.mkdir(parents=True, exist_ok=True)
        (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": list(manifests)}))


@pytest.fixture(autouse=True)
def _no_rest(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full prunes do not rest after the exchange, but in tests marked ``usefixtures("rest")``: most have no pulls beside them."""
    if "rest" not in request.fixturenames:
        monkeypatch.setattr(settle, "REST_S", 0.0)


@pytest.fixture
def rest() -> None:
    """Full prunes rest as they do for everybody."""


@pytest.fixture
def yard(tmp_path: Path) -> CacheYard:
    return CacheYard(tmp_path)


@pytest.fixture
def states() -> Callable[[Path], dict[str, tuple[int, ...]]]:
    """Inode, size, and all times of everything below a folder, the folder too."""

    def look(folder: Path) -> dict[str, tuple[int, ...]]:
        found = {}
        for each in (folder, *folder.rglob("*")):
            seen = each.lstat()
            found[str(each)] = (seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_atime_ns)
        return found

    return look
