"""Random trees with random histories: every generation is what was on disk then."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from mothball.settings import Settings
from mothball.store.verify import verify
from tests.unit.capture.harness import Facts, Yard, in_store, on_disk

GENERATIONS = 9
NAMES = ["a", "b", "b.txt", "B", "a-", "a.", "\udcff", "é", "x" * 120, "n\nl"]


class Gardener:
    """Edits a tree at random, every kind of edit that a person or a build makes."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.random = random.Random(seed)

    def folders(self) -> list[Path]:
        return [self.root, *(p for p in self.root.rglob("*") if p.is_dir() and not p.is_symlink())]

    def others(self) -> list[Path]:
        return [p for p in self.root.rglob("*") if p.is_symlink() or not p.is_dir()]

    def name(self) -> Path:
        return self.random.choice(self.folders()) / self.random.choice(NAMES)

    def clear(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.is_symlink() or path.exists():
            path.unlink()

    def edit(self) -> None:
        choose = self.random
        path = self.name()
        match choose.randrange(10):
            case 0 | 1 | 2:
                self.clear(path)
                path.write_bytes(choose.randbytes(choose.choice([0, 1, 600, 5_000, 90_000])))
            case 3:
                self.clear(path)
                path.mkdir()
            case 4:
                self.clear(path)
                path.symlink_to(choose.choice(["a", "../b", "/etc/passwd", "y" * 130]))
            case 5 if files := [p for p in self.others() if not p.is_symlink()]:
                source = choose.choice(files)
                if source != path and source not in path.parents:
                    self.clear(path)
                    if source.exists():
                        os.link(source, path)
            case 6 if found := self.others() + self.folders()[1:]:
                self.clear(choose.choice(found))
            case 7 if files := [p for p in self.others() if not p.is_symlink()]:
                choose.choice(files).chmod(choose.choice([0o644, 0o755, 0o600, 0o4755]))
            case 8 if files := [p for p in self.others() if not p.is_symlink()]:
                os.utime(choose.choice(files), ns=(0, choose.randrange(-(10**18), 2 * 10**18)))
            case 9 if found := self.others():
                source = choose.choice(found)
                if not (path.is_dir() and not path.is_symlink()):
                    source.rename(path)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    edits=st.lists(st.integers(0, 12), min_size=GENERATIONS, max_size=GENERATIONS),
    lost=st.booleans(),
)
def test_every_generation_is_what_was_on_disk(seed: int, edits: list[int], lost: bool) -> None:
    """Squashes included (three layers at most); `lost` deletes the stat index between captures."""
    with TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "roots").mkdir()
        yard = Yard(
            base,
            Settings(workspace_roots=(base / "roots",), data_dir=base / "data", frame_bytes=64 * 1024, fsync=False, max_layers=3),
        )
        gardener = Gardener(yard.folder(), seed)
        then: list[tuple[str, dict[str, Facts]]] = []
        for count in edits:
            for _ in range(count):
                gardener.edit()
            if lost:
                shutil.rmtree(yard.store.cache / "ws", ignore_errors=True)
            result = yard.capture()
            assert result.layers <= 3
            then.append((result.digest, on_disk(yard.root / "ws")))
        for digest, facts in then:
            assert in_store(yard.store, digest) == facts
        assert verify(yard.store, "ws", level="content").problems == []
