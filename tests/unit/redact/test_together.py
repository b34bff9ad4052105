"""Known values are looked for in the same pass as everything else, and found where a pass of their own finds them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mothball.redact import Rules
from mothball.redact.known import Known
from mothball.redact.patterns import places
from mothball.redact.scan import Scanner
from tests.unit.redact.canaries import TOKENS

WORDS = [
    "password", "password=", "my-token: ", "secret_key ='", "://", "@", "AKIA", "-----BEGIN ", "eyJ", " ", "\n", "x1", "Zq9-7b",
    '"', "=", "token", "api_key_", "1" * 9, *(token for tokens in TOKENS.values() for token in tokens[:1]),
]  # fmt: skip
texts = st.lists(st.sampled_from(WORDS), max_size=40).map(lambda words: "".join(words).encode())
scanner = Scanner(Rules.default())


def both(data: bytes, known: Known, lo: int, hi: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    beside: list[tuple[int, int]] = []
    return list(scanner._together(data, lo, hi, known, beside)), beside


@settings(max_examples=300, deadline=None)
@given(texts, st.integers(0, 2**32), st.integers(0, 20), st.integers(0, 20))
def test_one_pass_finds_what_two_passes_find(data: bytes, seed: int, before: int, behind: int) -> None:
    chance = random.Random(seed)
    # Stretches of the text itself: they begin, end and lie within what the scan takes for a keyword, and across each other.
    begins = [chance.randrange(len(data) + 1) for _ in range(8)]
    known = Known(data[begin : begin + chance.randint(8, 30)] for begin in begins)
    if not known:
        return
    assert known.few
    lo, hi = min(before, len(data)), max(0, len(data) - behind)
    assert both(data, known, lo, hi) == (list(places(scanner.finder, data, lo, hi)), list(known.spans(data, lo, hi)))


def test_a_known_value_is_found_before_behind_and_within_a_keyword() -> None:
    data = b"Zq9-7b-password-Zq9-7b Zq9-7b-secret_Lm0p4=tokentoken-77ab"
    known = Known([b"Zq9-7b-pass", b"word-Zq9-7b", b"Zq9-7b-secret", b"Lm0p4=token", b"token-77ab"])
    found, beside = both(data, known, 0, len(data))
    assert found == list(places(scanner.finder, data, 0, len(data)))
    assert [data[start:end] for start, end in beside] == sorted(known.values, key=data.find)


def test_more_values_than_one_pattern_takes_are_found_in_a_pass_of_their_own() -> None:
    chance = random.Random(3)
    values = [b"%032x" % chance.getrandbits(128) for _ in range(600)]
    known = Known(values)
    assert not known.few
    data = b" ".join(values) + b" password=x"
    spans, beside = scanner.spans_beside(data, 0, len(data), 0, known)
    assert spans == scanner.spans(data)
    assert [data[start:end] for start, end in beside] == values


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
