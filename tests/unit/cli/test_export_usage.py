"""`mothball export` and `pull`: what contradicts itself is refused before anything is opened."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import Answer

Cli = Callable[..., Answer]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([], "exactly one of --tar"),
        (["--tar", "x", "--oci", "y"], "exactly one of --tar"),
        (["--push", "repo:1"], "does not name a registry"),
        (["--push", "user:secret@r.io/a:1"], "those stand in docker's config file"),
        (["--push", "r.io/a:1", "--gzip"], "--gzip, --zstd and --name are not"),
        (["--tar", "x", "--name", "y"], "--name is for --oci"),
        (["--tar", "x", "--zstd", "--gzip"], "not with --gzip"),
        (["--oci", "x", "--zstd"], "--zstd is for --tar"),
        (["--oci", "x", "--no-wait"], "are for --push"),
        (["--tar", "-", "--json"], "stdout is the tar"),
    ],
)
def test_contradictory_exports_are_usage_errors(
    cli: Cli, argv: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("export", "r/a#1", *argv)
    assert (done.code, done.out) == (2, "")
    assert reason in done.err
    assert "secret" not in done.err
    assert os.listdir(tmp_path) == []


def test_a_pull_of_no_reference_is_a_usage_error(cli: Cli) -> None:
    done = cli("pull", "r/a#1", "repo:1")
    assert done.code == 2
    assert "does not name a registry" in done.err
