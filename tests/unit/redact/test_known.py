"""Known values are found wherever they stand, however many there are, and however alike they begin."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mothball.redact import Redactor, Rules
from mothball.redact.known import HEAD, Known

WORDS = ["password=", "my-token: ", "x1", "Zq9-7b", '"', "=", "\0", "é", " ", "\n", "api_key_", "Lm0p4Xw2"]
texts = st.lists(st.sampled_from(WORDS), max_size=60).map(lambda words: "".join(words).encode())


def expected(data: bytes, values: frozenset[bytes], lo: int, hi: int) -> set[int]:
    """Every byte that belongs to a value which stands somewhere."""
    found: set[int] = set()
    for value in values:
        at = data.find(value, lo, hi)
        while at >= 0:
            found.update(range(at, at + len(value)))
            at = data.find(value, at + 1, hi)
    return found


@settings(max_examples=300, deadline=None)
@given(texts, st.integers(0, 2**32), st.integers(0, 20), st.integers(0, 20))
def test_every_value_is_found_where_it_stands_or_touches_one_that_was(data: bytes, seed: int, before: int, behind: int) -> None:
    chance = random.Random(seed)
    begins = [chance.randrange(len(data) + 1) for _ in range(8)]
    known = Known(data[begin : begin + chance.randint(8, 30)] for begin in begins)
    lo, hi = min(before, len(data)), max(0, len(data) - behind)
    spans = list(known.spans(data, lo, hi))
    hit = {place for start, end in spans for place in range(start, end)}
    assert hit <= expected(data, known.values, lo, hi)
    for value in known.values:
        at = data.find(value, lo, hi)
        while at >= 0:
            assert hit & set(range(at, at + len(value))), value
            at = data.find(value, at + 1, hi)


@pytest.mark.parametrize("count", [1, 60, 65, 600, 900])
def test_any_number_of_values_is_found(count: int) -> None:
    chance = random.Random(count)
    values = [b"%032x" % chance.getrandbits(128) for _ in range(count)]
    data = b" ".join(values) + b" password=x"
    found = sorted(Known(values).spans(data, 0, len(data)))
    assert [data[start:end] for start, end in found] == values
    assert sorted(Known(values).spans(data, 1, len(data) - 12)) == [each for each in found[1:] if each[1] <= len(data) - 12]


@pytest.mark.parametrize("others", [0, 800])
def test_a_long_value_is_hidden_to_its_end_and_one_that_begins_alike_as_far_as_it_is_alike(others: int) -> None:
    chance = random.Random(7)
    many = [b"%032x" % chance.getrandbits(128) for _ in range(others)]
    head = chance.randbytes(HEAD).hex().encode()
    one, two = head + b"one" + b"1a" * 600, head + b"twice as long" + b"2b" * 900
    data = b"<" + two + b"> <" + one + b"> <" + head + b"twice> <" + head[: HEAD - 1] + b">"
    found = list(Known([one, two, *many]).spans(data, 0, len(data)))
    assert [data[start:end] for start, end in found] == [two, one, head + b"twice"]


def test_values_that_begin_alike_are_each_found_as_a_whole() -> None:
    known = Known([b"Zq9-7bLm", b"Zq9-7bLm0p4X", b"Zq9-7bLm0p4Xw2"])
    data = b"a Zq9-7bLm0p4Xw2 b Zq9-7bLm0p4X c Zq9-7bLm"
    assert [data[start:end] for start, end in known.spans(data, 0, len(data))] == [b"Zq9-7bLm0p4Xw2", b"Zq9-7bLm0p4X", b"Zq9-7bLm"]


def test_a_value_that_was_learned_is_found_within_what_a_rule_looks_at() -> None:
    redactor = Redactor(b"k" * 32, Rules.default(), known=[b"word-Zq9-7b", b"Lm0p4=token"])
    out = redactor.data(b"Zq9-7b-password-Zq9-7b tokenLm0p4=token")
    assert b"word-Zq9-7b" not in out
    assert b"Lm0p4=token" not in out


def test_memory_stays_small_where_a_value_stands_everywhere() -> None:
    known, data = Known([b"Zq9-7bLm"]), b"Zq9-7bLm" * 500_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in known.spans(data, 0, len(data))) == 500_000
        assert tracemalloc.get_traced_memory()[1] < 200 * 1024**2
    finally:
        tracemalloc.stop()
