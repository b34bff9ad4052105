"""What a tar is: a crash package, a bundle or any other."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from mothball.errors import Corrupt
from mothball.package.tarlook import is_tar, look
from tests.unit.package.test_stim_parts import CONFIG, FOLDER, member, tar_of

REPORT: dict[str, Any] = {
    "schema": "dev.mothball.crash-report/1", "id": "crash-r-20260101-000000Z-00000000", "time": "2026-01-01T00:00:00.000Z",
    "workspace": {"id": "owner/repo#7", "repo": "owner/repo"}, "error": {"title": "boom", "signature": "0" * 16},
    "capture": {"digest": "sha256:" + "a" * 64, "source": "fresh"}, "package": {"files": 3}, "redactions": {"total": 2},
}  # fmt: skip


def seen(tar: bytes) -> dict[str, Any]:
    assert is_tar(tar[:512])
    return look(io.BytesIO(tar), "x.tar")


def test_b119_a_crash_package_says_what_it_reports() -> None:
    found = seen(
        tar_of(
            member("config.json", b'{"ociVersion":"1.0.2","process":{"args":["/bin/sh"]}}'),
            member("report.json", json.dumps(REPORT).encode()),
            member("rootfs", **FOLDER),
            member("rootfs/workspace/a", b"abc"),
        )
    )
    assert (found["format"], found["members"], found["files"], found["oci_version"]) == ("crash-package", 4, 3, "1.0.2")
    assert found["args"] == ["/bin/sh"]
    assert found["report"] == {
        "schema": "dev.mothball.crash-report/1", "id": REPORT["id"], "time": REPORT["time"], "workspace": "owner/repo#7",
        "repo": "owner/repo", "title": "boom", "signature": "0" * 16, "capture": REPORT["capture"]["digest"], "source": "fresh",
        "files": 3, "redactions": 2,
    }  # fmt: skip


def test_a_bundle_and_any_other_tar_are_told_apart() -> None:
    assert seen(tar_of(member("config.json", CONFIG), member("rootfs/a", b"x")))["format"] == "bundle"
    assert seen(tar_of(member("config.json", CONFIG)))["format"] == "tar"
    assert seen(tar_of(member("a", b"x")))["format"] == "tar"


@pytest.mark.parametrize("report", [b"", b"[]", b"{", b"[" * 100_000, b'{"schema":"other"}', b'{"schema":7}'])
def test_a_report_that_is_none_is_not_shown(report: bytes) -> None:
    found = seen(tar_of(member("config.json", CONFIG), member("report.json", report), member("rootfs", **FOLDER)))
    assert found["format"] == "bundle"
    assert "report" not in found


@pytest.mark.parametrize("part", ["workspace", "error", "capture", "package", "redactions"])
def test_a_report_that_lies_about_its_form_is_an_answer_all_the_same(part: str) -> None:
    report = json.dumps({**REPORT, part: ["not", "an", "object"]}).encode()
    found = seen(tar_of(member("config.json", b'{"process":[]}'), member("report.json", report), member("rootfs", **FOLDER)))
    assert found["report"]["id"] == REPORT["id"]
    assert found["args"] is None


def test_what_somebody_put_in_place_of_a_text_is_not_repeated() -> None:
    report = json.dumps({**REPORT, "id": [["x"] * 100], "time": 1e300, "error": {"title": "t" * 10_000}}).encode()
    config = json.dumps({"ociVersion": {}, "process": {"args": ["a" * 1000, {}, *("b" * 100)]}}).encode()
    found = seen(tar_of(member("config.json", config), member("report.json", report), member("rootfs", **FOLDER)))
    assert (found["report"]["id"], found["report"]["time"], found["oci_version"]) == (None, None, None)
    assert len(found["report"]["title"]) == 300
    assert found["args"][:3] == ["a" * 300, None, "b"]
    assert len(found["args"]) == 50


def test_a_package_that_is_cut_is_damaged() -> None:
    whole = tar_of(member("config.json", CONFIG), member("rootfs/a", b"x" * 5000))
    with pytest.raises(Corrupt):
        look(io.BytesIO(whole[:4000]), "x.tar")


def test_what_is_no_tar_is_none() -> None:
    for head in (b"", b"x" * 512, bytes(512), tar_of(member("a"))[:511]):
        assert not is_tar(head)
