"""mothball seal, unseal, inspect: what they refuse, write and say."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyrage
import pytest

from mothball.seal import age_scrypt
from tests.commands import Answer
from tests.support import require_tool
from tests.unit.package.test_stim_parts import BUNDLE, CONFIG, tar_of

Cli = Callable[..., Answer]
KEY = pyrage.x25519.Identity.generate()
TO = str(KEY.to_public())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(age_scrypt.encrypt.__kwdefaults__, "work_factor", 4)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file, an identity and a passphrase; the working directory."""
    (tmp_path / "f").write_bytes(b"clear text")
    (tmp_path / "key.txt").write_text(f"# created\n{KEY}\n")
    (tmp_path / "pass.txt").write_text("correct horse\nnot this line\n")
    (tmp_path / "b.tar").write_bytes(tar_of(*BUNDLE))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_seal_and_unseal_with_a_key(home: Path, cli: Cli) -> None:
    answer = cli("seal", "f", "--to", TO, "--json")
    assert answer.code == 0
    assert answer.json()["path"] == str(home / "f.age")
    assert not answer.json()["removed"]
    (home / "f").unlink()
    assert cli("unseal", "f.age", "--identity", "key.txt").code == 0
    assert (home / "f").read_bytes() == b"clear text"


def test_seal_and_unseal_with_a_passphrase_from_a_file(home: Path, cli: Cli) -> None:
    answer = cli("seal", "f", "--passphrase-file", "pass.txt", "--out", "s", "--remove")
    assert answer.code == 0
    assert "f was removed" in answer.out
    assert not (home / "f").exists()
    assert cli("unseal", "s", "--passphrase-file", "pass.txt", "--out", "f").code == 0
    assert (home / "f").read_bytes() == b"clear text"


def test_a_passphrase_may_come_from_a_descriptor(home: Path, cli: Cli) -> None:
    for _ in range(2):
        read, write = os.pipe()
        os.write(write, b"correct horse")
        os.close(write)
        try:
            command = ("unseal", "s", "--out", "t") if (home / "s").exists() else ("seal", "f", "--out", "s")
            assert cli(*command, "--passphrase-file", f"/dev/fd/{read}").code == 0
        finally:
            os.close(read)
    assert (home / "t").read_bytes() == b"clear text"


def test_a_passphrase_may_come_from_standard_input(home: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"correct horse\r\nrest")))
    assert cli("seal", "f", "--passphrase-file", "-").code == 0
    assert cli("unseal", "f.age", "--passphrase-file", "pass.txt", "--out", "g").code == 0
    assert (home / "g").read_bytes() == b"clear text"


