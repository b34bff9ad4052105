"""Durations and sizes: what people write is read exactly, shown as it can be read again, and nonsense is refused by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mothball import durations, sizes
from mothball.errors import InvalidParams

SECOND, MINUTE, HOUR, DAY = 1000, 60_000, 3_600_000, 86_400_000


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("90m", 90 * MINUTE), ("24h", DAY), ("7d", 7 * DAY), ("2h30m", 150 * MINUTE), ("1w2d", 9 * DAY), ("1s", SECOND),
        ("30m2h", 150 * MINUTE), ("007s", 7 * SECOND), ("36500d", durations.MAX_MS), ("never", None),
    ],
)  # fmt: skip
def test_a_duration_is_read_with_its_units(text: str, ms: int | None) -> None:
    assert durations.parse(text) == ms


@pytest.mark.parametrize(
    "text",
    [
        "", "0s", "0h0m", "-1h", "+1h", "1", "1.5h", "1 h", " 1h", "1h\n", "h", "1H", "500ms", "1y", "1h30", "soon", "Never", "inf",
        "\u0663h",
        "36500d1s", "999999999999w", "1h" * 51, 5, 5.0,
        True, None, b"1h", ["1h"], pytest.param(10**5000, id="huge"),
    ],
)  # fmt: skip
def test_zero_negative_numbers_and_nonsense_are_refused_by_name(text: object) -> None:
    with pytest.raises(InvalidParams, match="ttl") as caught:
        durations.parse(text, "ttl")
    assert len(caught.value.message) < 200
    assert "\n" not in caught.value.message


@given(st.integers(1, durations.MAX_MS // SECOND))
def test_what_is_shown_is_read_back_as_the_same(seconds: int) -> None:
    assert durations.parse(durations.show(seconds * SECOND)) == seconds * SECOND


@given(st.lists(st.tuples(st.integers(0, 999), st.sampled_from("wdhms")), min_size=1, max_size=6))
def test_a_duration_is_the_sum_of_its_parts(parts: list[tuple[int, str]]) -> None:
    size = {"w": 7 * DAY, "d": DAY, "h": HOUR, "m": MINUTE, "s": SECOND}
    text, total = "".join(f"{number}{unit}" for number, unit in parts), sum(number * size[unit] for number, unit in parts)
    if 0 < total <= durations.MAX_MS:
        assert durations.parse(text) == total
        assert durations.parse(durations.show(total)) == total
    else:
        with pytest.raises(InvalidParams):
            durations.parse(text)


def test_durations_are_shown_in_one_unit_and_never_as_never() -> None:
    assert [durations.show(ms) for ms in (None, 90 * MINUTE, DAY, 14 * DAY, 36 * HOUR, 61 * SECOND)] == [
        "never", "90m", "1d", "14d", "36h", "61s",
    ]  # fmt: skip
    for odd in (1, 1500, 0):  # no text means these, so none may be read back as something else
        with pytest.raises(InvalidParams):
            durations.parse(durations.show(odd))


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "0s"), (999, "0s"), (-5, "0s"), (45_000, "45s"), (60_000, "1m"), (11_520_000, "3h 12m"), (2 * DAY, "2d"),
        (2 * DAY + 59 * MINUTE, "2d"), (DAY + HOUR, "1d 1h"), (61_999, "1m 1s"),
    ],
)  # fmt: skip
def test_spans_for_people_have_two_units_and_are_rounded_down(ms: int, text: str) -> None:
    assert durations.ago(ms) == text


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("10GiB", 10 << 30), ("500MB", 500 << 20), ("1.5 GiB", 3 << 29), ("20M", 20 << 20), ("1048576", 1 << 20), (1, 1), ("7b", 7),
        ("never", None), (1 << 53, 1 << 53), ("8192t", 1 << 53),
    ],
)  # fmt: skip
def test_a_size_is_read_with_its_unit(value: object, size: int | None) -> None:
    assert sizes.parse(value) == size


@pytest.mark.parametrize(
    "value",
    [
        "",
        "0",
        0,
        "0.4b",
        -1,
        "-1",
        "1e9",
        "lots",
        "1GiBB",
        1.5,
        True,
        None,
        "9" * 400,
        pytest.param(10**5000, id="huge"),
        (1 << 53) + 1,
        "16384t",
        ["1"],
    ],
)
def test_zero_negative_and_nonsense_sizes_are_refused_by_name(value: object) -> None:
    with pytest.raises(InvalidParams, match="budget"):
        sizes.parse(value, "budget")


@given(st.integers(1, sizes.MAX_BYTES))
def test_a_shown_size_is_read_back_as_the_same(size: int) -> None:
    assert sizes.parse(sizes.show(size)) == size


def test_sizes_are_shown_in_the_largest_unit_that_says_them_exactly() -> None:
    assert [sizes.show(size) for size in (None, 10 << 30, 1536 << 20, 1500, 1)] == ["never", "10GiB", "1536MiB", "1500", "1"]


def test_one_reader_of_durations_serves_policies_and_retention() -> None:
    """Two readers would drift apart, and the same text would mean two things."""
    text = (Path(durations.__file__).parent / "retention.py").read_text()
    assert "durations.parse" in text
    assert "604_800" not in text
