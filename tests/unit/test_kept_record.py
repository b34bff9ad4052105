"""What a capture keeps of a workspace's record: all that somebody said, in a bounded text that any index can hold."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest

from mothball.registry import Workspace
from mothball.registry.kept import KEPT, MAX_KEPT_BYTES, kept_record, recall
from tests.unit.cli.conftest import workspace

FOUND_ELSEWHERE = {
    "id", "host", "state", "last_active", "last_signal", "holds", "fence", "generation", "digest", "bytes", "files",
    "high_water_bytes", "stored_bytes", "snapshots", "crash_reports", "last_good_at", "last_error", "retry_count", "runtime",
    "registration", "state_since", "state_reason", "signals", "extended_until", "extensions", "noticed",
}  # fmt: skip
"""Fields that follow from the store, begin anew, or could not be believed after a disaster."""


def test_every_field_of_a_record_is_kept_or_known_otherwise() -> None:
    """A field that somebody adds must be thought about here, or a rebuilt record would silently lack it."""
    assert set(KEPT) | FOUND_ELSEWHERE | {"rebuilt_at", "unknown"} >= {field.name for field in msgspec.structs.fields(Workspace)}


def test_what_is_kept_comes_back() -> None:
    record = workspace(pinned=True, pin_reason="du\xe4 \u2603", expires_at=5, policy={"capture": {"profile": "light"}})
    found = recall(kept_record(record))
    assert found == {name: getattr(record, name) for name in KEPT}


def test_a_path_of_any_bytes_comes_back_and_the_text_stays_ascii() -> None:
    record = workspace(path="/srv/" + os.fsdecode(b"caf\xe9"))
    text = kept_record(record)
    assert text.isascii()
    assert recall(text)["path"] == record.path


@pytest.mark.parametrize(
    ("fields", "cut"),
    [
        ({"intent": "x" * 20_000}, ["intent"]),
        ({"intent": "\u2603" * 4096, "title": "\u2603" * 2000}, ["intent"]),
        ({"policy": {"capture": {"ignore": ["y" * 100] * 600}}, "intent": "\U0001f600" * 4000}, ["intent", "policy"]),
    ],
)
def test_it_is_bounded_and_says_what_did_not_fit(fields: dict[str, Any], cut: list[str]) -> None:
    record = workspace(**fields)
    text = kept_record(record)
    assert len(text) <= MAX_KEPT_BYTES
    found = recall(text)
    assert sorted(set(KEPT) - set(found)) == cut
    assert found["agent_name"] == "agent-1"
    assert '"cut":' in text


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"unheard":1}', "[" * 100_000])
def test_what_is_no_kept_record_says_nothing(text: str) -> None:
    assert recall(text) == {}
