"""The interleaved rounds: every contender captures the same tree at the same stages, in changing order."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import trees
from benchmarks.contenders import Contender, Mothball, Tar
from benchmarks.measure import median

READS = 40
Say = Callable[[str], None]
Samples = dict[str, dict[str, list[float]]]


def run_rounds(kinds: list[type[Contender]], tree: Path, work: Path, rounds: int, say: Say) -> Samples:
    """Samples per contender and figure: seconds, bytes and milliseconds as the names say. `tree` is changed between rounds."""
    samples: Samples = {kind.name: {} for kind in kinds}
    for number in range(rounds):
        order = kinds[number % len(kinds) :] + kinds[: number % len(kinds)]
        tools = [kind(work / f"round-{number}" / kind.__name__.lower()) for kind in order]
        for tool in tools:
            tool.prepare()
        for stage in ("first", "unchanged", "changed"):
            if stage == "changed":
                count = trees.change(tree, trees.SEED + number)
                trees.settle()
                say(f"round {number + 1}: {count} files changed")
            for tool in tools:
                # Borg tells the kernel to forget what it read, and every tool leaves unwritten pages behind: without these
                # two lines a contender is measured by who ran before it.
                os.sync()
                trees.warm(tree)
                _one(tool, tree, stage, samples[tool.name], say, number)
        for tool in tools:
            _read(tool, tree, samples[tool.name], number)
        shutil.rmtree(work / f"round-{number}")
    return samples


def _one(tool: Contender, tree: Path, stage: str, into: dict[str, list[float]], say: Say, number: int) -> None:
    before = tool.stored() if stage != "first" else 0
    cost = tool.capture(tree, stage)
    after = tool.stored()
    into.setdefault(f"{stage}_seconds", []).append(cost.seconds)
    into.setdefault(f"{stage}_peak", []).append(cost.peak)
    into.setdefault(f"{stage}_stored", []).append(after - before)
    if isinstance(tool, Mothball):
        into.setdefault(f"{stage}_process_seconds", []).append(tool.process_seconds[-1])
        into.setdefault(f"{stage}_cache_bytes", []).append(tool.cache())
        if (expected := stage != "unchanged") != tool.last["result"]["changed"]:
            raise RuntimeError(f"mothball, {stage}: changed should be {expected}")
    say(f"round {number + 1}: {tool.name:14} {stage:10} {cost.seconds:7.2f} s  peak {cost.peak / 1e6:6.0f} MB")


def _read(tool: Contender, tree: Path, into: dict[str, list[float]], number: int) -> None:
    """One file read back: by command for everyone, in process for Mothball."""
    if isinstance(tool, Mothball):
        into.setdefault("read_ms", []).extend(tool.read_many(tree, READS, trees.SEED + number))
        return
    files = sorted(path for path in tree.rglob("*.js*") if path.is_file() and not path.is_symlink()) or sorted(
        path for path in tree.rglob("*") if path.is_file() and not path.is_symlink()
    )
    chosen = random.Random(trees.SEED + number).choice(files)
    into.setdefault("read_ms", []).append(tool.read(tree, str(chosen.relative_to(tree))).seconds * 1000)


def clone_ratios(kinds: list[type[Contender]], clones: list[Path], work: Path, say: Say) -> dict[str, dict[str, float]]:
    """Bytes stored for one and for all `clones` of one repository, and their ratio."""
    out: dict[str, dict[str, float]] = {}
    for kind in kinds:
        if issubclass(kind, Tar):
            continue
        tool = kind(work / f"clones-{kind.__name__.lower()}")
        tool.prepare()
        sizes = []
        for number, clone in enumerate(clones):
            if isinstance(tool, Mothball):
                given: dict[str, Any] = {"workspace": f"bench/repo#{number}", "repo": "bench/repo"}
                if number:
                    given["parent"] = f"bench/repo#{number - 1}"
                tool.fence = 0
                tool.capture(clone, f"clone-{number}", **given)
            else:
                tool.capture(clone, f"clone-{number}")
            sizes.append(tool.stored())
        out[tool.name] = {"one": sizes[0], "all": sizes[-1], "ratio": sizes[-1] / sizes[0]}
        say(f"{len(clones)} clones: {tool.name:14} {sizes[-1] / sizes[0]:.3f} x one")
        shutil.rmtree(tool.folder)
    return out


def big_file_peaks(kinds: list[type[Contender]], tree: Path, work: Path, say: Say) -> dict[str, dict[str, float]]:
    """Peak memory and seconds of a first capture of a tree with one huge file, per contender."""
    out: dict[str, dict[str, float]] = {}
    for kind in kinds:
        tool = kind(work / f"big-{kind.__name__.lower()}")
        tool.prepare()
        cost = tool.capture(tree, "big")
        out[tool.name] = {"seconds": cost.seconds, "peak": cost.peak}
        say(f"one large file: {tool.name:14} {cost.seconds:7.2f} s  peak {cost.peak / 1e6:6.0f} MB")
        shutil.rmtree(tool.folder)
    return out


def medians(samples: Samples) -> dict[str, dict[str, float]]:
    """The median of every figure."""
    return {name: {figure: median(values) for figure, values in figures.items()} for name, figures in samples.items()}
