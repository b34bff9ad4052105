"""Names, sizes, durations: pure text."""

from __future__ import annotations

import base64
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mothball.cli.text import (
    age,
    escape,
    human_bytes,
    human_seconds,
    json_safe,
    parse_duration,
    parse_size,
    path_fields,
    printable,
    time_text,
)
from mothball.errors import InvalidParams


def unescape(text: str) -> str:
    """The inverse of `escape`, written on its own: the test of losslessness must not share its code."""
    out: list[str] = []
    at = 0
    while at < len(text):
        if text[at] != "\\":
            out.append(text[at])
            at += 1
            continue
        kind = text[at + 1]
        width = {"x": 2, "u": 4, "U": 8}.get(kind, 0)
        if width:
            number = int(text[at + 2 : at + 2 + width], 16)
            out.append(chr(number + 0xDC00) if kind == "x" and number > 0x7F else chr(number))
        else:
            out.append({"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}[kind])
        at += 2 + width
    return "".join(out)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain.txt", "plain.txt"),
        ("tab\tnew\nline\r", "tab\\tnew\\nline\\r"),
        ("red\x1b[31m", "red\\x1b[31m"),
        ("back\\slash", "back\\\\slash"),
        (os.fsdecode(b"caf\xe9"), "caf\\xe9"),
        ("café", "café"),
        ("\x85", "\\u0085"),
        ("right\u202eleft", "right\\u202eleft"),
        ("\x7f", "\\x7f"),
    ],
)
def test_a_name_that_could_fake_a_line_or_reach_the_terminal_is_shown_escaped(name: str, shown: str) -> None:
    assert escape(name) == shown


@given(st.binary(min_size=1, max_size=60))
def test_an_escaped_name_is_printable_and_tells_the_exact_bytes(raw: bytes) -> None:
    shown = escape(os.fsdecode(raw))
    assert shown.isprintable()
    assert os.fsencode(unescape(shown)) == raw


def test_a_sentence_keeps_its_backslashes_but_no_control_characters() -> None:
    assert printable("a\\b\x07\n") == "a\\b\\x07\\n"


def test_a_valid_name_is_path_alone_and_another_one_carries_its_bytes() -> None:
    assert path_fields("a\nb") == {"path": "a\nb"}
    raw = b"caf\xe9"
    fields = path_fields(os.fsdecode(raw))
    assert fields["path"] == "caf\\xe9"
    assert base64.b64decode(fields["path_b64"]) == raw


def test_no_lone_surrogate_reaches_json() -> None:
    value = json_safe({"a": [os.fsdecode(b"\xff")], "b": {"c": ("x", 1, None)}})
    json.dumps(value, ensure_ascii=False).encode("utf-8")
    assert value == {"a": ["\\xff"], "b": {"c": ["x", 1, None]}}


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (20 * 1024**2, "20 MiB"), (5 * 1024**4, "5.0 TiB")],
)
def test_sizes_are_shown_in_powers_of_1024(size: int, shown: str) -> None:
    assert human_bytes(size) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.254, "0.25 s"), (12.4, "12 s"), (60, "1 m"), (200, "3 m 20 s"), (18_720, "5 h 12 m"), (273_600, "3 d 4 h")],
)
def test_durations_are_shown_with_two_units(seconds: float, shown: str) -> None:
    assert human_seconds(seconds) == shown


def test_an_age_is_never_negative_and_never_is_a_dash() -> None:
    assert age(None, 5000) == "-"
    assert age(9000, 5000) == "0 s ago"
    assert age(1000, 6000) == "5 s ago"
    assert time_text(None) == "-"
    assert time_text(1_700_000_000_000) == "2023-11-14T22:13:20Z"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("30s", 30), ("1h30m", 5400), ("7d", 604_800), ("250ms", 0.25), ("1.5h", 5400)]
)
def test_a_duration_is_read_with_its_units(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "soon", "5x", "1h30", "-5s", "1 h\n30"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(InvalidParams, match="duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"), [("1048576", 1 << 20), ("512KiB", 512 << 10), ("20M", 20 << 20), ("1.5 GiB", 3 << 29), ("7b", 7)]
)
def test_a_size_is_read_with_its_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "-1", "5 XB", "1,5G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidParams, match="size"):
        parse_size(text)
