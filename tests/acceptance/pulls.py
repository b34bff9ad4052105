"""Real images in a real registry, and skopeo that pulls them into image caches again and again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support import require_tool

IMAGES = 16
LAYER_BYTES = 256 * 1024
GIVEN_BACK_S = 1.0
"""Within this, what an index names is back in the cache."""
SLOTS = 3
"""How many images a cache refers to at a time."""


def run(*argv: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    """A program to its end; its output is in the error when it fails."""
    done = subprocess.run(argv, env=env, capture_output=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{' '.join(argv)}:\n{done.stderr.decode(errors='replace')[-3000:]}"
    return done


def push_images(registry: str, folder: Path, count: int = IMAGES, layer: int = LAYER_BYTES) -> dict[str, str]:
    """Make images of a common layer and one of their own with umoci, push them with skopeo; name in the registry -> digest."""
    umoci, skopeo = require_tool("umoci"), require_tool("skopeo")
    folder.mkdir()
    layout, content = folder / "layout", folder / "content"
    run(umoci, "init", "--layout", str(layout))
    run(umoci, "new", "--image", f"{layout}:base")
    content.write_bytes(os.urandom(layer))
    run(umoci, "insert", "--rootless", "--image", f"{layout}:base", str(content), "/common")
    found = {}
    for number in range(count):
        content.write_bytes(os.urandom(layer))
        run(umoci, "insert", "--rootless", "--image", f"{layout}:base", "--tag", f"i{number}", str(content), "/own")
        name = f"{registry}/app:{number}"
        run(skopeo, "copy", "--dest-tls-verify=false", f"oci:{layout}:i{number}", f"docker://{name}")
        index = json.loads((layout / "index.json").read_bytes())
        [found[name]] = [
            each["digest"]
            for each in index["manifests"]
            if each["annotations"]["org.opencontainers.image.ref.name"] == f"i{number}"
        ]
    shutil.rmtree(folder)
    return found


def blobs_of(copied: Path) -> int:
    """Check a ``dir:`` copy of an image, blob by blob against its name; how many blobs it has."""
    manifest = json.loads((copied / "manifest.json").read_bytes())
    named = [manifest["config"], *manifest["layers"]]
    for each in named:
        data = (copied / each["digest"][7:]).read_bytes()
        assert f"sha256:{hashlib.sha256(data).hexdigest()}" == each["digest"]
    return len(named)


class Puller:
    """One cache that is pulled into, as a user does it: the newest `SLOTS` images are referred to, older ones are let go."""

    def __init__(self, images: dict[str, str], home: Path, work: Path | None = None) -> None:
        """`home`: where the cache is; `work`: where images are copied out to be looked at, and what skopeo notes for itself."""
        self.images = images
        self.home = home
        self.work = work or home
        self.prefix: tuple[str, ...] = ()
        """A command before every pull, such as one that takes a lease."""
        self.pulled = 0
        self.referred: dict[str, str] = {}
        """Reference in the cache -> digest of the image."""
        # The root's blob-info cache is a fixed folder of the machine; that of a user is below his data home.
        self.env = {**os.environ, "_CONTAINERS_ROOTLESS_UID": "1234", "XDG_DATA_HOME": str(self.work / "share")}
        self._skopeo = require_tool("skopeo")
        home.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)

    @property
    def blob_info(self) -> Path:
        """The folder where containers/image notes which blobs it saw where."""
        return self.work / "share/containers/cache"

    def pull_next(self) -> None:
        """Pull another image, and let go of what is too old; raises when the pull fails, or what came is not what was pulled."""
        names = sorted(self.images)
        name = names[self.pulled % len(names)]
        reference = self.pull(name, self.pulled)
        self.referred[reference] = self.images[name]
        self.check(reference)
        self.pulled += 1

    def pull(self, name: str, number: int) -> str:
        """Pull `name`; how the cache refers to it. To be overridden."""
        raise NotImplementedError

    def read_options(self) -> tuple[str, ...]:
        """What skopeo must be told to read out of the cache."""
        return ()

    def copy_in(self, name: str, target: str, *options: str) -> None:
        """One pull by skopeo."""
        run(*self.prefix, self._skopeo, "copy", "--src-tls-verify=false", *options, f"docker://{name}", target, env=self.env)

    def check(self, reference: str) -> None:
        """Copy an image out of the cache and compare the digests of its manifest and of every blob."""
        out = self.work / "out"
        # A pull that found a blob just before a prune took it names it in an index, and with its next look (0.05 s, a little more
        # on a busy machine) the prune gives it back. A reader who is quicker than that finds it missing, and tries again.
        deadline = time.monotonic() + GIVEN_BACK_S
        while True:
            shutil.rmtree(out, ignore_errors=True)
            try:
                run(self._skopeo, "copy", *self.read_options(), f"oci:{reference}", f"dir:{out}", env=self.env)
            except AssertionError as error:
                if "no such file or directory" not in str(error) or time.monotonic() >= deadline:
                    raise
                time.sleep(0.1)
            else:
                break
        manifest = (out / "manifest.json").read_bytes()
        assert f"sha256:{hashlib.sha256(manifest).hexdigest()}" == self.referred[reference]
        assert blobs_of(out) == 3  # the configuration, the common layer and its own


class LayoutPuller(Puller):
    """Into one OCI layout, each image under a tag of its own; umoci takes the oldest tags away."""

    @property
    def cache(self) -> Path:
        """The folder that is pruned."""
        return self.home / "layout"

    def pull(self, name: str, number: int) -> str:
        reference = f"{self.cache}:n{number}"
        self.copy_in(name, f"oci:{reference}")
        while len(self.referred) >= SLOTS:
            oldest = next(iter(self.referred))
            del self.referred[oldest]
            run(require_tool("umoci"), "rm", "--image", oldest)
        return reference


class SharedPuller(Puller):
    """Each image into a layout of its own, the blobs of all of them into one shared folder."""

    @property
    def cache(self) -> Path:
        """The folder that is pruned."""
        return self.home / "blobs"

    @property
    def layouts(self) -> Path:
        """Where the layouts are."""
        return self.home / "images"

    def read_options(self) -> tuple[str, ...]:
        return "--src-shared-blob-dir", str(self.cache)

    def pull(self, name: str, number: int) -> str:
        self.layouts.mkdir(exist_ok=True)
        layout = self.layouts / f"n{number}"
        self.copy_in(name, f"oci:{layout}:latest", "--dest-shared-blob-dir", str(self.cache))
        while len(self.referred) >= SLOTS:
            oldest = next(iter(self.referred))
            del self.referred[oldest]
            shutil.rmtree(oldest.rpartition(":")[0])
        return f"{layout}:latest"


class Loop:
    """Calls `work` again and again (or `times`) in a thread of its own until it is stopped or fails."""

    def __init__(self, work: Callable[[], None], times: int = 1_000_000) -> None:
        self._work = work
        self._times = times
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join(60)

    def check(self) -> bool:
        """True; raises what went wrong so far."""
        if self._error is not None:
            raise self._error
        return True

    def stop(self) -> None:
        """End after the one under way. Raises what went wrong."""
        self._over.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        self.check()

    def _run(self) -> None:
        for _ in range(self._times):
            if self._over.is_set():
                return
            try:
                self._work()
            except BaseException as error:
                self._error = error
                return
