"""Texts of a report: nothing a terminal obeys, bounded, and never cut so that half a key is left."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mothball.crash.text import ERROR_BYTES, clean, clip, line_end, line_start, one_line

KEY = "-----BEGIN RSA PRIVATE KEY-----\n" + "\n".join("MIIEpAIBAAKCAQEAabcdefghij" + str(n) for n in range(40)) + (
    "\n-----END RSA PRIVATE KEY-----\n"
)  # fmt: skip
OBEYED = {chr(n) for n in (*range(0x20), *range(0x7F, 0xA0))} - {"\n", "\t"}


@given(st.text(st.characters(codec=None, categories=None)))
def test_no_control_character_is_left_and_cleaning_again_changes_nothing(text: str) -> None:
    found = clean(text)
    assert not OBEYED & set(found)
    found.encode("utf-8")
    assert clean(found) == found


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", "a<ESC[2J>b"),
        ("a\x1b]0;title\x07b", "a<ESC>]0;title<0x07>b"),
        ("\u202egnp.exe", "<U+202E>gnp.exe"),
        ("a\udcffb", "a<0xff>b"),
        ("a\ud800b", "a<U+D800>b"),
        ("50%\r100%\r\n", "50%\n100%\n"),
        ("\x9b31mred", "red"),
        ("tab\tand\nline ü 漢", "tab\tand\nline ü 漢"),
    ],
)
def test_what_a_terminal_would_obey_is_shown(text: str, shown: str) -> None:
    assert clean(text) == shown


def test_a_colour_within_a_secret_goes_so_that_a_rule_finds_it() -> None:
    assert clean("\x1b[01;31m\x1b[Kghp_\x1b[m\x1b[Kabcdef") == "ghp_abcdef"


def test_what_is_shown_never_sticks_to_the_next_word() -> None:
    # `\bghp_` must match after each of them.
    for before in ("\x1b[2J", "\x07", "\u202e", "\udcff"):
        assert not clean(before + "ghp_x").partition("ghp_")[0][-1].isalnum()


def test_a_short_text_stays_whole() -> None:
    found = clip("ValueError: x\n")
    assert (found.text, found.truncated, found.bytes) == ("ValueError: x\n", False, 14)
    exact = "x" * ERROR_BYTES
    assert clip(exact).text == exact


def test_ten_megabytes_keep_their_beginning_and_end_and_say_so() -> None:
    lines = "".join(f"line {n:07d} \x1b[31mü\x1b[0m\n" for n in range(400_000))
    started = time.monotonic()
    found = clip(lines)
    assert time.monotonic() - started < 5
    assert found.truncated
    assert found.bytes == len(lines.encode())
    assert len(found.text.encode()) <= ERROR_BYTES
    assert found.text.startswith("line 0000000 ü\n")
    assert found.text.endswith("line 0399999 ü\n")
    assert "bytes left out ...]" in found.text
    head, _, tail = found.text.partition("\n[... ")
    assert 15_000 < len(head.encode()) <= 16 * 1024
    assert 47_000 < len(tail.encode()) <= 48 * 1024


@given(st.text(max_size=3000), st.integers(100, 1000))
def test_what_was_clipped_is_not_clipped_again(text: str, limit: int) -> None:
    once = clip(text, limit)
    assert len(once.text.encode()) <= limit
    assert clip(once.text, limit).text == once.text


@pytest.mark.parametrize("offset", range(1, len(KEY), 61))
def test_no_cut_leaves_the_end_of_a_key(offset: int) -> None:
    text = KEY + "after\n" * 1000
    assert "MIIE" not in line_start(text[offset:])
    assert line_start(text[offset:]).endswith("after\n")


def test_a_whole_key_behind_the_cut_is_left_for_the_rules() -> None:
    assert KEY in line_start("cut\n" + KEY)


def test_a_cut_lies_between_lines() -> None:
    assert line_start("lf of it\nsecond\nthird") == "second\nthird"
    assert line_end("first\nsecond\nthi") == "first\nsecond"


def test_a_line_without_end_gives_up_what_could_be_half_a_secret() -> None:
    assert line_start("x" * 10_000) == "x" * (10_000 - 4096)
    assert line_end("x" * 10_000) == "x" * (10_000 - 4096)


def test_a_title_is_one_line() -> None:
    assert one_line("../../etc\n\x1b[2Jpasswd\t x") == "../../etc <ESC[2J>passwd x"
    assert len(one_line("x" * 10**7)) == 200
