"""Ids of crash reports: safe as file names and refs whatever the repo is called, in UTC, never longer than a file system takes."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mothball.crash.names import MAX_ID, SEALED, check_report_id, is_report_id, report_id
from mothball.errors import InvalidParams

AT = 1_732_225_509_999  # 2024-11-21 21:45:09.999 UTC
DIGEST = hashlib.sha256(b"report").hexdigest()


def named(**fields: Any) -> str:
    return report_id(**{"repo": "owner/repo", "workspace": "owner/repo#7", "number": 7, "at_ms": AT, "digest": DIGEST, **fields})


def test_b55_the_name_has_repo_issue_utc_time_and_digest() -> None:
    slug = "owner-repo-" + hashlib.sha256(b"owner/repo").hexdigest()[:8]
    assert named() == f"crash-{slug}-issue-7-20241121-214509Z-{DIGEST[:8]}"


def test_b53_the_time_is_utc_in_every_time_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "Pacific/Auckland")
    time.tzset()
    try:
        assert "-20241121-214509Z-" in named()
    finally:
        monkeypatch.undo()
        time.tzset()


def test_without_number_there_is_no_issue_and_without_repo_the_workspace_names_it() -> None:
    assert "issue" not in named(number=None)
    assert named(repo=None, workspace="plain", number=None) == f"crash-plain-20241121-214509Z-{DIGEST[:8]}"


def test_b55_two_reports_of_one_second_have_two_names() -> None:
    assert named(digest="0" * 64) != named(digest="1" * 64)


def test_b60_low_bytes_of_wide_characters_never_become_a_way_out() -> None:
    found = named(repo="\u012e\u012e\u012f" * 3 + "etc")
    assert is_report_id(found)
    assert "/" not in found
    assert ".." not in found
    assert found.isascii()


@pytest.mark.parametrize("repo", ["../../etc/passwd", "..", "-rf", ".hidden", "a\\b:c", "\u0100x", "x" * 500, "a b\n\x1b[2J"])
def test_b60_no_repo_leads_out_of_the_folder_or_hides(repo: str) -> None:
    found = named(repo=repo)
    assert is_report_id(found)
    assert found.startswith("crash-")
    assert "/" not in found
    assert len(found) <= MAX_ID


def test_b60_repos_that_differ_only_in_unsafe_characters_have_different_names() -> None:
    assert named(repo="a/b") != named(repo="a-b")
    assert named(repo="a" * 99 + "b") != named(repo="a" * 99 + "c")


@given(repo=st.text(min_size=1, max_size=200).filter(lambda text: "\0" not in text), number=st.none() | st.integers(0, 10**18 - 1))
def test_every_id_is_a_safe_name_of_bounded_length(repo: str, number: int | None) -> None:
    found = named(repo=repo, number=number)
    assert is_report_id(found)
    assert len((found + SEALED).encode()) <= 255


@pytest.mark.parametrize("field", [{"number": -1}, {"number": True}, {"number": 10**18}, {"digest": "../../x"}, {"at_ms": 10**18}])
def test_a_wrong_part_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(InvalidParams):
        named(**field)


@pytest.mark.parametrize(
    "text", ["", "crash-", "../crash-a-20241121-214509Z-00000000", "latest", "crash-a/b-20241121-214509Z-00000000", 7]
)
def test_nothing_else_passes_for_an_id(text: object) -> None:
    with pytest.raises(InvalidParams):
        check_report_id(text)


def test_an_id_passes_for_itself() -> None:
    assert check_report_id(named()) == named()
