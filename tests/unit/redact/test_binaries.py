"""What stands beside a telling name among the strings of a program: a secret, or texts without a gap between them."""

from __future__ import annotations

import random

import pytest

from mothball.redact import Redactor, Rescan, Rules

RUN = (
    b"modifiersPseudoElementSelectorstartendTokenAndSpantokenmid > len/rustc/9ff5fc4ffbbe1e911527aa054e789b05ae55ffcc/library/alloc"
    b"/src/slice.rsAnPlusBForgivingSelectorListCompoundSelectorListRelativeSelectorListRawaa_rawbb_rawPlainBooleanRangeIntervalValue"
    b"conditionsCalcProductCalcOperatorSequenceOfCustomIdentsFeatureGeneralEnclosedContainerQueryCustomPropertyNamePageLayerUrlKey"
)
SECRET = b"Xq9vTz4WbN6cYp1HsD8fGj3KaE5uQoR7"
HEX = b"9f8e7d6c5b4a39281706f5e4d3c2b1a0"


def rules_in(strings: bytes) -> tuple[set[str], set[str]]:
    """By the look before a file is packaged, and by the one at what was written; they have to agree."""
    redactor = Redactor(b"k" * 32, Rules.default())
    data = b"\x7fELF\2\1\1" + bytes(600) + strings + bytes(700)
    scan = Rescan(redactor)
    scan.feed(data)
    return redactor.binary([data]), {found.rule for found in scan.finish()}


def test_texts_of_a_compiled_program_are_no_secret() -> None:
    assert rules_in(RUN) == (set(), set())


@pytest.mark.parametrize("secret", [SECRET, HEX])
@pytest.mark.parametrize(
    "behind", [b"", b"\0", b"src/main/start.rsCould not start", b"/rustc/9ff5fc4f/library/core/src/fmt/mod.rsAnPlusBForgiving"]
)
def test_a_secret_among_them_is_one(secret: bytes, behind: bytes) -> None:
    found = rules_in(b"\0db_password=" + secret + behind)
    assert found == ({"password"}, {"password"})


def test_a_secret_before_and_behind_such_a_run_fires() -> None:
    assert rules_in(RUN + b"\0api_token=" + SECRET + b"\0")[0] == {"secret"}
    assert rules_in(b"\0api_token=" + SECRET + b"\0" + RUN)[0] == {"secret"}


def test_a_telling_name_among_random_bytes_tells_nothing() -> None:
    chance = random.Random(11)
    for name in (b"Pw=", b"pwd:", b"Token="):
        data = b"".join(b"\0\xd9" + name + chance.randbytes(40) for _ in range(3000))
        assert rules_in(data) == (set(), set())


@pytest.mark.parametrize("behind", [b"\x92\x01\xff", b"\xc3", b"\x1b[0m", b"\x80"])
def test_a_secret_that_random_bytes_follow_is_one(behind: bytes) -> None:
    assert rules_in(b"\x0c\xd9db_password=" + SECRET + behind + bytes(range(128, 160)))[0] == {"password"}
    assert rules_in(b"\0db_password=" + "Zürich-9xK2mQ7wLp4".encode() + behind)[0] == {"password"}


@pytest.mark.parametrize("noise", [b"\x9c://\x81\xfe(:\x93\x10\x82@\xa7.", b"A9://\xf1q:\xc3b@b\x9d/"])
def test_an_address_among_random_bytes_has_no_password(noise: bytes) -> None:
    assert rules_in(noise) == (set(), set())
    assert Redactor(b"k" * 32, Rules.default()).data(noise) != noise  # in a text it would have one


def test_a_password_in_the_address_of_a_program_is_one() -> None:
    assert rules_in(b"\0\x93postgres://app:Xq9vTz4WbN6c@db.internal/main\0\x81") == ({"url"}, {"url"})
    assert rules_in("\0https://me:pässword-77@example.org\0".encode()) == ({"url"}, {"url"})
