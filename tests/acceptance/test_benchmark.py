"""The benchmarks run, leave what they are given alone, and write their figures."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support import require_tool

ROOT = Path(__file__).resolve().parents[2]


def fingerprint(tree: Path) -> str:
    state = hashlib.sha256()
    for path in sorted(tree.rglob("*")):
        info = path.lstat()
        state.update(f"{path}{info.st_mtime_ns}{info.st_mode}{info.st_size}".encode())
    return state.hexdigest()


def ran(name: str, place: Path, *options: str) -> dict[str, Any]:
    """What `benchmarks.<name>` writes; it leaves nothing else."""
    out, work = place / "out.json", place / "work"
    command = [sys.executable, "-m", f"benchmarks.{name}", *options, "--work", str(work), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(work.iterdir())
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def files_in(tree: Path, count: int) -> None:
    """Make so many small programs."""
    for number in range(count):
        folder = tree / f"d{number % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"f{number}.js").write_text(f"{number}\n" * 500)


def measured(name: str, files: int, place: Path, *options: str) -> dict[str, Any]:
    """What `benchmarks.<name>` writes of one round on a tree of so many files; the tree is as before, and nothing else is left."""
    for tool in ("restic", "borg", "zstd"):
        require_tool(tool)
    tree = place / "tree"
    files_in(tree, files)
    before = fingerprint(tree)
    found = ran(name, place, "--rounds", "1", *options, "--tree", str(tree))
    assert fingerprint(tree) == before
    assert set(found["medians"]) == {"mothball", "tar | zstd -1", "restic", "borg"}
    return found


def test_the_benchmark_measures_every_contender_and_leaves_the_tree_untouched(tmp_path: Path) -> None:
    found = measured("capture", 150, tmp_path, "--quick")
    for figures in found["medians"].values():
        assert figures["first_seconds"] > 0
        assert figures["first_stored"] > 0
        assert figures["read_ms"] > 0
    assert found["medians"]["mothball"]["unchanged_stored"] == 0
    assert 0 < found["medians"]["mothball"]["changed_stored"] < found["medians"]["mothball"]["first_stored"]


def test_the_benchmark_of_restores_measures_every_contender_and_all_the_rest(tmp_path: Path) -> None:
    found = measured("restore", 300, tmp_path)
    assert all(bar["value"] > 0 for bar in found["bars"])
    assert found["more"]["entries"] == 307
    assert 3 <= found["more"]["diff_changes"] <= 10  # one per cent of the files, and folders whose time moved


def test_the_benchmark_of_the_registry_sweeps_what_is_due_and_writes_the_curve(tmp_path: Path) -> None:
    found = ran("registry", tmp_path, "--records", "1200", "--small", "300", "--rounds", "1")
    assert [row["records"] for row in found["curve"]] == [1000, 1200]
    assert found["sizes"] == [300, 1200]
    assert all(value > 0 for row in found["curve"] for value in row.values())
    assert all(bar["value"] > 0 for bar in found["bars"])


def test_the_benchmark_of_pruning_removes_what_it_made_and_judges_it(tmp_path: Path) -> None:
    found = ran("prune", tmp_path, "--blobs", "300", "--large", "3000", "--rounds", "2")
    taken = {what: len(values) for what, values in found["samples"].items()}
    assert taken == {"prune": 2, "rm": 2, "back_ms": 2, "scan": 4, "find": 4}
    assert all(value > 0 for value in found["medians"].values())
    assert [bar["limit"] for bar in found["bars"]] == [50.0, 1.3, 3.0, 32.0]
    assert found["bars"][0]["met"]


def test_the_benchmark_of_crash_reports_files_both_kinds_and_judges_them(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    files_in(tree, 60)
    (tree / "d0" / "config.js").write_text('const password = "' + "Tr0ub4" + 'dor-Xq9v";\n')
    before = fingerprint(tree)
    found = ran("crash", tmp_path, "--rounds", "1", "--tree", str(tree))
    assert fingerprint(tree) == before
    assert all(value > 0 for value in found["medians"].values())
    assert found["medians"]["replaced"] == 1
    assert [(bar["limit"], bar["unit"]) for bar in found["bars"]] == [(2.5, "x"), (1.0, "s")]
    assert all(bar["value"] > 0 and bar["met"] is (bar["value"] <= bar["limit"]) for bar in found["bars"])
