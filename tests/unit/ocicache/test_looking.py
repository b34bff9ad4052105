"""Verify and undelete, and what processes have open: what they say of what they did not do, and of what they did beside."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path

import pytest

from mothball.cache_fields import CachePolicy
from mothball.errors import InvalidParams
from mothball.ocicache.openfiles import OpenFiles
from mothball.ocicache.undelete import undelete
from mothball.ocicache.verify import verify
from tests.support import not_permitted
from tests.unit.ocicache.conftest import OLD, CacheYard, asides, names
from tests.unit.ocicache.test_prune_bad_input import as_user, for_everybody


def test_undelete_says_of_each_digest_that_is_not_in_quarantine_that_it_is_not(yard: CacheYard) -> None:
    one, other = yard.flat(40, 41)
    yard.prune(OLD)
    missing = f"sha256:{'0' * 64}"
    found = undelete(yard.cache(), data_dir=yard.data_dir, digests=[one.name, missing])
    assert (found.blobs, [each.path for each in found.left], names(yard.path)) == (1, [missing], {one.name})
    assert "not in quarantine" in found.left[0].reason
    assert undelete(yard.cache(), data_dir=yard.data_dir).blobs == 1
    assert other.exists()


def test_bad_input_a_digest_of_any_length_is_refused_in_few_words(yard: CacheYard) -> None:
    with pytest.raises(InvalidParams) as caught:
        undelete(yard.cache(), data_dir=yard.data_dir, digests=["x" * 200_000])
    assert len(str(caught.value)) < 200


def test_undelete_says_whose_quarantine_it_leaves_alone(yard: CacheYard) -> None:
    if os.geteuid() != 0:
        not_permitted("give a folder to another user")
    yard.flat(40)
    yard.prune(OLD)
    os.chown(yard.home / asides(yard.home)[0], 4321, 4321)
    found = undelete(yard.cache(), data_dir=yard.data_dir)
    assert (found.blobs, len(found.left)) == (0, 1)
    assert "user 4321" in found.left[0].reason


@pytest.mark.parametrize("user", ["owner", "other"])
def test_n04_verify_says_when_reading_made_blobs_of_another_user_look_used(yard: CacheYard, user: str) -> None:
    paths = yard.flat(40, 41)
    for_everybody(yard)
    if user == "owner":
        for each in paths:
            os.chown(each, 1234, 1234)
            yard.age(each, 40)
    code = """
from mothball.ocicache.verify import verify
print(verify(yard.cache(), data_dir=yard.data_dir, grace_ms=0).notes)
"""
    said = as_user(yard, code)
    days = (time.time() - paths[0].stat().st_atime) / 86_400
    if days > 39:  # nothing was changed: its owner, or a file system that does not note when files are read
        assert said == "[]"
    else:
        assert user == "other"
        assert "2 blob(s) belong to another user than this one (1234)" in said


def test_n04_a_blob_that_says_it_is_written_in_the_future_is_verified_all_the_same(yard: CacheYard) -> None:
    path = yard.blob(yard.path, b"half of it", lying=True, name="sha256:{}")
    yard.age(path, -1000)
    time.sleep(0.05)
    assert verify(yard.cache(), data_dir=yard.data_dir, grace_ms=1, delete=True).deleted == 1


def test_a_blob_with_another_name_that_says_it_is_written_in_the_future_goes_too(yard: CacheYard) -> None:
    path = yard.flat(-1000)[0]
    os.link(path, yard.home / "elsewhere")
    time.sleep(0.05)
    found = yard.prune(CachePolicy(max_bytes=1, grace=1, quarantine=0))
    assert (found.blobs_freed, found.kept) == (1, {})


def test_a_database_that_another_user_has_locked_is_open(yard: CacheYard) -> None:
    """Whose files are open /proc tells of other users' processes to root alone; which are locked, to everybody."""
    yard.path.mkdir()
    path = yard.path / "blob-info-cache-v1.sqlite"
    for_everybody(yard)
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("CREATE TABLE one (two)")
    yard.path.chmod(0o777)
    code = "from mothball.ocicache.openfiles import OpenFiles; import os\n"
    code += f"seen = os.stat({str(path)!r}); print(seen.st_ino in OpenFiles(seen.st_dev))"
    assert as_user(yard, code) == "False"
    database.execute("BEGIN EXCLUSIVE")
    try:
        if f":{path.stat().st_ino} " not in Path("/proc/locks").read_text():
            pytest.skip("/proc/locks does not tell of this file system's locks")
        assert as_user(yard, code) == "True"
    finally:
        database.close()
    assert path.stat().st_ino not in OpenFiles(path.stat().st_dev)
