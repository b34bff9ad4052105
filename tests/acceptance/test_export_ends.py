"""`mothball export` that is told to end takes what it had begun with it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.command import Command
from tests.support import eventually
from tests.unit.store.build import Dir, File, capture, layer, new_store


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    """Commands over a store with a capture that takes a while to export; there is no Redis."""
    store = new_store(tmp_path / "data" / "store")
    capture(store, layer({b"": Dir(), b"f": File(os.urandom(24 * 1024**2))}, frame_bytes=1024**2), workspace="w")
    run = Command(
        tmp_path, data_dir=tmp_path / "data", redis_url="redis://127.0.0.1:1", namespace="t", host="h1", workspace_roots=tmp_path
    )
    yield run
    run.kill_all()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("options", [["--tar"], ["--oci"], ["--oci-archive", "--gzip"]], ids=" ".join)
def test_an_export_that_is_told_to_end_leaves_nothing(
    command: Command, tmp_path: Path, number: signal.Signals, options: list[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    argv = ["export", "w", "latest", options[0], str(out / "x"), *options[1:]]
    process = command.start(*argv, log=tmp_path / "log")
    while not list(out.iterdir()):
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.0005)
    process.send_signal(signal.SIGSTOP)
    if (out / "x").exists():
        pytest.skip("it was done before it could be stopped")
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    eventually(lambda: process.poll() is not None, seconds=30, what="the end of the export")
    assert process.returncode == 128 + number
    assert list(out.iterdir()) == []
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert command(*argv).code == 0


def test_an_export_into_the_store_is_refused(command: Command, tmp_path: Path) -> None:
    for option in ("--tar", "--oci", "--oci-archive"):
        done = command("export", "w", option, str(tmp_path / "data" / "store" / "x"))
        assert done.code == 1
        assert "is inside the store" in done.err
