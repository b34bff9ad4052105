"""The tree that the demo works on: a real copy of somebody's directory. The original is only ever read."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mothball.errors import InvalidParams, NoSpace, SourceMissing

SPACE_FACTOR = 3.5
"""The copy, its captures (once more in full by the killed worker) and the copy that is restored."""
SPACE_EXTRA_BYTES = 512 * 1024**2
EDITS = 3
SMALL_FILE_BYTES = 1024**2
OWN_FILE = "mothball-demo-{number}.txt"


@dataclass(frozen=True)
class Source:
    """One directory to copy; `below` is its place in the copy, empty for the root."""

    path: Path
    below: str = ""


@dataclass
class Copied:
    """What `copy_tree` did; sizes in bytes."""

    files: int = 0
    bytes: int = 0
    skipped: int = 0


def sources(path: Path | None) -> list[Source]:
    """`path`, or by default the project's checkout with its virtual environment, else the installed packages.

    Raises `SourceMissing` for a path that is no directory.
    """
    if path is not None:
        given = path.expanduser().absolute()
        if not given.is_dir():
            reason = "it is not a directory" if given.exists() else "it does not exist"
            raise SourceMissing(path=str(path), reason=reason)
        return [Source(given)]
    checkout = Path(__file__).resolve().parents[1]
    packages = Path(sysconfig.get_paths()["purelib"])
    if not ((checkout / "pyproject.toml").is_file() and (checkout / ".git").exists()):
        return [Source(packages)]
    environment = Path(sys.prefix) if sys.prefix != sys.base_prefix else packages
    inside = environment.resolve().is_relative_to(checkout)
    return [Source(checkout)] if inside else [Source(checkout), Source(environment, ".venv")]


def check_room(found: Sequence[Source], folder: Path) -> None:
    """Refuse before anything is written: a source that holds `folder` would be copied into itself, a full disk helps nobody."""
    for source in found:
        if folder.resolve().is_relative_to(source.path.resolve()):
            raise InvalidParams(
                f"{source.path} holds the temporary folder {tempfile.gettempdir()}; set TMPDIR to a place outside it"
            )
    needed = int(sum(_size(source.path) for source in found) * SPACE_FACTOR) + SPACE_EXTRA_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NoSpace(
            f"the demo needs about {needed // 1024**2} MiB in {tempfile.gettempdir()} and {free // 1024**2} MiB are free; "
            "set TMPDIR to a larger place, or name a smaller tree",
            path=str(folder),
        )


def _size(root: Path) -> int:
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(Path(folder, name)).st_size
    return total


def copy_tree(source: Path, target: Path, check: Callable[[], None]) -> Copied:
    """Copy a directory, file by file, with modes and times; `check` is called often and may raise to stop.

    Never a link between the two trees, so no edit can reach the original. Left out and counted: what cannot be read,
    sockets, FIFOs and devices (opening one could block for ever), and other file systems.
    """
    done = Copied()
    device = source.stat().st_dev
    folders = [(source, target)]
    finished: list[tuple[Path, Path]] = []
    while folders:
        here, there = folders.pop()
        there.mkdir(exist_ok=True)
        finished.append((here, there))
        try:
            entries = list(os.scandir(here))
        except OSError:
            done.skipped += 1
            continue
        for entry in entries:
            check()
            new = there / entry.name
            try:
                if entry.is_dir(follow_symlinks=False):
                    if entry.stat(follow_symlinks=False).st_dev == device:
                        folders.append((Path(entry.path), new))
                    else:
                        done.skipped += 1
                else:
                    _copy_one(entry, new, done)
            except OSError:
                done.skipped += 1
    # Last, and children first: a copied file changes its folder's time, and a read-only folder takes no more files.
    for here, there in reversed(finished):
        with contextlib.suppress(OSError):
            shutil.copystat(here, there)
    return done


def _copy_one(entry: os.DirEntry[str], new: Path, done: Copied) -> None:
    facts = entry.stat(follow_symlinks=False)
    if stat.S_ISLNK(facts.st_mode):
        new.symlink_to(Path(entry.path).readlink())
        with contextlib.suppress(OSError, NotImplementedError):
            os.utime(new, ns=(facts.st_atime_ns, facts.st_mtime_ns), follow_symlinks=False)
    elif stat.S_ISREG(facts.st_mode):
        shutil.copyfile(entry.path, new, follow_symlinks=False)
        shutil.copystat(entry.path, new, follow_symlinks=False)
        done.files += 1
        done.bytes += facts.st_size
    else:
        done.skipped += 1


def remove_tree(folder: Path) -> None:
    """Delete the demo's folder, also where it holds read-only folders."""

    def again(function: Callable[[str], object], name: str, _: object) -> None:
        with contextlib.suppress(OSError):
            Path(name).parent.chmod(0o700)
            if Path(name).is_dir() and not Path(name).is_symlink():
                Path(name).chmod(0o700)
            function(name)

    shutil.rmtree(folder, onerror=again)
    if folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def ensure_files(root: Path) -> int:
    """Give a very small tree the files that the demo edits; returns how many were added."""
    plain = sum(1 for path in root.iterdir() if path.is_file() and not path.is_symlink())
    added = 0
    while plain + added <= EDITS:
        (root / OWN_FILE.format(number=added + 1)).write_text(f"file {added + 1} of the demo\n" * 100)
        added += 1
    return added


def pick(root: Path, captured: Sequence[str], count: int) -> list[str]:
    """`count` small plain files out of `captured`, spread over the tree, always the same for the same tree; texts if possible."""
    good = []
    for name in captured:
        facts = (root / name).lstat()
        if stat.S_ISREG(facts.st_mode) and facts.st_nlink == 1 and 0 < facts.st_size <= SMALL_FILE_BYTES:
            good.append(name)
    texts = [name for name in good if _is_text(root / name)]
    good = texts if len(texts) >= count else good
    if len(good) < count:
        raise InvalidParams(f"the demo needs {count} plain files of at most 1 MiB in the tree; it captured {len(good)}")
    return [good[number * len(good) // count] for number in range(count)]


def _is_text(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b"\0" not in file.read(1024)
    except OSError:
        return False


def edit(path: Path, text: str) -> None:
    """Append a line; works on read-only files too."""
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(mode | 0o600)
    with path.open("ab") as file:
        file.write(f"\n{text}\n".encode())
    path.chmod(mode)


def write_noise(path: Path, size: int) -> None:
    """`size` bytes that no compressor makes smaller."""
    with path.open("wb") as file:
        for _ in range(size // 1024**2):
            file.write(os.urandom(1024**2))


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
