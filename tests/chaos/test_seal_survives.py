"""A process that seals or opens a file is killed at a random moment, again and again: whole or not at all."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pyrage
import pytest

SECONDS = float(os.environ.get("MOTHBALL_TEST_CHAOS_SECONDS", "40")) / 2
ENOUGH = 5
"""Kills before the end, and runs that came to it, without which the test says nothing."""
KEY = pyrage.x25519.Identity.generate()
WORK = """
import sys
from pathlib import Path
from mothball.seal.sealed import seal_file, unseal_file
way, src, dst, key = sys.argv[1:]
print("ready", flush=True)
if way == "seal":
    seal_file(Path(src), Path(dst), recipients=[key])
else:
    unseal_file(Path(src), Path(dst), identities=[key.encode()])
"""

pytestmark = pytest.mark.timeout(2 * SECONDS + 120)


@pytest.mark.parametrize("way", ["seal", "unseal"])
def test_no_kill_leaves_half_a_file_or_a_clear_one(tmp_path: Path, way: str) -> None:
    seed = int(os.environ.get("MOTHBALL_TEST_CHAOS_SEED", "0")) or random.SystemRandom().randrange(10**6)
    print(f"MOTHBALL_TEST_CHAOS_SEED={seed}")
    rng = random.Random(seed)
    clear = rng.randbytes(24 * 1024**2)
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "clear").write_bytes(clear)
    (tmp_path / "sealed").write_bytes(pyrage.encrypt(clear, [KEY.to_public()]))
    src, key = (tmp_path / "clear", str(KEY.to_public())) if way == "seal" else (tmp_path / "sealed", str(KEY))
    killed = whole = 0
    longest = 0.5
    until = time.monotonic() + SECONDS
    while time.monotonic() < until or not (killed >= ENOUGH and whole >= ENOUGH):
        assert time.monotonic() < until + 60, f"only {killed} killed and {whole} whole runs"
        with subprocess.Popen([sys.executable, "-c", WORK, way, src, folder / "file", key], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            begun = time.monotonic()
            try:
                process.wait(rng.uniform(0, 1.5 * longest))
                longest = time.monotonic() - begun
            except subprocess.TimeoutExpired:
                process.kill()
        names = os.listdir(folder)
        if names:
            assert names == ["file"]
            data = (folder / "file").read_bytes()
            assert (pyrage.decrypt(data, [KEY]) if way == "seal" else data) == clear
            (folder / "file").unlink()
            whole += 1
        else:
            assert process.returncode == -9
            killed += 1
    assert (tmp_path / "clear").read_bytes() == clear
