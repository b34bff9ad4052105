"""`mothball demo` from start to finish on small trees."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.command import Command, fingerprint
from tests.support import eventually

STEPS = [
    "copy", "start", "register", "first capture", "unchanged", "snapshot", "edit", "list", "read back", "diff", "restore",
    "compare", "in use", "auto-stop", "expiry", "undelete", "killed worker", "verify",
    "cache dry run", "cache prune", "cache undelete", "failure", "crash report", "run again", "stop",
]  # fmt: skip


@pytest.fixture
def mothball(tmp_path: Path) -> Iterator[Command]:
    """The command, with a temporary folder of its own: what is left in it was left behind."""
    (tmp_path / "tmp").mkdir()
    command = Command(tmp_path / "tmp")
    command.env["TMPDIR"] = str(tmp_path / "tmp")
    yield command
    command.kill_all()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Somebody's tree: plain and odd things, a read-only folder, a hard link pair, a FIFO, an ignore file."""
    root = tmp_path / "somebodys"
    (root / "src" / "deep").mkdir(parents=True)
    for number in range(40):
        (root / "src" / f"file{number}.txt").write_text(f"{number}\n" * 50)
    (root / "src" / "deep" / "read-only.txt").write_text("fixed\n")
    (root / os.fsdecode(b"caf\xe9.txt")).write_text("odd name\n")
    (root / "link").symlink_to("src")
    (root / "pair").hardlink_to(root / "src" / "file0.txt")
    (root / ".git").mkdir()
    (root / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (root / ".mothballignore").write_text("*.log\n")
    (root / "noise.log").write_text("ignored\n")
    os.mkfifo(root / "pipe")
    (root / "src" / "deep").chmod(0o555)
    return root


def test_the_demo_passes_and_leaves_the_tree_and_the_machine_as_they_were(mothball: Command, tree: Path, tmp_path: Path) -> None:
    before = fingerprint(tree)
    done = mothball("demo", str(tree), "--json", timeout=120)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [step["step"] for step in found["steps"]] == STEPS
    by_name = {step["step"]: step for step in found["steps"]}
    assert by_name["first capture"]["digest"] == by_name["unchanged"]["digest"] != by_name["edit"]["digest"]
    assert by_name["unchanged"]["bytes"] == 0
    assert by_name["snapshot"]["digest"] == by_name["restore"]["digest"] == by_name["first capture"]["digest"]
    assert "killed pid" in done.err
    assert "Flower: http://127.0.0.1:" in done.err
    assert fingerprint(tree) == before
    assert list((tmp_path / "tmp").iterdir()) == []
    assert mothball.processes() == []
    assert found["seconds"] < 90
    sizes = {by_name[f"cache {part}"]["bytes"] for part in ("dry run", "prune", "undelete")}
    assert len(sizes) == 1 and sizes.pop() > 0
    assert "kept: " in by_name["cache prune"]["shows"]
    assert "the token is nowhere in it" in done.err
    assert by_name["crash report"]["bytes"] > 0
    if shutil.which("runc") and os.geteuid() == 0:
        assert "unpacked and started with runc: exit code 3: deploy: token [redacted:github:" in done.err
        assert by_name["run again"]["shows"].startswith("the package under runc: the same failure")


def test_without_runc_the_demo_says_that_it_did_not_run_the_package(mothball: Command, tmp_path: Path) -> None:
    empty, programs = tmp_path / "empty", tmp_path / "programs"
    empty.mkdir()
    programs.mkdir()
    for folder in os.environ["PATH"].split(os.pathsep):
        for program in Path(folder).iterdir() if Path(folder).is_dir() else ():
            if program.name != "runc" and not (programs / program.name).is_symlink():
                (programs / program.name).symlink_to(program)
    done = mothball("demo", str(empty), "--json", timeout=120, env={"PATH": str(programs)})
    assert done.code == 0, done.err
    assert "it was not run again: " in done.err
    assert next(step for step in done.json()["steps"] if step["step"] == "run again")["shows"].startswith("not run: ")


def test_the_demo_on_an_empty_folder_makes_its_own_files(mothball: Command, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = mothball("demo", str(empty), timeout=120)
    assert done.code == 0, done.err
    assert b"WHAT IT SHOWS" in done.out
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_cleans_up(mothball: Command, tree: Path, tmp_path: Path, number: signal.Signals) -> None:
    log = tmp_path / "demo.log"
    process = mothball.start("demo", str(tree), log=log)
    eventually(lambda: "registering" in log.read_text(), seconds=60, what="the demo is under way")
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    assert mothball.processes() == []
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("moment", ["first capture", "is kept while heartbeats come"])
def test_a_killed_demo_leaves_no_process(mothball: Command, tree: Path, tmp_path: Path, moment: str) -> None:
    log = tmp_path / "demo.log"
    process = mothball.start("demo", str(tree), log=log)
    eventually(lambda: moment in log.read_text(), seconds=60, what="the demo is under way")
    process.kill()
    process.wait(10)
    eventually(lambda: not mothball.processes(), seconds=15, what="every process has ended")


@pytest.mark.parametrize("name", ["missing", "file"])
def test_the_demo_refuses_what_is_no_directory(mothball: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    done = mothball("demo", str(tmp_path / name))
    assert done.code == 1
    assert done.err.startswith("error: source_missing: ")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_demo_refuses_a_tree_that_holds_its_own_temporary_folder(mothball: Command, tmp_path: Path) -> None:
    done = mothball("demo", str(tmp_path))
    assert done.code == 2
    assert "TMPDIR" in done.err
    assert list((tmp_path / "tmp").iterdir()) == []
