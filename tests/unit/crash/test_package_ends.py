"""However the writing of a crash package ends, there is a whole package or nothing: sealed, cancelled, killed, on a full disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import BinaryIO

import pytest

from mothball.crash.packages import list_packages, remove_package
from mothball.errors import Cancelled, InvalidParams, NoSpace, SealError
from mothball.seal.age_scrypt import check_passphrase
from tests.support import not_permitted
from tests.unit.crash.packing import NAME, TOKEN, left_in, members, pack, take

STEPS = ("learn", "pack", "scan", "seal")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "roots" / "w"
    root.mkdir(parents=True)
    (root / "a.txt").write_bytes(b"a secret " + TOKEN)
    (root / "large.txt").write_bytes(b"just text\n" * 1_000_000)
    return root


def flipped(clear: BinaryIO, sealed: BinaryIO) -> None:
    """A seal of a kind: it reads what it is given to the end and writes something else."""
    while piece := clear.read(1024**2):
        sealed.write(bytes(255 - byte for byte in piece[:1000]) + piece[1000:].translate(bytes(range(255, -1, -1))))


def test_a_sealed_package_is_there_alone_and_holds_the_clear_one(tmp_path: Path, tree: Path) -> None:
    store, digest = take(tmp_path / "data", tree)
    made = pack(store, digest, tmp_path / "out", seal=flipped)
    assert left_in(tmp_path / "out") == [f"{NAME}.tar.age"]
    assert made.sealed
    data = Path(made.path).read_bytes()
    assert Path(made.path).stat().st_mode & 0o7777 == 0o600
    clear = pack(store, digest, tmp_path / "clear")
    assert data.translate(bytes(range(255, -1, -1))) == Path(clear.path).read_bytes()
    assert (len(data), made.sha256) == (
        made.bytes,
        subprocess.run(["sha256sum", made.path], capture_output=True, check=True).stdout[:64].decode(),
    )
    assert made.report == clear.report == members(clear.path)["report.json"][1]


def test_b117_sealed_packages_are_private_listed_and_deleted_under_names_that_lead_nowhere_else(tmp_path: Path, tree: Path) -> None:
    store, digest = take(tmp_path / "data", tree)
    made = pack(store, digest, tmp_path / "out", seal=flipped)
    assert (tmp_path / "out").stat().st_mode & 0o7777 == 0o700
    assert Path(made.path).stat().st_mode & 0o7777 == 0o600
    assert [(each.id, each.bytes, each.sealed) for each in list_packages(tmp_path / "out")] == [(NAME, made.bytes, True)]
    for name in ("../crash-x", "crash-a/b", "crash-", ".tar.age", "crash-x\0y"):
        with pytest.raises(InvalidParams):
            pack(store, digest, tmp_path / "out", seal=flipped, name=name)
        with pytest.raises(InvalidParams):
            remove_package(tmp_path / "out", name)
    with pytest.raises(InvalidParams, match="password is required for encryption"):
        check_passphrase(b"")
    assert remove_package(tmp_path / "out", NAME) == [f"{NAME}.tar.age"]
    assert list_packages(tmp_path / "out") == []


def test_a_sealing_that_fails_leaves_no_clear_file_and_no_partial_one(tmp_path: Path, tree: Path) -> None:
    def broken(clear: BinaryIO, sealed: BinaryIO) -> None:
        sealed.write(clear.read(1_000_000))
        raise SealError(what="the package", reason="no such recipient")

    with pytest.raises(SealError):
        pack(*take(tmp_path / "data", tree), tmp_path / "out", seal=broken)
    assert left_in(tmp_path / "out") == []


@pytest.mark.parametrize("step", STEPS)
def test_a_cancelled_job_leaves_nothing(tmp_path: Path, tree: Path, step: str) -> None:
    def tick(**done: object) -> None:
        if done["step"] == step:
            raise Cancelled(job="job")

    with pytest.raises(Cancelled):
        pack(*take(tmp_path / "data", tree), tmp_path / "out", seal=flipped, tick=tick)
    assert left_in(tmp_path / "out") == []


CHILD = """
    import os, signal, sys
    from pathlib import Path
    from mothball.store import Store
    from tests.unit.crash.packing import pack

    def tick(step="", **_):
        if step == sys.argv[4]:
            os.kill(os.getpid(), signal.SIGKILL)

    def seal(clear, sealed):
        sealed.write(clear.read(1_000_000))
        if sys.argv[4] == "sealing":
            os.kill(os.getpid(), signal.SIGKILL)
        sealed.write(clear.read())

    pack(Store(Path(sys.argv[1])), sys.argv[2], Path(sys.argv[3]), tick=tick, seal=seal if sys.argv[5] == "sealed" else None)
"""


@pytest.mark.parametrize("sealed", ["sealed", "clear"])
@pytest.mark.parametrize("step", [*STEPS, "sealing", "never"])
def test_a_kill_at_any_step_leaves_nothing_and_the_next_run_a_whole_package(
    tmp_path: Path, tree: Path, step: str, sealed: str
) -> None:
    store, digest = take(tmp_path / "data", tree)
    out = tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(store.root), digest, str(out)]
    reached = step == "never" or sealed == "sealed" or step not in {"seal", "sealing"}
    done = subprocess.run([*command, step, sealed], cwd=Path(__file__).parents[3], capture_output=True, timeout=120, check=False)
    if step != "never" and reached:
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert left_in(out) == []
        again = [*command, "never", sealed]
        subprocess.run(again, cwd=Path(__file__).parents[3], timeout=120, check=True)
    assert left_in(out) == [f"{NAME}.tar.age" if sealed == "sealed" else f"{NAME}.tar"]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, tree: Path) -> None:
    store, digest = take(tmp_path / "data", tree)
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() != 0:
        not_permitted("mount a file system of its own")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], capture_output=True, check=False)
    if mounted.returncode:
        not_permitted("mount a file system of its own")
    try:
        with pytest.raises(NoSpace):
            pack(store, digest, small)
        with pytest.raises(NoSpace):
            pack(store, digest, small, seal=flipped)
        assert left_in(small) == []
        assert os.statvfs(small).f_bfree == os.statvfs(small).f_blocks
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_where_files_have_names_from_the_beginning_nothing_is_left_either(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mothball.seal import newfile

    monkeypatch.setattr(newfile, "_unnamed", lambda _folder: None)
    store, digest = take(tmp_path / "data", tree)
    made = pack(store, digest, tmp_path / "out")
    assert left_in(tmp_path / "out") == [f"{NAME}.tar"]
    assert members(made.path)["report.json"][1] == made.report
    Path(made.path).unlink()

    def tick(**done: object) -> None:
        if done["step"] == "scan":
            raise Cancelled(job="job")

    with pytest.raises(Cancelled):
        pack(store, digest, tmp_path / "out", tick=tick)
    assert left_in(tmp_path / "out") == []
