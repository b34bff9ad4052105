"""Marks: the same answers as sets and dictionaries, in a few bytes per blob."""

from __future__ import annotations

import hashlib
from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from mothball.store.marks import Marks


def digest(number: int) -> str:
    return "sha256:" + hashlib.sha256(b"%d" % number).hexdigest()


def size(number: int) -> int:
    return 1 + number * 7


Holdings = st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 40), max_size=30)), max_size=12)


@given(Holdings)
def test_the_accounts_are_those_of_sets(holdings: list[tuple[int, list[int]]]) -> None:
    holdings = sorted(holdings, key=lambda each: each[0])
    marks = Marks()
    by_workspace: list[set[int]] = []
    by_repo: dict[int, set[int]] = defaultdict(set)
    holders: dict[int, set[int]] = defaultdict(set)
    repos: dict[int, set[int]] = defaultdict(set)
    for place, (repo, blobs) in enumerate(holdings):
        marks.owner(f"w{place}", f"r{repo}")
        marks.capture(10)
        for blob in blobs:
            marks.add(digest(blob), size(blob))
            holders[blob].add(place)
            repos[blob].add(repo)
        by_workspace.append(set(blobs))
        by_repo[repo] |= set(blobs)
    assert marks.count == len(holders)
    assert marks.bytes == sum(map(size, holders))
    assert sum(usage.charged for usage in marks.workspaces) == marks.bytes, "every blob is charged to one of its holders"
    for usage, mine in zip(marks.workspaces, by_workspace, strict=True):
        alone = {blob for blob in mine if len(holders[blob]) == 1}
        assert (usage.stored, usage.exclusive) == (sum(map(size, mine)), sum(map(size, alone)))
        assert usage.shared == usage.stored - usage.exclusive
    for usage in marks.repos:
        mine = by_repo[int(usage.name[1:])]
        alone = {blob for blob in mine if len(repos[blob]) == 1}
        assert (usage.stored, usage.exclusive) == (sum(map(size, mine)), sum(map(size, alone)))
        assert usage.captures == sum(f"r{repo}" == usage.name for repo, _ in holdings)
    for blob in range(60):
        assert marks.has(digest(blob)[7:]) == (blob in holders)


def test_texts_that_are_no_names_are_not_marked() -> None:
    marks = Marks()
    marks.owner("w", "")
    name = digest(1)[7:]
    marks.add(digest(1), 1)
    assert marks.has(name)
    for text in ("", "notes.txt", name[:-1], name + "0", "zz" + name[2:]):
        assert not marks.has(text), text


def test_a_blob_takes_tens_of_bytes_whatever_the_table_has_to_hold() -> None:
    """The benchmark measures the million."""
    marks = Marks()
    marks.owner("w", "")
    for number in range(20_000):
        marks.add(f"sha256:{number * 0x9E3779B97F4A7C15 % 2**64:016x}{0:048x}", 1)
        if number > 10_000:
            assert marks.table_bytes <= 50 * marks.count
    assert marks.count == 20_000
