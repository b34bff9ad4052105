"""The last look at the finished bytes: it finds what is left, wherever it stands, and nothing else."""

from __future__ import annotations

import io
import random
import tarfile

import pytest

from mothball.redact import Finding, Redactor, Rescan, Rules, engine, rescan, windows
from tests.unit.redact.canaries import PASSWORD, SHAPED, TOKENS, random_text

TOKEN = TOKENS["github"][0].encode()


@pytest.fixture
def redactor() -> Redactor:
    return Redactor(b"k" * 32, Rules.default())


def tar(members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def scan(redactor: Redactor, data: bytes, piece: int = 65_536) -> list[Finding]:
    look = Rescan(redactor)
    for at in range(0, len(data), piece):
        look.feed(data[at : at + piece])
    return look.finish()


@pytest.mark.parametrize("piece", [1, 511, 4096, 10**7])
def test_a_token_anywhere_in_a_tar_is_found_with_its_place(redactor: Redactor, piece: int) -> None:
    data = tar({"a.txt": b"x" * 700, "b/c.bin": b"\0\1\2" * 99 + TOKEN + b"\0", "d": b"tail"})
    assert scan(redactor, data, piece) == [Finding("github", data.index(TOKEN))]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("name", [TOKEN.decode(), "x/" * 60 + TOKEN.decode(), "é" + TOKEN.decode()])
def test_a_token_in_the_name_of_a_member_is_found(redactor: Redactor, form: int, name: str) -> None:
    assert "github" in {found.rule for found in scan(redactor, tar({name: b""}, form))}


def test_a_token_between_the_members_and_behind_the_end_is_found(redactor: Redactor) -> None:
    data = bytearray(tar({"a": b"x", "b": b"y"}))
    data[600 : 600 + len(TOKEN)] = TOKEN
    assert [found.offset for found in scan(redactor, bytes(data))] == [600]
    data = bytearray(tar({"a": b"x"})) + TOKEN
    assert [found.rule for found in scan(redactor, bytes(data))] == ["github"]


def test_a_tar_that_stops_being_one_is_looked_at_as_it_stands(redactor: Redactor) -> None:
    data = tar({"a": b"x"})[:1024] + b"no header " * 60 + TOKEN + b" " * 1000
    assert "github" in {found.rule for found in scan(redactor, data)}
    assert [found.rule for found in scan(redactor, b"plain " + TOKEN)] == ["github"]


def test_the_end_of_a_file_and_the_next_header_are_no_sentence(redactor: Redactor) -> None:
    """A file of 512 bytes has no padding: its last line would be read on into the next member's name."""
    name = f"{random_text(30)}/x"
    filled = (b"a" * 500 + b"\ntoken = '")[-512:].rjust(512)
    assert scan(redactor, tar({"a.py": filled, name: b"y"})) == []
    assert scan(redactor, tar({"a.env": b"PASSWORD=".rjust(512), name: b"y"})) == []


def test_values_found_elsewhere_are_found_in_the_finished_bytes(redactor: Redactor) -> None:
    redactor.text(f'password = "{PASSWORD}"')
    wide = PASSWORD.encode("utf-16-le")
    data = tar({"plain.py": f"connect('{PASSWORD}')".encode(), "wide.txt": b"\xff\xfe" + wide, "lib.so": b"\0\1" + wide + b"\0\0"})
    assert {found.rule for found in scan(redactor, data)} == {"known"}
    assert len(scan(redactor, data)) == 3


@pytest.mark.parametrize("block", [4096, engine.BLOCK])
def test_what_was_redacted_is_clean_in_every_kind_of_file(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Pseudonyms are no findings, also where a window ends within one and in files where every value is a secret."""
    for module in (engine, windows, rescan):
        monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(rescan, "OVERLAP", 40 * 1024)
    redactor = Redactor(b"k" * 32, Rules.default())
    source = random.Random(7)
    everything = "".join(f"{row[2]}\n" for row in SHAPED) + "".join(
        f"X_TOKEN={token}\n" for tokens in TOKENS.values() for token in tokens
    )
    members = {}
    for name in ("a.py", ".env", "config.yml", ".netrc", "wide.txt", ".git/config"):
        text = everything + "".join(f"A_PASSWORD={random_text(source.randrange(6, 40), seed=n)}\n" for n in range(400))
        raw = text.encode() if name != "wide.txt" else text.encode("utf-16")
        members[name] = redactor.data(raw, name.encode())
    redactor.remember()
    members = {name: redactor.data(content, name.encode()) for name, content in members.items()}
    assert scan(redactor, tar(members), 10_000) == []


def test_binary_content_and_the_rescan_agree(redactor: Redactor) -> None:
    """What `binary` lets through, the rescan lets through: else a harmless library would stop every report."""
    quiet = (
        b"\x7fELF\0\0" + b"password: enter it\0token=abc\0secret_key=%s\0-----BEGIN RSA PRIVATE KEY-----\0http://%s:%s@%s\0" * 50
    )
    assert redactor.binary([quiet]) == set()
    assert scan(redactor, tar({"lib.so": quiet})) == []
    for loud, rule in ((TOKEN, "github"), (b"".join(b"%c\0" % byte for byte in TOKEN), "github")):
        assert redactor.binary([quiet, loud, b"\0"]) == {rule}
        assert {found.rule for found in scan(redactor, tar({"lib.so": quiet + loud + b"\0"}))} == {rule}


def test_a_finding_never_holds_the_secret(redactor: Redactor) -> None:
    assert TOKEN.decode() not in repr(scan(redactor, tar({"a": TOKEN})))
