"""Sealing and unsealing files: whole or not at all, and never a clear file by accident."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pyrage
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mothball.errors import AlreadyExists, InvalidParams, MothballError, NoSpace, OperationFailed, SealError
from mothball.seal import age, age_scrypt, sealed
from mothball.seal.sealed import check_choice, open_stim, seal_file, seal_stream, unseal_file, what_opens, write_stim
from tests.unit.seal.keys import ssh_key

CLEAR = bytes(range(256)) * 1000
PASSPHRASE = b"correct horse"
KEY, OTHER = pyrage.x25519.Identity.generate(), pyrage.x25519.Identity.generate()
TO, TO_OTHER = str(KEY.to_public()), str(OTHER.to_public())
IDENTITY = f"# created: today\n# public key: {TO}\n{KEY}\n".encode()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work factor 10 in place of 18, which takes a second each time."""
    monkeypatch.setattr(age_scrypt, "WORK_FACTOR", 10)
    monkeypatch.setitem(age_scrypt.encrypt.__kwdefaults__, "work_factor", 10)


@pytest.fixture
def clear(tmp_path: Path) -> Path:
    path = tmp_path / "report.tar"
    path.write_bytes(CLEAR)
    return path


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_several_recipients_can_each_open_it(clear: Path, tmp_path: Path) -> None:
    done = seal_file(clear, recipients=[TO, TO_OTHER])
    assert done.path == tmp_path / "report.tar.age"
    assert stat.S_IMODE(done.path.stat().st_mode) == 0o600
    assert done.sha256 == "sha256:" + hashlib.sha256(done.path.read_bytes()).hexdigest()
    assert done.bytes == done.path.stat().st_size
    for number, key in enumerate((KEY, OTHER)):
        back = unseal_file(done.path, tmp_path / f"back{number}", identities=[str(key).encode()])
        assert back.path.read_bytes() == CLEAR
        assert stat.S_IMODE(back.path.stat().st_mode) == 0o600
    assert clear.read_bytes() == CLEAR


def test_a_passphrase_opens_what_it_sealed(clear: Path, tmp_path: Path) -> None:
    seal_file(clear, tmp_path / "s.age", passphrase=PASSPHRASE)
    assert CLEAR[:64] not in (tmp_path / "s.age").read_bytes()
    assert unseal_file(tmp_path / "s.age", passphrase=PASSPHRASE).path == tmp_path / "s"
    assert (tmp_path / "s").read_bytes() == CLEAR


@pytest.mark.parametrize("size", [0, 1, 64 * 1024])
def test_a_file_of_any_size_comes_back(tmp_path: Path, size: int) -> None:
    path = tmp_path / "f"
    path.write_bytes(CLEAR[:size])
    seal_file(path, tmp_path / "k", recipients=[TO])
    seal_file(path, tmp_path / "p", passphrase=PASSPHRASE)
    assert unseal_file(tmp_path / "k", tmp_path / "k2", identities=[IDENTITY]).path.read_bytes() == CLEAR[:size]
    assert unseal_file(tmp_path / "p", tmp_path / "p2", passphrase=PASSPHRASE).path.read_bytes() == CLEAR[:size]


def seal_with_key(path: Path, out: Path) -> Callable[[Path, Path], object]:
    seal_file(path, out, recipients=[TO])
    return lambda src, dst: unseal_file(src, dst, identities=[IDENTITY])


def seal_with_passphrase(path: Path, out: Path) -> Callable[[Path, Path], object]:
    seal_file(path, out, passphrase=PASSPHRASE)
    return lambda src, dst: unseal_file(src, dst, passphrase=PASSPHRASE)


