"""Fixtures of the purge's tests: one host, one workspace, real captures and real git repositories."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mothball.capture.types import CaptureOptions
from mothball.purge import Purge, Receipt, open_purge
from mothball.settings import Settings
from tests.unit.capture.harness import Yard, settle

NOW = 1_700_000_000_000


class PurgeYard(Yard):
    """A host on which the workspace ``ws`` can be captured and purged."""

    def __init__(self, base: Path, settings: Settings) -> None:
        super().__init__(base, settings)
        self.others: Sequence[tuple[str, str]] = ()
        self.options: dict[str, Any] = {}
        self.git_guard = True
        self.registration = "r1"

    @property
    def ws(self) -> Path:
        return self.root / "ws"

    @property
    def aside(self) -> Path:
        return self.root / ".ws.mothball-purge"

    def taken(self, **options: Any) -> None:
        """Capture ``ws`` with the options of this yard."""
        self.capture(options={**self.options, **options})

    @contextmanager
    def opened(self, report: Callable[[str, dict[str, Any]], None] = lambda _n, _d: None, **given: Any) -> Iterator[Purge]:
        values: dict[str, Any] = {
            "workspace": "ws",
            "registration": self.registration,
            "settings": self.settings,
            "options": CaptureOptions.merge(self.settings, self.options),
            "others": self.others,
            "git_guard": self.git_guard,
        }
        path = given.pop("path", str(self.ws))
        with open_purge(path, **{**values, **given}, report=report) as purge:
            yield purge

    def missing(self, **given: Any) -> list[str]:
        """What a purge would lose, as a person reads it."""
        with self.opened(**given) as purge:
            found = purge.examine(content=True, now_ms=lambda: NOW)
            assert found is not None
            return [str(gap) for gap in found.gaps]

    def purge(
        self, *, force: bool = False, decided: Callable[[Receipt], None] = lambda _: None, content: bool = False,
        between: Callable[[], None] = lambda: None, **given: Any,
    ) -> Receipt:  # fmt: skip
        """Examine, `between`, delete, and forget that it was done."""
        with self.opened(**given) as purge:
            known = purge.examine(content=content, now_ms=lambda: NOW)
            assert known is not None
            between()
            receipt = purge.run(known, force=force, decided=decided)
            purge.forget()
            return receipt


@pytest.fixture
def yard(tmp_path: Path, make_settings: Callable[..., Settings]) -> PurgeYard:
    roots = tmp_path / "roots"
    roots.mkdir()
    yard = PurgeYard(tmp_path, make_settings(workspace_roots=(roots,), frame_bytes=64 * 1024, fsync=False))
    (yard.folder() / "sub" / "deep").mkdir(parents=True)
    for name in ("a.txt", "sub/b.txt", "sub/deep/c.txt"):
        (yard.ws / name).write_text(f"{name}\n" * 20)
    os.symlink("a.txt", yard.ws / "link")
    settle(yard.ws)
    yard.taken()
    return yard


class Git:
    """git in a folder, as a user runs it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, *command: str) -> str:
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder.parent), "GIT_CONFIG_GLOBAL": "/dev/null"}
        for who in ("AUTHOR", "COMMITTER"):
            environment |= {f"GIT_{who}_NAME": "a", f"GIT_{who}_EMAIL": "a@example.org"}
        done = subprocess.run(
            ["git", "-c", "protocol.file.allow=always", "-c", "init.defaultBranch=main", *command],
            cwd=self.folder, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def commit(self, name: str = "f", text: str | None = None) -> str:
        path = self.folder / name
        path.write_text(text if text is not None else path.read_text() + "more\n" if path.exists() else "first\n")
        self("add", name)
        self("commit", "-q", "-m", f"about {name}")
        return self("rev-parse", "HEAD")


@pytest.fixture
def pushed(yard: PurgeYard) -> Git:
    """A clone in ``ws/repo`` all of whose commits are on its remote, which lies elsewhere."""
    remote = Git(yard.base / "remote.git")
    remote("init", "-q", "--bare")
    git = Git(yard.ws / "repo")
    git("init", "-q")
    git("remote", "add", "origin", str(remote.folder))
    git.commit()
    git("push", "-q", "-u", "origin", "main")
    return git
