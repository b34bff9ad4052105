"""The trees that are captured: a large one of real packages, changes to it, one huge file, clones of one repository."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import count_files, size_of

MIN_FILES = 60_000
MIN_BYTES = 400 * 1000**2
SETTLE_SECONDS = 3.5
"""A file as young as a capture's start is read again by every careful tool; measured trees are older than that."""
GIB = 1024**3
SEED = 20_261_121
CHANGED_SHARE = 0.01

# Well-known packages whose trees look like what agents work in: many small files, some large bundles.
NPM_PACKAGES = (
    "typescript@5.6.3", "next@15.0.3", "webpack@5.96.1", "@babel/preset-env@7.26.0", "date-fns@4.1.0",
    "lodash@4.17.21", "eslint@9.15.0", "jest@29.7.0", "three@0.170.0", "@mui/icons-material@6.1.7", "@mui/material@6.1.7",
    "rxjs@7.8.1", "@angular/core@19.0.0", "react-icons@5.3.0",
)  # fmt: skip

Say = Callable[[str], None]


def default_tree(cache: Path, say: Say) -> Path:
    """The default tree, built once below `cache`: at least 60 000 files and 400 MB."""
    tree = cache / "tree-2"
    marker = cache / "tree-2.complete"
    if marker.is_file() and tree.is_dir():
        return tree
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    say(f"building the default tree in {tree} (once)")
    if not _npm_tree(tree, say):
        say("npm is missing or failed: taking the installed Python packages")
        shutil.copytree(sysconfig.get_paths()["purelib"], tree / "site-packages", symlinks=True, dirs_exist_ok=True)
    _fill_up(tree)
    marker.write_text(json.dumps({"files": count_files(tree), "bytes": size_of(tree)}))
    return tree


def _npm_tree(tree: Path, say: Say) -> bool:
    if shutil.which("npm") is None:
        return False
    (tree / "package.json").write_text('{"name": "tree", "version": "1.0.0", "private": true}\n')
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock", "--legacy-peer-deps"]
    done = subprocess.run([*command, "--loglevel=error", *NPM_PACKAGES], cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        say(done.stderr.strip()[-500:])
        shutil.rmtree(tree / "node_modules", ignore_errors=True)
    return done.returncode == 0


def _fill_up(tree: Path) -> None:
    """Generated source-like files until the tree is large enough."""
    files, size = count_files(tree), size_of(tree)
    generator = random.Random(SEED)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz_", k=generator.randint(2, 11))) for _ in range(4000)]
    number = 0
    while files < MIN_FILES or size < MIN_BYTES:
        folder = tree / "generated" / f"package{number // 100:04}"
        folder.mkdir(parents=True, exist_ok=True)
        lines = int(generator.lognormvariate(4.5, 1.0)) + 1
        text = "".join(" ".join(generator.choices(words, k=generator.randint(3, 12))) + "\n" for _ in range(lines))
        (folder / f"module{number:06}.txt").write_text(text)
        files, size, number = files + 1, size + len(text), number + 1


def copy(source: Path, target: Path) -> None:
    """A copy with times, modes and links; the source is only read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    reflink = ["--reflink=auto"] if os.uname().sysname == "Linux" else []
    subprocess.run(["cp", "-a", *reflink, str(source), str(target)], check=True)


def settle(newest: float | None = None) -> None:
    """Wait until what was written just now (or at `newest`, Unix time) is older than `SETTLE_SECONDS`."""
    time.sleep(max(0.0, SETTLE_SECONDS - (time.time() - newest if newest is not None else 0.0)))


def warm(tree: Path) -> None:
    """Read everything once: every contender then finds the same page cache."""
    for top, _, names in os.walk(tree):
        for name in names:
            path = Path(top) / name
            if path.is_file() and not path.is_symlink():
                with path.open("rb", buffering=0) as file:
                    while file.read(1024**2):
                        pass


def change(tree: Path, seed: int) -> int:
    """Change about one per cent of the files, in content and size; returns how many."""
    files = sorted(
        Path(top) / name for top, _, names in os.walk(tree) for name in names if not (Path(top) / name).is_symlink()
    )  # fmt: skip
    chosen = random.Random(seed).sample(files, max(1, int(len(files) * CHANGED_SHARE)))
    for path in chosen:
        data = path.read_bytes()
        path.unlink()  # never through a hard link into somebody's original
        middle = len(data) // 2
        path.write_bytes(data[:middle] + f"/* changed {seed} */\n".encode() + data[middle:])
    return len(chosen)


def big_file(folder: Path, say: Say) -> Path:
    """A tree of one file of 4 GiB, or 1 GiB where the disk has no room; no holes, half of it incompressible."""
    free = shutil.disk_usage(folder).free
    size = 4 * GIB if free > 14 * GIB else GIB
    if size == GIB:
        say(f"only {free / GIB:.0f} GiB free: the large file has 1 GiB instead of 4")
    tree = folder / "one-big-file"
    tree.mkdir()
    block = bytearray(random.Random(SEED).randbytes(512 * 1024) + b"mothball " * (512 * 1024 // 9 + 1))[: 1024**2]
    with (tree / "image.bin").open("wb") as file:
        for number in range(size // len(block)):
            block[:8] = number.to_bytes(8, "big")
            file.write(block)
    return tree


def clones(source: Path, folder: Path, *, count: int = 10, files: int = 6000) -> list[Path]:
    """`count` real ``git clone``s of a repository made of about `files` files of `source`."""
    repository = folder / "repository"
    repository.mkdir(parents=True)
    taken = 0
    for top, _, names in os.walk(source):
        for name in sorted(names):
            path = Path(top) / name
            if path.is_symlink() or name.startswith(".git") or path.stat().st_size > 1024**2 or taken >= files:
                continue
            target = repository / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            taken += 1
        if taken >= files:
            break
    git = ["git", "-c", "user.name=bench", "-c", "user.email=bench@example.invalid", "-c", "init.defaultBranch=main"]
    git += ["-c", "core.excludesFile=", "-c", "commit.gpgSign=false"]
    subprocess.run([*git, "init", "-q", str(repository)], check=True)
    subprocess.run([*git, "-C", str(repository), "add", "-A", "-f"], check=True)
    subprocess.run([*git, "-C", str(repository), "commit", "-q", "-m", "everything"], check=True)
    out = []
    for number in range(count):
        target = folder / f"clone-{number}"
        subprocess.run([*git, "clone", "-q", "--no-hardlinks", str(repository), str(target)], check=True)
        out.append(target)
    return out