@pytest.mark.parametrize("how", [seal_with_key, seal_with_passphrase])
def test_a_sealed_file_cut_at_any_byte_writes_nothing(tmp_path: Path, how: Callable[..., Callable[[Path, Path], object]]) -> None:
    path, whole, cut = tmp_path / "f", tmp_path / "whole", tmp_path / "cut"
    path.write_bytes(b"a short secret")
    unseal = how(path, whole)
    data = whole.read_bytes()
    for end in range(len(data)):
        cut.write_bytes(data[:end])
        with pytest.raises(SealError):
            unseal(cut, tmp_path / "out")
    cut.write_bytes(data + b"\0")
    with pytest.raises(SealError):
        unseal(cut, tmp_path / "out")
    assert names(tmp_path) == ["cut", "f", "whole"]


@pytest.mark.parametrize("how", [seal_with_key, seal_with_passphrase])
@pytest.mark.parametrize("place", [0, 30, 60, 120, 180, -1, -70_000])
def test_a_sealed_file_with_a_flipped_bit_writes_nothing(
    clear: Path, tmp_path: Path, how: Callable[..., Callable[[Path, Path], object]], place: int
) -> None:
    unseal = how(clear, tmp_path / "s")
    data = bytearray((tmp_path / "s").read_bytes())
    data[place] ^= 1
    (tmp_path / "s").write_bytes(data)
    with pytest.raises(SealError) as caught:
        unseal(tmp_path / "s", tmp_path / "out")
    assert str(tmp_path / "s") in caught.value.message
    assert names(tmp_path) == ["report.tar", "s"]


def test_a_wrong_key_and_a_wrong_passphrase_write_nothing(clear: Path, tmp_path: Path) -> None:
    seal_file(clear, tmp_path / "k.age", recipients=[TO])
    seal_file(clear, tmp_path / "p.age", passphrase=PASSPHRASE)
    with pytest.raises(SealError, match="none of the keys given"):
        unseal_file(tmp_path / "k.age", identities=[str(OTHER).encode()])
    with pytest.raises(SealError, match="passphrase is wrong"):
        unseal_file(tmp_path / "p.age", passphrase=b"Correct horse")
    assert names(tmp_path) == ["k.age", "p.age", "report.tar"]


def test_the_wrong_kind_of_key_says_which_one_it_wants(clear: Path, tmp_path: Path) -> None:
    seal_file(clear, tmp_path / "k.age", recipients=[TO])
    seal_file(clear, tmp_path / "p.age", passphrase=PASSPHRASE)
    write_stim(tmp_path / "s.stim", b"{}", bytes(1024), PASSPHRASE)
    with pytest.raises(SealError, match="open it with --identity"):
        unseal_file(tmp_path / "k.age", passphrase=PASSPHRASE)
    with pytest.raises(SealError, match="open it with --passphrase"):
        unseal_file(tmp_path / "p.age", identities=[IDENTITY])
    with pytest.raises(SealError, match="open it with --passphrase"):
        what_opens(tmp_path / "s.stim", with_passphrase=False)
    with pytest.raises(SealError, match="not an age file"):
        what_opens(clear, with_passphrase=True)


def test_one_of_both_ways_has_to_be_chosen(clear: Path, tmp_path: Path) -> None:
    for recipients, with_passphrase in (([], False), ([TO], True)):
        with pytest.raises(InvalidParams, match="one of both"):
            check_choice(recipients, with_passphrase=with_passphrase, remove=False)
    with pytest.raises(InvalidParams, match="one of both"):
        unseal_file(clear)
    assert names(tmp_path) == ["report.tar"]