@pytest.mark.usefixtures("home")
def test_a_passphrase_is_asked_for_twice_on_the_terminal(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    answers = iter(["correct horse", "correct hose", "correct horse", "correct horse", "correct horse"])
    monkeypatch.setattr("getpass.getpass", lambda prompt: asked.append(prompt) or next(answers))
    monkeypatch.setattr(os, "open", _terminal(os.open))
    assert "differ" in cli("seal", "f", "--passphrase").err
    assert cli("seal", "f", "--passphrase").code == 0
    assert cli("unseal", "f.age", "--passphrase", "--out", "g").code == 0
    assert asked == ["Passphrase: ", "Again: ", "Passphrase: ", "Again: ", "Passphrase: "]


def _terminal(real: Callable[..., int]) -> Callable[..., int]:
    """There is a terminal."""
    return lambda path, *args, **kwargs: real(os.devnull if path == "/dev/tty" else path, *args, **kwargs)


@pytest.mark.usefixtures("home")
def test_without_a_terminal_nobody_is_asked_and_nothing_hangs(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def without(path: object, *args: int, **kwargs: int) -> int:
        if path == "/dev/tty":
            raise OSError(6, "No such device or address")
        return real(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", without)
    answer = cli("seal", "f", "--passphrase")
    assert answer.code == 2
    assert "--passphrase-file" in answer.err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("seal", "f"), "say who may open it"),
        (("seal", "f", "--to", TO, "--passphrase-file", "pass.txt"), "one of both"),
        (("seal", "f", "--to", TO, "--remove"), "cannot be verified"),
        (("seal", "f", "--to", str(KEY)), "secret key"),
        (("seal", "none", "--to", TO), "cannot be read"),
        (("seal", "f", "--to", TO, "--out", "key.txt"), "exists already"),
        (("seal", "f", "--passphrase-file", "none"), "cannot be read"),
        (("seal", "f", "--passphrase-file", "/dev/null"), "password is required"),
        (("seal", "b.tar", "--stim", "--to", TO), "no recipients"),
        (("seal", "b.tar", "--stim", "--passphrase-file", "pass.txt", "--remove"), "--remove is not for it"),
        (("seal", "b.tar", "--stim", "--passphrase-file", "/dev/null"), "password is required"),
        (("seal", "f", "--stim", "--passphrase-file", "pass.txt"), "as a tar"),
        (("unseal", "f"), "say how it opens"),
        (("unseal", "f", "--identity", "key.txt", "--passphrase"), "say how it opens"),
        (("unseal", "f", "--identity", "key.txt"), "not an age file"),
        (("unseal", "f", "--passphrase"), "not an age file"),
        (("inspect", "none"), "cannot be read"),
        (("inspect", "."), "not a regular file"),
    ],
    ids=lambda value: "-".join(value).replace(TO, "TO").replace(str(KEY), "SECRET") if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_clear_error_and_changes_nothing(home: Path, cli: Cli, argv: tuple[str, ...], said: str) -> None:
    before = sorted(os.listdir(home))
    answer = cli(*argv)
    assert answer.code != 0
    assert said in answer.err
    assert answer.err.count("\n") <= 2
    assert str(KEY)[20:] not in answer.err
    assert "correct horse" not in answer.err + answer.out
    assert sorted(os.listdir(home)) == before


def test_a_wrong_passphrase_leaves_nothing(home: Path, cli: Cli) -> None:
    cli("seal", "f", "--passphrase-file", "pass.txt")
    cli("seal", "b.tar", "--stim", "--passphrase-file", "pass.txt")
    (home / "wrong").write_text("correct hose\n")
    before = sorted(os.listdir(home))
    for name, said in (("f.age", "passphrase is wrong"), ("b.stim", "wrong password?")):
        answer = cli("unseal", name, "--passphrase-file", "wrong", "--out", "o", "--json")
        assert answer.code == 1
        assert json.loads(answer.err)["error"]["code"] == "sealed"
        assert said in answer.err
    assert sorted(os.listdir(home)) == before


def test_b125_a_package_becomes_a_stim_and_a_bundle_again(home: Path, cli: Cli) -> None:
    answer = cli("seal", "b.tar", "--stim", "--passphrase-file", "pass.txt", "--json")
    assert answer.code == 0
    assert "report.json is left out" in answer.err
    assert answer.json()["path"] == str(home / "b.stim")
    assert cli("unseal", "b.stim", "--passphrase-file", "pass.txt", "--out", "back.tar").code == 0
    with tarfile.open(home / "back.tar") as archive:
        assert archive.getnames()[:2] == ["config.json", "rootfs"]
        assert archive.getmember("rootfs/workspace/run.sh").mode == 0o755
    (home / "folder").mkdir()
    subprocess.run([require_tool("tar"), "-xpf", "back.tar", "-C", "folder"], check=True)
    assert cli("seal", "folder", "--stim", "--passphrase-file", "pass.txt").code == 0
    assert cli("unseal", "folder.stim", "--passphrase-file", "pass.txt").code == 0
    assert (home / "folder.tar").read_bytes() == (home / "back.tar").read_bytes()


def test_b112_a_stim_whose_config_runc_refuses_says_so(home: Path, cli: Cli) -> None:
    from mothball.seal.sealed import write_stim

    write_stim(home / "old.stim", b'{"Header":{},"Payload":null}', bytes(1024), b"correct horse")
    answer = cli("unseal", "old.stim", "--passphrase-file", "pass.txt")
    assert answer.code == 0
    assert "runc refuses" in answer.err


def test_b124_the_help_says_that_stim_is_weak(cli: Cli) -> None:
    assert "Weak" in cli("seal", "--help").out
    assert "unsalted" in cli("seal", "--help").out


@pytest.mark.usefixtures("home")
def test_b119_inspect_says_what_a_file_is_without_its_key(cli: Cli) -> None:
    cli("seal", "f", "--to", TO, "--to", str(pyrage.x25519.Identity.generate().to_public()))
    cli("seal", "b.tar", "--stim", "--passphrase-file", "pass.txt")
    found = cli("inspect", "f.age", "--json").json()
    assert (found["format"], found["clear_size"], len(found["recipients"])) == ("age", 10, 2)
    shown = cli("inspect", "f.age").out
    assert "X25519, X25519" in shown
    found = cli("inspect", "b.stim", "--json").json()
    assert (found["magic"], found["header"]["tim"]) == ("STIM", True)
    assert found["config_size"] == len(CONFIG) + 40
    assert "weak" in cli("inspect", "b.stim").out
    assert cli("inspect", "b.tar", "--json").json()["format"] == "bundle"
    assert cli("inspect", "f", "--json").json() == {"file": str(Path("f").absolute()), "size": 10, "format": "unknown"}


def test_what_stands_in_a_hostile_file_never_reaches_the_terminal(home: Path, cli: Cli) -> None:
    text = json.dumps({"\x1b[2J": ["\x1b]0;x\x07", {"a": "\x9b"}], "b\nfake": "\r\n"}).encode()
    (home / "x.trix").write_bytes(b"TRIX\x02" + len(text).to_bytes(4, "big") + text)
    answer = cli("inspect", "x.trix")
    assert answer.code == 0
    assert all(line.isprintable() for line in answer.out.splitlines())
    assert not any(line.startswith("fake") for line in answer.out.splitlines())
