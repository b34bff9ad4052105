"""The Lua itself: documented, deterministic, shipped with the package."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from mothball.registry import keys, scripts
from tests.integration.registry.support import INCLUDED, SCRIPTS, TASK, Bench

ALL = [*SCRIPTS, *INCLUDED]


def text(name: str) -> str:
    return (resources.files("mothball.registry") / "lua" / f"{name}.lua").read_text("utf-8")


def test_the_scripts_are_package_data() -> None:
    assert {"register", "submit", "claim", "finish", "ring"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_header_names_every_argument_and_what_is_returned(name: str) -> None:
    header = "".join(re.findall(r"^--.*\n", text(name), re.MULTILINE))
    assert header.startswith("-- include: common\n")
    assert "-- Returns " in header
    assert "-- ARGV  1 " in header
    for number in {int(each) for each in re.findall(r"\barg\((\d+)\)", text(name))}:
        assert re.search(rf"(ARGV  |   |--       ){number}(\.\.\.)? ", header), f"argument {number} is not named"


@pytest.mark.parametrize("name", ALL)
def test_a_script_is_bounded_and_deterministic(name: str) -> None:
    code = re.sub(r"--.*", "", text(name))
    for word in (
        "'KEYS'",
        "'SCAN'",
        "'HSCAN'",
        "math.random",
        "os.time",
        "'RANDOMKEY'",
        "while true",
        "'SPOP'",
        "'FLUSH",
    ):
        assert word not in code, word
    assert not re.search(r"\brepeat\b", code), "a loop that may not end"
    if name != "common":
        assert "'TIME'" not in code


def test_an_include_is_put_in_once() -> None:
    for name in SCRIPTS:
        assert scripts.source(name).count("local NS = ARGV[1]") == 1
        assert "-- include:" not in scripts.source(name)


def test_every_key_begins_with_the_namespace(bench: Bench) -> None:
    before = {key for key in bench.raw.scan_iter("*") if not key.startswith(bench.settings.namespace)}
    bench.workspace("o/r#1")
    claim = bench.run(lane="capture")
    assert claim.job is not None
    bench.registry.jobs.finish(claim.job.id, claim.fence, {})
    foreign = {key for key in bench.raw.scan_iter("*") if not key.startswith(bench.settings.namespace)} - before
    assert {key for key in foreign if not re.match(r"t[0-9a-f]{10}:", key)} == set()


def test_numbers_beyond_14_digits_are_written_whole(bench: Bench) -> None:
    bench.workspace("o/r#1")
    size = 2**53 - 1
    claim = bench.run()
    assert claim.job is not None
    bench.registry.jobs.finish(
        claim.job.id, claim.fence, {}, {"generation": 10**12, "bytes": size, "stored_bytes": size, "files": 10**14}
    )
    ws = bench.registry.workspaces.get("o/r#1")
    assert (ws.bytes, ws.high_water_bytes, ws.stored_bytes, ws.files, ws.generation) == (size, size, size, 10**14, 10**12)
    assert bench.counter("capture_stored_bytes") == size


def test_a_whole_job_takes_few_round_trips(bench: Bench) -> None:
    bench.workspace("o/r#1")

    def calls() -> int:
        return sum(each["calls"] for name, each in bench.raw.info("commandstats").items() if "evalsha" in name)

    def job() -> None:
        claim = bench.registry.jobs.claim(
            bench.registry.jobs.submit(TASK, {}, workspace="o/r#1", lane="capture").job.id, host="h1", worker="w", lease_ms=1000
        )
        assert claim.job is not None
        bench.registry.jobs.finish(claim.job.id, claim.fence, {}, {"generation": 0})

    job()
    before = calls()
    job()
    assert calls() - before == 3


def test_patterns_of_standing_keys_do_not_hide_records() -> None:
    assert not any(pattern in {"*", "ws:*", "job:*", "jobs:*", "lease:*"} for pattern in (*keys.STANDING, *keys.WHILE_BUSY))