@pytest.mark.parametrize(
    ("recipient", "said"),
    [
        (str(KEY), "secret key"),
        (TO[:-1], "not a recipient"),
        (TO[:-1] + ("q" if TO[-1] != "q" else "p"), "not a recipient"),
        ("age1yubikey1qwt50d05nh5vutpdzmlg5wn80xq5negm4uj9ghv0snvdd3yysf5yw3rhl3t", "not a recipient"),
        ("ssh-ed25519 AAAA", "not a recipient"),
        ("alice@example.org", "one begins with age1"),
        ("\x1b[2Jage1", "one begins with age1"),
        ("", "not a recipient"),
        ("age1" + "q" * 10_000, "not a recipient"),
    ],
    ids=["secret", "cut", "mistyped", "plugin", "ssh", "mail", "control", "empty", "long"],  # keys are new in each process
)
def test_a_bad_recipient_is_refused_before_anything_is_written(clear: Path, tmp_path: Path, recipient: str, said: str) -> None:
    with pytest.raises(InvalidParams, match=said) as caught:
        seal_file(clear, recipients=[TO, recipient])
    assert str(KEY)[20:] not in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 200
    with pytest.raises(InvalidParams, match=said):
        seal_stream([recipient])
    assert names(tmp_path) == ["report.tar"]


def test_too_many_recipients_are_refused() -> None:
    with pytest.raises(InvalidParams, match="65 recipients"):
        age.parse_recipients(str(pyrage.x25519.Identity.generate().to_public()) for _ in range(65))
    assert len(age.parse_recipients([TO, TO, f" {TO}\n"])) == 1


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "holds no key"),
        (b"# only a comment\n\n", "holds no key"),
        (TO.encode(), "line 1 of the identity file is neither"),
        (str(KEY)[:-1].encode(), "no key that can be used"),
        (b"\xff\xfe", "no key that can be used"),
        (b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n", "no key that can be used"),
        (b"age-encryption.org/v1\n-> scrypt x", "itself sealed"),
        (b"x" * (1024**2 + 1), "more than"),
    ],
    ids=["empty", "comment", "recipient", "cut", "binary", "ssh", "sealed", "long"],
)
def test_a_bad_identity_file_is_refused_and_not_repeated(clear: Path, tmp_path: Path, data: bytes, said: str) -> None:
    seal_file(clear, tmp_path / "k.age", recipients=[TO])
    with pytest.raises(InvalidParams, match=said) as caught:
        unseal_file(tmp_path / "k.age", identities=[data])
    assert str(KEY)[20:40] not in caught.value.message
    assert names(tmp_path) == ["k.age", "report.tar"]


def test_armor_is_opened(tmp_path: Path) -> None:
    (tmp_path / "a.age").write_bytes(pyrage.encrypt(CLEAR, [KEY.to_public()], armored=True))
    (tmp_path / "b.age").write_bytes(pyrage.passphrase.encrypt(b"x", "pw", armored=True))
    assert unseal_file(tmp_path / "a.age", identities=[IDENTITY]).path.read_bytes() == CLEAR
    assert unseal_file(tmp_path / "b.age", passphrase=b"pw").path.read_bytes() == b"x"


def test_sealing_replaces_nothing_and_unsealing_replaces_nothing(clear: Path, tmp_path: Path) -> None:
    (tmp_path / "report.tar.age").write_bytes(b"mine")
    with pytest.raises(AlreadyExists):
        seal_file(clear, recipients=[TO])
    assert (tmp_path / "report.tar.age").read_bytes() == b"mine"
    seal_file(clear, tmp_path / "x.age", recipients=[TO])
    (tmp_path / "x").write_bytes(b"mine too")
    with pytest.raises(AlreadyExists):
        unseal_file(tmp_path / "x.age", identities=[IDENTITY])
    assert (tmp_path / "x").read_bytes() == b"mine too"


