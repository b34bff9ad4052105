"""Nothing secret leaves in a crash package: content, names, targets, what is known late; in doubt nothing leaves at all."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mothball.crash import package as package_module
from mothball.errors import Unredacted
from mothball.redact.engine import Redactor
from mothball.redact.rescan import Finding, Rescan
from mothball.redact.rules import Rules
from tests.support import TAR_FILTER
from tests.unit.crash.packing import KEY, NAME, SECRET, TOKEN, content, left_in, members, pack, redactor, report_of, take

MARK = b"[redacted:github"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "roots" / "w"
    root.mkdir(parents=True)
    return root


@pytest.fixture
def made(tmp_path: Path, tree: Path) -> Callable[..., Any]:
    """Capture the tree and package it."""
    return lambda **options: pack(*take(tmp_path / "data", tree), tmp_path / "out", **options)


def test_a_secret_in_a_file_is_replaced_and_counted(tree: Path, made: Callable[..., Any]) -> None:
    (tree / "a.py").write_bytes(b"token = '" + TOKEN + b"'\n")
    (tree / "b.txt").write_bytes(b"no secret\n")
    done = made()
    assert TOKEN not in Path(done.path).read_bytes()
    assert MARK in content(done.path, "a.py")
    assert content(done.path, "b.txt") == b"no secret\n"
    assert (done.facts.redactions, done.facts.redacted_files) == ({"github": 1}, 1)


def test_the_same_secret_has_the_same_pseudonym_in_every_file_and_another_one_with_another_key(
    tmp_path: Path, tree: Path, made: Callable[..., Any]
) -> None:
    for name in ("a", "b"):
        (tree / name).write_bytes(TOKEN)
    done = made()
    assert content(done.path, "a") == content(done.path, "b")
    other = pack(*take(tmp_path / "again", tree), tmp_path / "other", redactor=redactor(b"another key, just as long as that"))
    assert content(other.path, "a") != content(done.path, "a")


@pytest.mark.parametrize("cut", [-20, 0, 20])
def test_a_secret_split_over_a_border_of_frames_is_found(tmp_path: Path, tree: Path, cut: int) -> None:
    # Frames are cut every 4 MiB of the layer's tar, and the file is larger than one.
    size = 4 * 1024**2
    data = bytearray(b"just text\n" * (size // 5))
    for border in range(size, len(data), size):
        data[border - 1024 - cut : border - 1024 - cut + len(TOKEN)] = TOKEN
    for start in range(100_000, len(data) - 100, 250_007):
        data[start : start + len(TOKEN) + 2] = b" " + TOKEN + b" "
    (tree / "large.txt").write_bytes(data)
    done = pack(*take(tmp_path / "data", tree), tmp_path / "out")
    assert TOKEN not in Path(done.path).read_bytes()
    new = content(done.path, "large.txt")
    assert new.count(MARK) == bytes(data).count(TOKEN) == done.facts.redactions["github"]
    assert done.facts.bytes == len(new)


def test_a_secret_in_the_name_of_a_file_or_folder_or_in_the_target_of_a_link_is_replaced(
    tree: Path, made: Callable[..., Any]
) -> None:
    secret = TOKEN.decode()
    (tree / f"dump-{secret}").mkdir()
    (tree / f"dump-{secret}" / f"{secret}.txt").write_bytes(b"one")
    (tree / f"dump-{secret}" / "plain").write_bytes(b"two")
    (tree / "hard").hardlink_to(tree / f"dump-{secret}" / "plain")
    (tree / "soft").symlink_to(f"dump-{secret}/plain")
    done = made()
    assert TOKEN not in Path(done.path).read_bytes()
    found = members(done.path)
    folder = next(name for name, (member, _) in found.items() if member.isdir() and "dump-" in name)
    assert "[redacted:github" in folder
    assert found[f"{folder}/plain"][1] == b"two"
    assert found["rootfs/workspace/soft"][0].linkname == folder.removeprefix("rootfs/workspace/") + "/plain"
    assert found["rootfs/workspace/hard"][0].linkname == f"{folder}/plain"
    assert sorted(done.facts.redactions) == ["github"]


def test_two_names_that_would_be_the_same_stay_apart(tree: Path, made: Callable[..., Any]) -> None:
    (tree / TOKEN.decode()).write_bytes(b"secret name")
    mark = redactor().name(TOKEN).decode()
    (tree / mark).write_bytes(b"written by hand")
    done = made()
    assert content(done.path, mark) == b"written by hand"
    assert content(done.path, f"{mark}~2") == b"secret name"


def test_a_name_stays_short_enough_for_a_disk(tmp_path: Path, tree: Path, made: Callable[..., Any]) -> None:
    (tree / f"{'x' * 200}-{TOKEN.decode()}").write_bytes(b"one")
    done = made()
    names = [name for name in members(done.path) if name.startswith("rootfs/workspace/")]
    assert len(names) == 1
    assert len(os.fsencode(names[0].rpartition("/")[2])) <= 255
    with tarfile.open(done.path) as tar:
        tar.extractall(tmp_path / "unpacked", **TAR_FILTER)  # noqa: S202 -- the package is our own


def test_a_value_of_a_credential_file_is_found_in_files_that_come_before_it(tree: Path, made: Callable[..., Any]) -> None:
    (tree / "a.txt").write_bytes(b"call me " + SECRET + b" please\n")
    (tree / "z.env").write_bytes(b"SERVICE_PASSWORD=" + SECRET + b"\n")
    steps: list[str] = []
    done = made(tick=lambda step="", **_: steps.append(step))
    assert SECRET not in Path(done.path).read_bytes()
    assert b"call me [redacted:" in content(done.path, "a.txt")
    assert "again" not in steps


def test_a_value_that_is_known_late_is_found_everywhere_in_a_second_pass(tree: Path, made: Callable[..., Any]) -> None:
    (tree / "a.txt").write_bytes(b"call me " + SECRET + b" please\n")
    (tree / "b.bin").write_bytes(b"\0\1\2" + SECRET + b"\0")
    (tree / "m.txt").write_bytes(b"nothing\n")
    (tree / "z.py").write_bytes(b'password = "' + SECRET + b'"\n')
    steps: list[str] = []
    done = made(tick=lambda step="", **_: steps.append(step))
    assert SECRET not in Path(done.path).read_bytes()
    assert b"call me [redacted:" in content(done.path, "a.txt")
    assert "again" in steps
    assert done.facts.left_out_counts == {"secret_in_binary": 1}
    assert (done.facts.files, done.facts.redacted_files, sum(done.facts.redactions.values())) == (3, 2, 2)
    assert content(done.path, "m.txt") == b"nothing\n"
    assert members(done.path)["report.json"][1] == done.report == report_of(done.facts)


def _late(tree: Path, kind: str) -> None:
    """A workspace in which a value stands before the file that tells that it is a secret."""
    plain = b"call me " + SECRET + b" please\n"
    (tree / "d").mkdir()
    for number in range(40):
        (tree / "d" / f"{number:02}.txt").write_bytes(b"nothing %d\n" % number * (number * 97))
    (tree / "d" / "05.txt").write_bytes(plain * 60)
    (tree / "d" / "31.txt").write_bytes(plain)
    (tree / "a.txt").write_bytes(plain)
    (tree / "z.py").write_bytes(b'password = "' + SECRET + b'"\n')
    if kind == "further name":
        (tree / "b.txt").hardlink_to(tree / "a.txt")
    elif kind == "name":
        (tree / "d" / f"of {SECRET.decode()}.txt").write_bytes(b"hello\n")
    elif kind == "folder":
        (tree / SECRET.decode()).mkdir()
        (tree / SECRET.decode() / "file").write_bytes(b"hello\n")
    elif kind == "link":
        (tree / "soft").symlink_to(SECRET.decode())
    elif kind == "binary with a further name":
        (tree / "a.bin").write_bytes(b"\0\1" + SECRET + b"\0")
        (tree / "b.bin").hardlink_to(tree / "a.bin")
    elif kind == "large":
        (tree / "large.txt").write_bytes(b"just text\n" * 1_000_000 + plain)


@pytest.mark.parametrize("kind", ["text", "further name", "name", "folder", "link", "binary with a further name", "large"])
def test_what_is_written_anew_for_a_value_that_is_known_late_is_as_if_it_had_been_known(
    tmp_path: Path, tree: Path, kind: str
) -> None:
    _late(tree, kind)
    store, digest = take(tmp_path / "data", tree)
    late = pack(store, digest, tmp_path / "late")
    early = pack(store, digest, tmp_path / "early", redactor=Redactor(KEY, Rules.default(), known=[SECRET]))
    assert SECRET not in Path(late.path).read_bytes()
    assert late.facts == early.facts
    assert late.sha256 == early.sha256
    assert late.sha256 == pack(store, digest, tmp_path / "again").sha256


def test_a_value_that_is_known_late_and_a_report_that_outgrows_its_room(
    tmp_path: Path, tree: Path, made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _late(tree, "text")
    monkeypatch.setattr(package_module, "ROOM", 0)
    done = made()
    assert SECRET not in Path(done.path).read_bytes()
    assert members(done.path)["report.json"][1] == done.report
    assert done.facts.files == 42


def test_a_secret_at_the_very_end_of_a_file_that_fills_its_blocks_is_found(tree: Path, made: Callable[..., Any]) -> None:
    line = b"PASSWORD=" + SECRET
    (tree / "a.sh").write_bytes(b"#" * (511 - len(line)) + b"\n" + line)
    assert (tree / "a.sh").stat().st_size == 512
    done = made()
    assert SECRET not in Path(done.path).read_bytes()
    assert done.facts.redacted_files == 1


def test_a_binary_file_with_a_secret_is_left_out_and_listed_with_the_rule(tree: Path, made: Callable[..., Any]) -> None:
    (tree / "ok.bin").write_bytes(b"\0\1\2" * 100)
    (tree / "bad.bin").write_bytes(b"\0\1\2" + TOKEN + b"\0")
    (tree / "wide.bin").write_bytes(b"\0\1\2\3" + TOKEN.decode().encode("utf-16-le") + b"\0")
    (tree / "bad.second").hardlink_to(tree / "bad.bin")
    done = made()
    assert [(each.path, each.reason, each.rules) for each in done.facts.left_out] == [
        ("bad.bin", "secret_in_binary", ["github"]),
        ("bad.second", "secret_in_binary", ["github"]),
        ("wide.bin", "secret_in_binary", ["github"]),
    ]
    assert (done.facts.files, done.facts.binary_files, done.facts.left_out_counts) == (1, 1, {"secret_in_binary": 3})
    assert sorted(name for name in members(done.path) if name.startswith("rootfs/workspace/")) == ["rootfs/workspace/ok.bin"]


def test_a_large_binary_file_with_a_secret_at_its_end_is_left_out(tree: Path, made: Callable[..., Any]) -> None:
    (tree / "large.bin").write_bytes(os.urandom(9 * 1024**2) + b"\0" + TOKEN)
    (tree / "after.txt").write_bytes(b"still here\n")
    done = made()
    assert done.facts.left_out_counts == {"secret_in_binary": 1}
    assert content(done.path, "after.txt") == b"still here\n"


@pytest.mark.parametrize("where", [b"", b"\0" * 5000])
def test_a_large_binary_file_with_a_secret_is_left_out_with_its_further_names(
    tree: Path, made: Callable[..., Any], where: bytes
) -> None:
    (tree / "before.txt").write_bytes(b"token = '" + TOKEN + b"'\n")
    (tree / "large.bin").write_bytes(b"\0" + where + TOKEN + b"\0" + os.urandom(5 * 1024**2))
    (tree / "large.second").hardlink_to(tree / "large.bin")
    (tree / "also.bin").write_bytes(b"\0" * 6 * 1024**2)
    (tree / "z.txt").write_bytes(b"still here\n")
    done = made()
    assert [(each.path, each.reason, each.rules) for each in done.facts.left_out] == [
        ("large.bin", "secret_in_binary", ["github"]),
        ("large.second", "secret_in_binary", ["github"]),
    ]
    assert (done.facts.files, done.facts.binary_files, done.facts.binary_bytes) == (3, 1, 6 * 1024**2)
    assert sorted(name.rpartition("/")[2] for name in members(done.path) if "/workspace/" in name) == [
        "also.bin",
        "before.txt",
        "z.txt",
    ]
    assert content(done.path, "z.txt") == b"still here\n"
    assert TOKEN not in Path(done.path).read_bytes()


def test_a_large_text_is_redacted_like_a_small_one(tree: Path, made: Callable[..., Any]) -> None:
    lines = b"line of a log that says nothing\n" * 170_000  # more than a frame, less than what is read at once
    longer = lines * 4  # more than that
    for name, data in (("large.log", lines), ("longer.log", longer)):
        (tree / name).write_bytes(data + b"token = '" + TOKEN + b"'\n" + lines)
    (tree / "plain.log").write_bytes(lines)
    done = made()
    for name, data in (("large.log", lines), ("longer.log", longer)):
        inside = content(done.path, name)
        assert inside.startswith(data + b"token = '[redacted:github")
        assert inside.endswith(b"]'\n" + lines)
    assert content(done.path, "plain.log") == lines
    assert (done.facts.redactions, done.facts.redacted_files) == ({"github": 2}, 2)


def test_utf16_text_is_redacted(tree: Path, made: Callable[..., Any]) -> None:
    (tree / "win.txt").write_bytes(("token: " + TOKEN.decode() + "\r\n").encode("utf-16"))
    done = made()
    assert "[redacted:github" in content(done.path, "win.txt").decode("utf-16")


def test_the_counts_are_those_of_the_package_alone(tree: Path, made: Callable[..., Any]) -> None:
    (tree / "a").write_bytes(TOKEN)
    used = redactor()
    used.text("an earlier one: " + TOKEN.decode())
    assert made(redactor=used).facts.redactions == {"github": 1}


# -- in doubt nothing leaves -------------------------------------------------------------------------------------------


class Blind(Redactor):
    """Overlooks what a file has, as a redactor with a defect would; the rules themselves are sound."""

    def data(self, data: bytes, name: bytes = b"") -> bytes:
        return data

    def stream(self, pieces: Any, name: bytes = b"") -> Any:
        return iter(pieces)


def test_a_secret_that_is_left_in_the_finished_bytes_keeps_the_package_from_being_there(
    tmp_path: Path, tree: Path, made: Callable[..., Any]
) -> None:
    (tree / "a.txt").write_bytes(b"hello " + TOKEN)
    sound = redactor()
    with pytest.raises(Unredacted) as caught:
        made(redactor=Blind(b"k" * 32, sound.rules))
    assert "rootfs/workspace/a.txt" in caught.value.message
    assert "github" in caught.value.message
    assert TOKEN.decode() not in caught.value.message
    assert left_in(tmp_path / "out") == []


def test_a_secret_in_the_report_keeps_the_package_from_being_there(tmp_path: Path, tree: Path, made: Callable[..., Any]) -> None:
    (tree / "a.txt").write_bytes(b"hello")
    with pytest.raises(Unredacted, match=r"report\.json"):
        made(report=lambda facts: report_of(facts) + TOKEN)
    assert left_in(tmp_path / "out") == []


def test_a_secret_in_the_report_is_found_when_the_package_is_to_be_sealed_and_nothing_is_sealed(
    tmp_path: Path, tree: Path, made: Callable[..., Any]
) -> None:
    (tree / "a.txt").write_bytes(b"hello")
    sealed: list[bytes] = []
    with pytest.raises(Unredacted):
        made(report=lambda facts: report_of(facts) + TOKEN, seal=lambda clear, _out: sealed.append(clear.read()))
    assert (sealed, left_in(tmp_path / "out")) == ([], [])


def test_a_finding_in_the_name_of_a_file_does_not_repeat_the_name(
    tmp_path: Path, tree: Path, made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / TOKEN.decode()).write_bytes(b"hello")
    blind = Blind(b"k" * 32, redactor().rules)
    monkeypatch.setattr(blind, "name", lambda path: path)
    with pytest.raises(Unredacted, match="the name of a file") as caught:
        made(redactor=blind)
    assert TOKEN.decode() not in caught.value.message
    assert left_in(tmp_path / "out") == []


def test_whatever_the_scan_finds_is_the_last_word(
    tmp_path: Path, tree: Path, made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "a.txt").write_bytes(b"hello")
    monkeypatch.setattr(Rescan, "finish", lambda self: [Finding("aws", 10)])
    with pytest.raises(Unredacted, match="aws"):
        made()
    assert left_in(tmp_path / "out") == []


def test_the_package_and_its_facts_never_hold_a_canary_of_any_file(tree: Path, made: Callable[..., Any]) -> None:
    (tree / ".npmrc").write_bytes(b"//registry.npmjs.org/:_authToken=npm_" + b"A1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q7r8" + b"\n")
    (tree / ".netrc").write_bytes(b"machine example.org login me password " + SECRET + b"\n")
    (tree / "notes").write_bytes(b"https://me:" + SECRET + b"@example.org/x\n")
    done = made()
    data = Path(done.path).read_bytes()
    for canary in (SECRET, b"A1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q7r8"):
        assert canary not in data
        assert canary not in done.report
    assert NAME in done.path
