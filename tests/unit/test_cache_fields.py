"""Which folders may be declared as image caches, and what their policies say; N-03, N-10, N-12."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mothball.cache_fields import (
    DEFAULT_POLICY,
    FIELDS,
    MAX_CACHES,
    Cache,
    CachePolicy,
    check,
    check_place,
    clean_path,
    declared,
    merge,
    overlaps,
    parse_text,
    to_dict,
)
from mothball.errors import ConfigError, InvalidParams, PathNotAllowed
from mothball.settings import Settings
from workers.config import settings_env

HEX = "ab" * 32
DAY, GIB = 86_400_000, 1024**3


def test_n10_a_policy_in_words_is_read_with_units() -> None:
    words = f"older_than=30d,max_bytes=10GiB,reserve=1GiB,min_free=15%,keep=0a*|sha256:{HEX},grace=0,quarantine=2h"
    policy = merge(parse_text(words))
    assert policy == CachePolicy(
        older_than=30 * DAY, max_bytes=10 * GIB, reserve=GIB, min_free_percent=15.0, keep=("0a*", HEX), grace=0,
        quarantine=7_200_000,
    )  # fmt: skip
    assert merge(to_dict(policy)) == policy
    assert merge(to_dict(CachePolicy())) == CachePolicy()
    assert set(to_dict(policy)) == set(FIELDS)


@pytest.mark.parametrize(
    ("words", "total", "wanted"), [("min_free=15%", 1000, 150), ("min_free=5GiB", 1000, 5 * GIB), ("older_than=1d", 1000, None)]
)
def test_n10_free_space_is_bytes_or_a_part_of_the_disk(words: str, total: int, wanted: int | None) -> None:
    assert merge(parse_text(words)).wanted_free(total) == wanted


def test_a_caches_own_words_count_over_the_hosts_word_by_word_and_never_takes_one_away() -> None:
    [cache] = declared("/var/cache/oci,max_bytes=2GiB,min_free=5GiB")
    default = parse_text("older_than=30d,min_free=15%")
    assert cache.policy(default) == CachePolicy(older_than=30 * DAY, max_bytes=2 * GIB, min_free=5 * GIB)
    [cache] = declared("/var/cache/oci,older_than=never")
    assert cache.policy(default) == CachePolicy(min_free_percent=15.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("older_than", "not field=value"),
        ("older_than=", "not field=value"),
        ("age=3d", "unknown word 'age'"),
        ("older_than=3d,older_than=4d", "given twice"),
        ("older_than=3", "not a duration"),
        ("older_than=-3d", "not a duration"),
        ("older_than=0s", "more than nothing"),
        ("max_bytes=lots", "not a size"),
        ("max_bytes=0", "from 1 byte"),
        ("max_bytes=9999999999TiB", "8 PiB"),
        ("min_free=0%", "more than 0%"),
        ("min_free=100%", "less than 100%"),
        ("min_free=101%", "less than 100%"),
        ("min_free=-1%", "not a size"),
        ("reserve=never", "must be a size"),
        ("reserve=1GiB,max_bytes=1GiB", "must be less than max_bytes"),
        ("keep=../../etc/passwd", "no digest and no pattern"),
        (f"keep=sha512:{HEX}", "no digest and no pattern"),
        ("keep=" + "|".join("ab" for _ in range(300)), "at most 256"),
        ("grace=never", "must end"),
        ("quarantine=31d", "must end: at most 30d"),
    ],
)
def test_a_word_that_cannot_be_read_is_refused_and_named(words: str, said: str) -> None:
    with pytest.raises(InvalidParams, match=said):
        merge(parse_text(words))


@pytest.mark.parametrize(
    "raw", [None, [], "older_than=3d", {"keep": 3}, {"keep": [3]}, {"older_than": 3}, {"max_bytes": True}, {"keep": {}}, {3: 4}]
)
def test_words_of_a_job_are_checked_whatever_json_they_are(raw: Any) -> None:
    with pytest.raises(InvalidParams):
        check(raw)


def test_n03_caches_are_declared_with_kind_and_layouts() -> None:
    found = declared("/a/flat,kind=flat; /b/shared/,layouts=/l/one|/l/two,max_bytes=1GiB ;")
    assert found == (
        Cache(path="/a/flat", kind="flat"),
        Cache(path="/b/shared", layouts=("/l/one", "/l/two"), own={"max_bytes": "1GiB"}),
    )
    assert declared("") == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cache", "must be absolute"),
        ("/a/../etc", r"must not have '\.\.'"),
        ("/a,kind=docker", "unknown kind 'docker'"),
        ("/a,kind=flat,layouts=/l", "kind=flat has none"),
        ("/a,layouts=l", "must be absolute"),
        ("/a,flat", "not field=value"),
        ("/a,older_than=3", "cache '/a'"),
        ("/a;/a", "hold each other"),
        ("/a/b;/a", "hold each other"),
        (";".join(f"/c/{n}" for n in range(MAX_CACHES + 1)), "at most 64"),
        ("/a,layouts=" + "|".join(f"/l/{n}" for n in range(300)), "at most 256"),
        ("/a\0b", "must be absolute"),
        ("/" + "x" * 512, "longer than 512"),
    ],
)
def test_a_wrong_declaration_is_refused_and_says_which(text: str, said: str) -> None:
    with pytest.raises(InvalidParams, match=said):
        declared(text)


def test_a_path_is_cleaned_and_the_home_is_this_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/Users/me")
    assert clean_path("~/.cache/oci//x/.", "a cache") == "/Users/me/.cache/oci/x"
    assert clean_path("//srv/x", "a cache") == "/srv/x"
    assert overlaps("/a/b", "/a") and overlaps("/a", "/a/b") and not overlaps("/a/b", "/a/bc")


REFUSED = [
    ("/", "holds everything else"), ("/home", "holds everything else"), ("/tmp", "holds everything else"),
    ("/var/lib", "holds everything else"), ("/usr/share/x", "belongs to the system"), ("/etc", "belongs to the system"),
    ("/proc/self", "belongs to the system"), ("/Users/somebody", "home folder"), ("/Users/me/.cache", "of the home /Users/me"),
    ("/Users/me/.ssh", "of the home /Users/me"), ("/root", "holds everything else"), ("/ws/root", "workspace root"),
    ("/ws", "workspace root"), ("/data", "data dir"), ("/data/store", "data dir"), ("/", "everything"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "why"), REFUSED)
def test_n12_no_place_for_a_cache(path: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/Users/me")
    with pytest.raises(PathNotAllowed, match=why):
        check_place(path, roots=["/ws/root"], data_dir="/data")


@pytest.mark.parametrize(
    "path", ["/Users/me/.cache/banger/oci", "/var/cache/banger/oci", "/srv/oci", "/tmp/oci", "/ws/other", "/data2"]
)
def test_n02_a_place_for_a_cache(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/Users/me")
    check_place(path, roots=["/ws/root"], data_dir="/data")


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_caches": "/"},
        {"image_caches": "~"},
        {"image_caches": "relative"},
        {"image_caches": "/srv/a,reserve=2GiB,max_bytes=1GiB"},
        {"image_caches": "/srv/a,max_bytes=1GiB", "image_cache_policy": "reserve=2GiB"},
        {"image_cache_policy": "older_than=3"},
        {"image_cache_policy": "kind=flat"},
        {"cache_high_percent": 80, "cache_low_percent": 80},
        {"cache_high_percent": 101},
        {"cache_low_percent": 0},
        {"cache_seconds": 0},
        {"cache_pressure_seconds": 0},
    ],
)
def test_settings_refuse_wrong_caches_with_the_reason(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Settings.load(**wrong)


def test_n12_a_cache_in_the_data_dir_or_above_a_workspace_root_stops_the_process(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data dir"):
        Settings.load(data_dir=tmp_path / "data", image_caches=str(tmp_path / "data" / "store"))
    with pytest.raises(ConfigError, match="workspace root"):
        Settings.load(data_dir=tmp_path / "data", workspace_roots=(tmp_path / "ws",), image_caches=str(tmp_path / "ws"))


def test_caches_reach_a_child_process_as_they_were_declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"{tmp_path}/a,kind=flat,keep=0a*|1b*;{tmp_path}/b,layouts={tmp_path}/l|{tmp_path}/m"
    settings = Settings.load(data_dir=tmp_path / "data", image_caches=text)
    for name, value in settings_env(settings).items():
        monkeypatch.setenv(name, value)
    assert Settings.load().caches == settings.caches
    assert [cache.kind for cache in settings.caches] == ["flat", None]
    assert Settings.load(image_caches="").image_cache_policy == DEFAULT_POLICY
