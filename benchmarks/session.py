"""What the benchmarks beside other tools have in common: the tree they work on, the contenders that are there, and the end."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks import trees
from benchmarks.contenders import Contender
from benchmarks.measure import CommandFailed, count_files, size_of


class Session(NamedTuple):
    """A folder to work in, a copy of the tree there, the contenders that are installed, and the figures so far."""

    work: Path
    tree: Path
    kinds: list[type[Contender]]
    found: dict[str, Any]


@contextmanager
def session(
    options: argparse.Namespace, kinds: Sequence[type[Contender]], name: str, room: int, say: Callable[[str], None]
) -> Iterator[Session]:
    """Copy the tree that `options` name into a folder that goes with the session; it needs `room` times its bytes.

    Raises `CommandFailed` when that cannot be done; nothing is left then.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mothball-bench"
    source = options.tree.expanduser().resolve() if options.tree else trees.default_tree(cache, say)
    if not source.is_dir():
        raise CommandFailed(f"{source} is not a directory")
    size, files = size_of(source), count_files(source)
    place = options.work or cache
    place.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(place).free) < size * room:
        needed = f"{size * room / 1e9:.1f} GB"
        raise CommandFailed(f"{place} has {free / 1e9:.1f} GB free and {needed} are needed; choose another with --work")
    skipped = {kind.name: f"{', '.join(kind.missing())} is not installed (make system-deps)" for kind in kinds if kind.missing()}
    there = [kind for kind in kinds if kind.name not in skipped]
    found: dict[str, Any] = {
        **header(),
        "versions": {kind.name: kind.version() for kind in there},
        "tree": {"files": files, "bytes": size, "default": options.tree is None},
        "rounds": options.rounds,
        "skipped": skipped,
    }
    with tempfile.TemporaryDirectory(prefix=f"mothball-{name}-", dir=place) as folder:
        work = Path(folder)
        tree = work / "tree" / "workspace"
        say(f"copying {files} files, {size / 1e6:.0f} MB")
        trees.copy(source, tree)
        trees.settle()
        yield Session(work, tree, there, found)


def header() -> dict[str, Any]:
    """When and on what machine."""
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
    }


def finish(found: dict[str, Any], options: argparse.Namespace, console: Console) -> int:
    """Write the figures; the exit code: with --check 1 when a bar is missed, else 0."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    console.print(f"written: {options.out}")
    return 1 if options.check and any(bar["met"] is False for bar in found["bars"]) else 0
