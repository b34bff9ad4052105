"""What a command under ``mothball image cache use`` touched, told by the kernel; and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mothball.cli import cache_use
from mothball.cli.cache_use import Touched, run
from mothball.errors import InvalidParams, NotFound

A, B, C, D = (letter * 64 for letter in "abcd")


def shell(script: str, where: Path) -> None:
    subprocess.run(["sh", "-ec", script], cwd=where, check=True, timeout=30)


def test_n10_what_is_read_written_or_renamed_into_a_flat_cache_is_noted(tmp_path: Path) -> None:
    for name in (A, B):
        (tmp_path / f"sha256:{name}").write_text("x")
    with Touched(tmp_path) as touched:
        shell(f"cat sha256:{A}; echo new > sha256:{C}; echo part > tmp-1; mv tmp-1 sha256-{D}", tmp_path)
    assert (touched.digests, touched.problem) == ({A, C, D}, "")


def test_n03_folders_that_a_pull_makes_are_watched_at_once(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    with Touched(cache) as touched:
        shell(f"mkdir -p blobs/sha256 sha256; echo x > blobs/sha256/{A}; echo x > sha256/{B}", cache)
    assert (touched.digests, touched.problem) == ({A, B}, "")


def test_what_is_no_blob_and_what_nobody_touched_is_not_noted(tmp_path: Path) -> None:
    (tmp_path / "sha256").mkdir()
    (tmp_path / "sha256" / A).write_text("x")
    with Touched(tmp_path) as touched:
        shell(f"echo x > index.json; echo x > {A}.tmp; echo x > sha256:{A[:63]}; echo x > {A.upper()}", tmp_path)
    assert (touched.digests, touched.problem) == (set(), "")


def test_more_than_the_registry_remembers_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_use, "MOST_BLOBS", 2)
    with Touched(tmp_path) as touched:
        shell(f"for x in {A} {B} {C}; do echo x > sha256:$x; done", tmp_path)
    assert len(touched.digests) == 2
    assert "more than 2 blobs" in touched.problem


def test_a_folder_that_is_not_there_yet_does_not_stop_the_command(tmp_path: Path) -> None:
    with Touched(tmp_path / "missing") as touched:
        assert run(["true"], {"PATH": os.environ["PATH"]}) == 0
    assert touched.digests == set()


@pytest.mark.parametrize("place", ["", "blobs/sha256", "sha256"])
def test_what_the_first_pull_makes_in_a_folder_that_was_not_there_is_noted(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "new/cache"
    with Touched(folder) as touched:
        (folder / place).mkdir(parents=True)
        (folder / place / ("sha256:" * (not place) + "ab" * 32)).write_bytes(b"x")
    assert touched.digests == {"ab" * 32}


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with Touched(tmp_path):
            pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_exit_code_is_the_commands_own() -> None:
    env = {"PATH": os.environ["PATH"]}
    assert run(["sh", "-c", "exit 0"], env) == 0
    assert run(["sh", "-c", "exit 7"], env) == 7
    assert run(["sh", "-c", "kill -KILL $$"], env) == 128 + signal.SIGKILL
    with pytest.raises(NotFound, match="no program"):
        run(["no-such-program-anywhere"], env)
    with pytest.raises(InvalidParams, match="cannot be started"):
        run([str(Path(__file__))], env)


def test_a_signal_that_comes_before_the_command_is_there_reaches_it_too() -> None:
    code = """
import os, signal, subprocess, sys
from mothball.cli import cache_use
popen = subprocess.Popen
def late(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    return popen(*args, **kwargs)
subprocess.Popen = late
sys.exit(cache_use.run(["sleep", "60"], dict(os.environ)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[3], timeout=30, check=False)
    assert done.returncode == 128 + signal.SIGTERM


def test_signals_reach_the_command_and_our_handlers_come_back(tmp_path: Path) -> None:
    said = tmp_path / "ready"
    code = f"""
import os, signal, sys
from mothball.cli.cache_use import run
before = signal.getsignal(signal.SIGTERM)
child = "trap 'exit 42' TERM; echo > {said}; while :; do sleep 0.05; done"
status = run(["sh", "-c", child], dict(os.environ))
assert signal.getsignal(signal.SIGTERM) == before
sys.exit(status)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[3], start_new_session=True) as process:
        try:
            until = time.monotonic() + 30
            while not said.exists():
                assert time.monotonic() < until
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 42
        finally:
            process.kill()