def test_what_is_no_regular_file_is_refused(clear: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(clear)
    os.mkfifo(tmp_path / "fifo")
    before = names(tmp_path)
    for name in ("link", "fifo", "none", "."):
        with pytest.raises(InvalidParams):
            seal_file(tmp_path / name, tmp_path / "out", recipients=[TO])
        with pytest.raises(InvalidParams):
            unseal_file(tmp_path / name, tmp_path / "out", identities=[IDENTITY])
    assert names(tmp_path) == before


def test_a_source_that_changes_meanwhile_is_not_sealed(clear: Path, tmp_path: Path) -> None:
    def write(_: int) -> None:
        with clear.open("ab") as file:
            file.write(b"more")

    clear.write_bytes(bytes(2 * 1024**2))
    for recipients, passphrase in (([TO], None), ([], PASSPHRASE)):
        with pytest.raises(OperationFailed, match="changed while it was read"):
            seal_file(clear, recipients=recipients, passphrase=passphrase, progress=write)
    assert names(tmp_path) == ["report.tar"]


def test_remove_takes_the_source_only_once_the_sealed_file_was_opened(clear: Path, tmp_path: Path) -> None:
    done = seal_file(clear, passphrase=PASSPHRASE, remove=True)
    assert done.removed
    assert names(tmp_path) == ["report.tar.age"]
    assert unseal_file(done.path, passphrase=PASSPHRASE).path.read_bytes() == CLEAR


def test_remove_with_recipients_is_refused_for_it_cannot_be_verified(clear: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidParams, match="cannot be verified"):
        seal_file(clear, recipients=[TO], remove=True)
    assert names(tmp_path) == ["report.tar"]


def test_remove_takes_nothing_when_the_sealed_file_does_not_open(
    clear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = age_scrypt.encrypt

    def damaged(src: object, out: io.BufferedRandom, *args: object) -> None:
        real(src, out, *args)  # type: ignore[arg-type]
        out.seek(-1, os.SEEK_END)
        out.write(b"\0")

    monkeypatch.setattr(age_scrypt, "encrypt", damaged)
    with pytest.raises(SealError):
        seal_file(clear, passphrase=PASSPHRASE, remove=True)
    assert names(tmp_path) == ["report.tar"]


def test_remove_takes_nothing_when_the_sealed_file_holds_other_bytes(
    clear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = age_scrypt.encrypt
    monkeypatch.setattr(age_scrypt, "encrypt", lambda _src, out, *args: real(io.BytesIO(CLEAR[:-1]), out, *args))
    with pytest.raises(OperationFailed, match="does not hold the same bytes"):
        seal_file(clear, passphrase=PASSPHRASE, remove=True)
    assert names(tmp_path) == ["report.tar"]


def test_remove_takes_no_file_that_took_the_name_meanwhile(clear: Path, tmp_path: Path) -> None:
    def swap(_: int) -> None:
        if not (tmp_path / "aside").exists():
            clear.rename(tmp_path / "aside")
            clear.write_bytes(b"another")

    clear.write_bytes(bytes(2 * 1024**2))
    with pytest.raises(OperationFailed, match="is another file now"):
        seal_file(clear, passphrase=PASSPHRASE, remove=True, progress=swap)
    assert clear.read_bytes() == b"another"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_interrupts_comes_through_and_leaves_nothing(clear: Path, tmp_path: Path, error: type[BaseException]) -> None:
    """The library turns what its reader raises into an error of its own, also Ctrl-C."""

    def stop(_: int) -> None:
        raise error

    clear.write_bytes(bytes(2 * 1024**2))
    for recipients, passphrase in (([TO], None), ([], PASSPHRASE)):
        with pytest.raises(error):
            seal_file(clear, recipients=recipients, passphrase=passphrase, progress=stop)
    seal_file(clear, tmp_path / "k", recipients=[TO])
    with pytest.raises(error):
        unseal_file(tmp_path / "k", tmp_path / "out", identities=[IDENTITY], progress=stop)
    assert names(tmp_path) == ["k", "report.tar"]


class Full(io.BytesIO):
    """A disk that is full after 100 000 bytes."""

    def write(self, data: object, /) -> int:
        if self.tell() > 100_000:
            raise OSError(28, "No space left on device")
        return super().write(data)  # type: ignore[arg-type]


def test_a_full_disk_comes_through_the_library_as_what_it_is(clear: Path) -> None:
    with pytest.raises(OSError, match="No space") as caught:
        seal_stream([TO])(io.BytesIO(CLEAR), Full())
    assert caught.value.errno == 28
    with pytest.raises(OSError, match="No space"):
        age.decrypt(io.BytesIO(pyrage.encrypt(CLEAR, [KEY.to_public()])), Full(), [KEY])


def test_a_full_disk_is_no_space_and_leaves_nothing(clear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_src: object, out: io.BufferedRandom, *_: object) -> None:
        out.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(age_scrypt, "encrypt", full)
    with pytest.raises(NoSpace):
        seal_file(clear, passphrase=PASSPHRASE)
    assert names(tmp_path) == ["report.tar"]


def test_seal_stream_seals_from_where_the_source_stands() -> None:
    src, out = io.BytesIO(b"skipped" + CLEAR), io.BytesIO()
    src.seek(7)
    seal_stream([TO, TO_OTHER])(src, out)
    assert pyrage.decrypt(out.getvalue(), [OTHER]) == CLEAR


def test_a_stim_is_written_whole_and_read(tmp_path: Path) -> None:
    done = write_stim(tmp_path / "b.stim", b"{}", bytes(1024), PASSPHRASE)
    assert stat.S_IMODE(done.path.stat().st_mode) == 0o600
    assert open_stim(done.path, PASSPHRASE) == (b"{}", bytes(1024))
    with pytest.raises(InvalidParams, match="password is required"):
        write_stim(tmp_path / "c.stim", b"{}", bytes(1024), b"")
    with pytest.raises(SealError, match="wrong password"):
        open_stim(done.path, b"x")
    assert names(tmp_path) == ["b.stim"]


@pytest.mark.parametrize(("name", "kind", "opened"), [("a.tar.age", "age", "a.tar"), ("b.stim", "stim", "b.tar")])
def test_an_opened_file_gets_its_name_back(name: str, kind: sealed.Kind, opened: str) -> None:
    assert sealed.unsealed_name(Path("/x") / name, kind) == Path("/x") / opened


@pytest.mark.parametrize(("name", "kind"), [("a.tar", "age"), (".age", "age"), ("a.age", "stim"), (".stim", "stim")])
def test_a_name_that_says_nothing_needs_out(name: str, kind: sealed.Kind) -> None:
    with pytest.raises(MothballError, match="--out"):
        sealed.unsealed_name(Path("/x") / name, kind)


def test_an_ssh_key_opens_what_was_sealed_to_it(clear: Path, tmp_path: Path) -> None:
    private, public = ssh_key()
    seal_file(clear, tmp_path / "s.age", recipients=[TO, public + " somebody@example.org"])
    assert unseal_file(tmp_path / "s.age", identities=[private]).path.read_bytes() == CLEAR
    with pytest.raises(SealError, match="none of the keys given"):
        unseal_file(tmp_path / "s.age", tmp_path / "t", identities=[ssh_key()[0]])


SMALL = pyrage.encrypt(b"a short secret", [KEY.to_public(), OTHER.to_public()])


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(SMALL) - 1), st.binary(min_size=1, max_size=40), st.booleans())
def test_a_file_for_keys_with_anything_written_over_it_never_opens_to_something_else(at: int, over: bytes, cut: bool) -> None:
    data = bytearray(SMALL)
    data[at : at + len(over)] = over
    out = io.BytesIO()
    try:
        age.decrypt(io.BytesIO(bytes(data[:at] if cut else data)), out, [KEY])
        assert out.getvalue() == b"a short secret"
    except SealError as error:
        assert error.message.isprintable()


def test_a_stim_is_not_opened_as_an_age_file(tmp_path: Path) -> None:
    write_stim(tmp_path / "s.stim", b"{}", bytes(1024), PASSPHRASE)
    with pytest.raises(InvalidParams, match="not an age file"):
        unseal_file(tmp_path / "s.stim", tmp_path / "out", passphrase=PASSPHRASE)
    assert names(tmp_path) == ["s.stim"]
