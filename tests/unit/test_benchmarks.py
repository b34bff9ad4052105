"""The benchmark measures what it says and judges by the figures of its bars."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, trees
from benchmarks.measure import CommandFailed, median, run, size_of


def found(**changes: Any) -> dict[str, Any]:
    ours = {"first_seconds": 5.0, "unchanged_seconds": 1.0, "first_peak": 150e6, "changed_peak": 160e6, "read_ms": 6.0}
    other = {"first_seconds": 10.0, "unchanged_seconds": 5.0}
    figures = {"mothball": ours, "restic": other, "borg": {**other, "first_seconds": 20.0}, "tar | zstd -1": {"first_seconds": 4.0}}
    return {"medians": figures, "clones": {"mothball": {"ratio": 1.1}}, "fleet": {"overhead_ms": 15.0}, **changes}


def verdicts(given: dict[str, Any]) -> dict[str, bool | None]:
    return {bar["bar"]: bar["met"] for bar in report.bars(given)}


def test_a_figure_at_its_limit_meets_the_bar_and_one_above_misses_it() -> None:
    assert verdicts(found())["first capture / restic"] is True
    assert verdicts(found())["queue and registry work of a job"] is True
    assert verdicts(found(fleet={"overhead_ms": 15.1}))["queue and registry work of a job"] is False


def test_the_peak_is_the_largest_of_all_stages_and_of_the_fleet() -> None:
    assert verdicts(found())["peak memory of the worker, this tree"] is True
    assert verdicts(found(fleet={"tree_peak": 201e6}))["peak memory of the worker, this tree"] is False


def test_a_missing_contender_or_figure_is_not_measured_and_never_counts_as_met() -> None:
    given = found()
    del given["medians"]["restic"]
    assert verdicts(given)["first capture / restic"] is None
    assert verdicts(given)["first capture / borg"] is True
    assert verdicts(given)["import mothball"] is None


def test_run_measures_the_command_and_not_this_process() -> None:
    size = 60_000_000
    ballast = bytearray(b"x" * 200_000_000)  # in this process: must not appear in the child's peak
    small = run([sys.executable, "-I", "-S", "-c", "pass"])
    large = run([sys.executable, "-I", "-S", "-c", f"x = bytearray(b'x' * {size})"])
    assert len(ballast) > size
    assert small.peak < 50_000_000
    assert large.peak - small.peak > size * 0.9
    assert 0 < small.seconds < 5


def test_run_reports_a_failed_command_with_its_error_output() -> None:
    with pytest.raises(CommandFailed, match=r"ended with 3: .*no such thing"):
        run([sys.executable, "-c", "import sys; sys.stderr.write('no such thing'); sys.exit(3)"])


def test_change_touches_one_per_cent_and_never_the_original_of_a_hard_link(tmp_path: Path) -> None:
    original = tmp_path / "original"
    original.write_text("kept")
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(200):
        (tree / f"f{number}").write_text("content\n")
    (tree / "link").symlink_to(original)
    for number in range(200):
        os.link(original, tree / f"h{number}")
    before = {path: path.read_bytes() for path in tree.iterdir()}
    assert trees.change(tree, 7) == 4
    after = {path: path.read_bytes() for path in tree.iterdir()}
    assert sum(before[path] != after[path] for path in before) == 4
    assert original.read_text() == "kept"


def test_size_counts_a_hard_linked_file_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 1000)
    os.link(tmp_path / "a", tmp_path / "b")
    assert size_of(tmp_path) == 1000


def test_the_median_of_nothing_is_not_a_number() -> None:
    assert median([]) != median([])
    assert median([3, 1, 2]) == 2
