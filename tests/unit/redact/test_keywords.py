"""Keywords that stand everywhere: they are tried only where what follows them fits."""

from __future__ import annotations

import pytest

from mothball.redact import Rules
from mothball.redact.files import CODE, PROSE
from mothball.redact.patterns import places
from mothball.redact.scan import Scanner

scanner = Scanner(Rules.default())

KEY = b"Zq9-7bLm0p4Xw2RtYu8IoPa5SdFgHjKlZxCvBnM1QwErTy"


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (b'{"d":"' + KEY + b'"}', KEY),
        (b'{"qi": \n\t"' + KEY + b'"}', KEY),
        (b"${DB_PASS:-hunter22x}", b"hunter22x"),
        (b"`${a}${b}${MY_KEY:=hunter22x}`", b"hunter22x"),
        (b"${SECRET_TOKEN:?} my_token='Zq9-7bLm0p4Xw2'", b"Zq9-7bLm0p4Xw2"),
        (b'"k":"x", "password": "Zq9-7bLm0p4Xw2"', b"Zq9-7bLm0p4Xw2"),
    ],
)
def test_a_keyword_that_stands_everywhere_is_tried_where_what_follows_it_fits(text: bytes, secret: bytes) -> None:
    assert [text[span.start : span.end] for span in scanner.spans(text)] == [secret]


def test_a_keyword_that_stands_everywhere_is_not_tried_where_nothing_fits() -> None:
    text = b'{"d":"M12 2.4z","k":"a"} `${a}${b.c}/${d("x")}` ' * 10
    assert list(places(scanner.finder, text, 0, len(text))) == []


@pytest.mark.parametrize(
    "text",
    [
        b"db_password=%s\x1b[0m done",
        b"\x1b[32mdb_password\x1b[0m=\x1b[33m%s\x1b[0m",
        b"\x1b[1mapi_key\x1b[22m: \x1b[38;5;12m'%s'\x1b[39m",
        b'{"token\x1b[0m": "%s\x1b[0m"}',
        b"export MY_TOKEN=\x1b[1m\x1b[36m%s\x1b[0m\n",
    ],
)
def test_the_colours_of_a_terminal_hide_no_secret(text: bytes) -> None:
    data = text % KEY
    for level in (CODE, PROSE):
        spans = scanner.spans(data, level=level)
        assert [KEY in data[span.start : span.end] for span in spans] == [True]
        assert all(b"\x1b" not in data[span.start : span.end].rstrip(b"\x1b[0m") for span in spans)
