"""The `age` program opens what we seal, and we open what it seals."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from mothball.errors import SealError
from mothball.package.bundle_spec import runtime_spec
from mothball.seal.sealed import seal_file, unseal_file
from tests.commands import in_process
from tests.support import not_permitted, require_tool
from tests.unit.crash.packing import pack, take
from tests.unit.seal.keys import ssh_key

CLEAR = bytes(range(256)) * 1024
PASSPHRASE = "correct horse battery"


@pytest.fixture
def age() -> str:
    return require_tool("age")


@pytest.fixture
def clear(tmp_path: Path) -> Path:
    (tmp_path / "clear").write_bytes(CLEAR)
    return tmp_path / "clear"


def key_of(folder: Path) -> tuple[Path, str]:
    """An identity file as `age-keygen` makes it, and its recipient."""
    path = folder / f"key-{len(list(folder.iterdir()))}.txt"
    subprocess.run([require_tool("age-keygen"), "-o", path], check=True, capture_output=True)
    shown = subprocess.run([require_tool("age-keygen"), "-y", path], check=True, capture_output=True, text=True).stdout
    return path, shown.strip()


def on_a_terminal(*argv: str | Path) -> int:
    """Run a program that asks for a passphrase on its terminal, as often as it asks; its exit code."""
    child, terminal = pty.fork()
    if child == 0:  # pragma: no cover -- another process
        os.execv(argv[0], [os.fspath(each) for each in argv])  # noqa: S606 -- the point is its terminal
    deadline, seen = time.monotonic() + 60, b""
    try:
        while time.monotonic() < deadline:
            if not select.select([terminal], [], [], 0.5)[0]:
                continue
            try:
                piece = os.read(terminal, 4096)
            except OSError:  # the other end is gone
                break
            if not piece:
                break
            seen += piece
            if seen.rstrip().endswith(b":"):
                seen = b""
                os.write(terminal, PASSPHRASE.encode() + b"\n")
        else:
            os.kill(child, 9)
    finally:
        os.close(terminal)
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def test_age_opens_what_we_seal_to_several_recipients(age: str, clear: Path, tmp_path: Path) -> None:
    keys = [key_of(tmp_path) for _ in range(2)]
    seal_file(clear, tmp_path / "s.age", recipients=[to for _, to in keys])
    for path, _ in keys:
        out = subprocess.run([age, "-d", "-i", path, tmp_path / "s.age"], check=True, capture_output=True).stdout
        assert out == CLEAR


@pytest.mark.parametrize("armor", [(), ("-a",)])
def test_we_open_what_age_seals_to_several_recipients(age: str, clear: Path, tmp_path: Path, armor: tuple[str, ...]) -> None:
    keys = [key_of(tmp_path) for _ in range(2)]
    to = [word for _, recipient in keys for word in ("-r", recipient)]
    subprocess.run([age, *armor, *to, "-o", tmp_path / "s.age", clear], check=True)
    for number, (path, _) in enumerate(keys):
        done = unseal_file(tmp_path / "s.age", tmp_path / f"out{number}", identities=[path.read_bytes()])
        assert done.path.read_bytes() == CLEAR
    with pytest.raises(SealError, match="none of the keys"):
        unseal_file(tmp_path / "s.age", tmp_path / "no", identities=[key_of(tmp_path)[0].read_bytes()])


def test_an_ssh_key_works_both_ways_with_age(age: str, clear: Path, tmp_path: Path) -> None:
    private, public = ssh_key()
    (tmp_path / "id").write_bytes(private)
    (tmp_path / "id").chmod(0o600)
    seal_file(clear, tmp_path / "ours.age", recipients=[public])
    assert (
        subprocess.run([age, "-d", "-i", tmp_path / "id", tmp_path / "ours.age"], check=True, capture_output=True).stdout == CLEAR
    )
    subprocess.run([age, "-r", public, "-o", tmp_path / "theirs.age", clear], check=True)
    assert unseal_file(tmp_path / "theirs.age", identities=[private]).path.read_bytes() == CLEAR


def test_age_opens_what_we_seal_with_a_passphrase(age: str, clear: Path, tmp_path: Path) -> None:
    seal_file(clear, tmp_path / "s.age", passphrase=PASSPHRASE.encode())
    assert on_a_terminal(age, "-d", "-o", tmp_path / "out", tmp_path / "s.age") == 0
    assert (tmp_path / "out").read_bytes() == CLEAR


@pytest.mark.parametrize("armor", [(), ("-a",)])
def test_we_open_what_age_seals_with_a_passphrase(age: str, clear: Path, tmp_path: Path, armor: tuple[str, ...]) -> None:
    assert on_a_terminal(age, "-p", *armor, "-o", tmp_path / "s.age", clear) == 0
    assert unseal_file(tmp_path / "s.age", passphrase=PASSPHRASE.encode()).path.read_bytes() == CLEAR
    with pytest.raises(SealError, match="passphrase is wrong"):
        unseal_file(tmp_path / "s.age", tmp_path / "no", passphrase=b"another")


def test_b113_b125_a_real_package_goes_through_a_stim_and_still_fails_the_same_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid() != 0:
        not_permitted("start a container that is not rootless")
    require_tool("runc")
    tree = tmp_path / "tree"
    tree.mkdir()
    shutil.copy(require_tool("busybox"), tree / "busybox")
    (tree / "fail.sh").write_text("echo the same failure; exit 7\n")
    os.link(tree / "fail.sh", tree / "again.sh")
    store, digest = take(tmp_path / "root", tree)
    config = runtime_spec(args=["/workspace/busybox", "sh", "/workspace/again.sh"])
    package = pack(store, digest, tmp_path / "out", config=config)
    (tmp_path / "pass").write_text(PASSPHRASE)
    cli, secret = in_process(capsys), ("--passphrase-file", str(tmp_path / "pass"))
    assert cli("seal", package.path, "--stim", *secret, "--out", str(tmp_path / "p.stim")).code == 0
    assert cli("unseal", str(tmp_path / "p.stim"), *secret).code == 0
    answer = cli("bundle", "run", str(tmp_path / "p.tar"), "--json")
    assert answer.code == 7, answer.err
    assert answer.json()["stdout"] == "the same failure\n"
