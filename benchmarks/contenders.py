"""The tools measured side by side: each captures the same tree into a repository of its own."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import Cost, clean_environment, run, size_of

ROOT = Path(__file__).resolve().parents[1]


class Contender:
    """One tool. `folder` is its own; `needs` are the programs without which it is skipped."""

    name = ""
    needs: tuple[str, ...] = ()
    incremental = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repository = folder / "repository"
        folder.mkdir(parents=True)

    @classmethod
    def missing(cls) -> list[str]:
        """The programs that are not on this machine."""
        return [program for program in cls.needs if shutil.which(program) is None]

    @classmethod
    def version(cls) -> str:
        """What the tool calls itself."""
        argument = "version" if cls is Restic else "--version"
        done = subprocess.run([cls.needs[0], argument], capture_output=True, text=True, check=False)
        return done.stdout.strip().splitlines()[0] if done.stdout.strip() else cls.name

    def prepare(self) -> None:
        """Make the empty repository; not measured."""

    def capture(self, tree: Path, label: str) -> Cost:
        """Capture `tree`; its `seconds` are the wall time."""
        raise NotImplementedError

    def stored(self) -> int:
        """Bytes in the repository, without caches that may be deleted at any time."""
        return size_of(self.repository)

    def read_command(self, tree: Path, path: str) -> list[str]:
        """The command that writes one captured file to standard output."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """The environment of its commands."""
        return clean_environment()

    def read(self, tree: Path, path: str) -> Cost:
        """Read one file back; raises when it is not what the tree has."""
        cost = run(self.read_command(tree, path), env=self.environment())
        if cost.output != (tree / path).read_bytes():
            raise RuntimeError(f"{self.name} reads {path} back differently")
        return cost


class Tar(Contender):
    """``tar | zstd -1 -T0``: no increments, no index; the floor for reading and compressing everything."""

    name = "tar | zstd -1"
    needs = ("tar", "zstd")
    incremental = False

    def capture(self, tree: Path, label: str) -> Cost:
        self.repository.mkdir(exist_ok=True)
        out = shlex.quote(str(self.repository / f"{label}.tar.zst"))
        return run(["bash", "-o", "pipefail", "-c", f"tar -C {shlex.quote(str(tree))} -cf - . | zstd -q -1 -T0 -f -o {out}"])

    def read_command(self, tree: Path, path: str) -> list[str]:
        newest = max(self.repository.iterdir(), key=lambda item: item.stat().st_mtime)
        return ["bash", "-o", "pipefail", "-c", f"zstd -q -dc {shlex.quote(str(newest))} | tar -xO {shlex.quote('./' + path)}"]


class Restic(Contender):
    """restic with its defaults (encrypted, compression ``auto``)."""

    name = "restic"
    needs = ("restic",)

    def environment(self) -> dict[str, str]:
        places = {"RESTIC_REPOSITORY": str(self.repository), "RESTIC_CACHE_DIR": str(self.folder / "cache")}
        return clean_environment(**places, RESTIC_PASSWORD="benchmark")  # noqa: S106 - restic wants one; nothing is secret here

    def prepare(self) -> None:
        subprocess.run(["restic", "init", "-q"], env=self.environment(), check=True, stdout=subprocess.DEVNULL)

    def capture(self, tree: Path, label: str) -> Cost:
        return run(["restic", "backup", "-q", "--exclude", ".git", str(tree)], env=self.environment())

    def read_command(self, tree: Path, path: str) -> list[str]:
        return ["restic", "dump", "-q", "latest", str(tree / path)]


class Borg(Contender):
    """borg, not encrypted, with ``zstd,1`` (its default is lz4): what comes closest to a layer here."""

    name = "borg"
    needs = ("borg",)

    def environment(self) -> dict[str, str]:
        return clean_environment(
            BORG_REPO=str(self.repository), BORG_BASE_DIR=str(self.folder), BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK="yes",
            BORG_RELOCATED_REPO_ACCESS_IS_OK="yes",
        )  # fmt: skip

    def prepare(self) -> None:
        subprocess.run(["borg", "init", "-e", "none"], env=self.environment(), check=True, capture_output=True)

    def capture(self, tree: Path, label: str) -> Cost:
        command = ["borg", "create", "-C", "zstd,1", "--exclude", "*/.git", f"::{label}", str(tree)]
        return run(command, env=self.environment())

    def read_command(self, tree: Path, path: str) -> list[str]:
        command = ["borg", "list", "--short", "--last", "1"]
        listed = subprocess.run(command, env=self.environment(), capture_output=True, text=True, check=True)
        return ["borg", "extract", "--stdout", f"::{listed.stdout.strip()}", str(tree / path).lstrip("/")]


class Mothball(Contender):
    """Mothball: a process that calls `capture_workspace`, as a worker does."""

    name = "mothball"
    needs = ()

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fence = 0
        self.last: dict[str, Any] = {}
        self.last_digest = ""
        self.repository = folder / "store"
        self.process_seconds: list[float] = []

    @classmethod
    def version(cls) -> str:
        from mothball import __version__

        return f"mothball {__version__}"

    def action(self, action: str, **given: Any) -> tuple[dict[str, Any], Cost]:
        """One run of `benchmarks.child`: its answer and what the whole process cost."""
        given = {"data_dir": str(self.folder), "workspace": "bench/tree#1", **given}
        given["root"] = str(Path(given["path"]).parent)
        cost = run([sys.executable, "-m", "benchmarks.child", action, json.dumps(given)], cwd=ROOT)
        return json.loads(cost.output), cost

    def capture(self, tree: Path, label: str, **given: Any) -> Cost:
        """`seconds` is the call's wall time: a worker runs already. The whole process's is kept in `process_seconds`."""
        self.fence += 1
        self.last, cost = self.action("capture", path=str(tree), fence=self.fence, **given)
        self.process_seconds.append(cost.seconds)
        self.last_digest = self.last["result"]["digest"]
        return Cost(seconds=self.last["seconds"], peak=cost.peak, cpu=cost.cpu)

    def stored(self) -> int:
        store = self.folder / "store"
        return size_of(store / "blobs") + sum(size_of(layout) for layout in (store / "workspaces").iterdir())

    def cache(self) -> int:
        """Bytes of the stat indexes, which may be deleted at any time."""
        return size_of(self.folder / "store" / "cache")

    def read_many(self, tree: Path, count: int, seed: int) -> list[float]:
        """Milliseconds of `count` single-file reads, in process."""
        answer, _ = self.action("read", path=str(tree), count=count, seed=seed)
        return [float(value) for value in answer["ms"]]


ALL: tuple[type[Contender], ...] = (Mothball, Tar, Restic, Borg)
