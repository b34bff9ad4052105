"""Looking into captures and verifying them, as commands and as jobs, on a real Redis and a real store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mothball.errors import InvalidParams, MothballError
from mothball.settings import Settings
from mothball.store.manifest import load_manifest
from tasks import services
from tasks.verify import _bounded, verify_all
from tests.commands import Answer, beside_jobs
from tests.integration.test_snapshot_jobs import ID, Here
from tests.unit.store.build import damage
from workers.redis_server import RedisServer


@pytest.fixture
def here(redis_server: RedisServer, make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Here]:
    """A workspace with one snapshot, and changes since."""
    found = Here(make_settings(), tmp_path / "ws")
    (found.folder / "sub").mkdir()
    (found.folder / "sub" / "c.txt").write_text("c\n")
    found.run("workspace.snapshot", fresh=True)
    (found.folder / "a.txt").write_text("changed\n")
    (found.folder / "b.txt").unlink()
    (found.folder / "sub" / "c.txt").chmod(0o755)
    (found.folder / "new.txt").write_text("new\n")
    yield found
    found.close()


@pytest.fixture
def cli(here: Here, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """`cli("diff", ...)`: one command line in this process, with the settings of `here`."""
    return beside_jobs(here.settings, monkeypatch, capfd)


EXPECTED = "M a.txt\nD b.txt\nA new.txt\nP sub/c.txt  (mode 0644, now 0755)\n"


def test_diff_without_more_says_what_changed_on_disk_since_the_latest_capture(here: Here, cli: Callable[..., Answer]) -> None:
    assert cli("diff", ID) == Answer(0, EXPECTED, "")
    assert cli("diff", ID, "--exit-code").code == 1
    assert cli("diff", ID, "latest", "disk", "sub").out == "P sub/c.txt  (mode 0644, now 0755)\n"
    assert cli("diff", ID, "--name-only").out.split() == ["a.txt", "b.txt", "new.txt", "sub/c.txt"]
    assert "t ." in cli("diff", ID, "--times").out
    here.run("workspace.capture")
    assert cli("diff", ID, "--exit-code") == Answer(0, "", "")
    assert cli("diff", ID, "snap-1", "latest").out == EXPECTED
    assert cli("diff", ID, "latest", "snap-1", "--name-only").out.split() == ["a.txt", "b.txt", "new.txt", "sub/c.txt"]


def test_diff_has_totals_json_and_a_patch(cli: Callable[..., Answer]) -> None:
    assert cli("diff", ID, "--stat").out == (
        "1 added, 1 deleted, 1 changed, 1 with another mode, 1 with another time\n12 B in what is new or changed, 12 B before\n"
    )
    assert cli("diff", ID, "--stat", "--json").json()["changed"] == 1
    found = {item["path"]: item for item in cli("diff", ID, "--json").json()}
    assert {path: item["kind"] for path, item in found.items()} == {
        "a.txt": "changed", "b.txt": "deleted", "new.txt": "added", "sub/c.txt": "mode",
    }  # fmt: skip
    assert (found["b.txt"]["after"], found["new.txt"]["before"], found["sub/c.txt"]["after"]["mode"]) == (None, None, "0755")
    patch = cli("diff", ID, "--unified").out
    assert "--- a/a.txt\n+++ b/a.txt\n@@ -1 +1 @@\n-first\n+changed\n" in patch
    assert "old mode 100644\nnew mode 100755\n" in patch


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (("diff", ID, "disk", "latest"), 2, "only be B"),
        (("diff", ID, "--stat", "--unified"), 2, "exclude each other"),
        (("diff", ID, "--unified", "--json"), 2, "no JSON form"),
        (("diff", ID, "latest", "snap-9"), 1, "snap-9"),
        (("diff", ID, "latest", "disk", "nowhere"), 1, "nowhere"),
        (("diff", ID, "latest", "disk", "../.."), 2, ".."),
        (("diff", "nobody"), 1, "nobody"),
        (("verify", "--deep", "--content"), 2, "exclude each other"),
        (("verify", "--sample", "0"), 2, "no share"),
        (("verify", "--seed", "3"), 2, "--sample"),
        (("verify", "--no-wait"), 2, "--host"),
        (("verify", "--repair-from", "no reference"), 2, "no reference"),
    ],
)
def test_what_cannot_be_is_said_with_its_exit_code(cli: Callable[..., Answer], argv: tuple[str, ...], code: int, text: str) -> None:
    answer = cli(*argv)
    assert (answer.code, answer.out) == (code, "")
    assert text in answer.err


def test_a_damaged_store_fails_the_command_and_names_blob_and_captures(here: Here, cli: Callable[..., Answer]) -> None:
    assert cli("verify", "--deep").code == 0
    layer = load_manifest(here.store.blobs, here.store.refs(ID).get().digest).layers[0].digest
    damage(here.store, layer, 30)
    assert cli("verify").code == 0
    answer = cli("verify", "--deep")
    assert answer.code == 1
    assert f"damaged: {layer}: " in answer.out
    assert f"(harms {ID}:latest, {ID}:snap-1)" in answer.out
    found = cli("verify", ID, "--content", "--json")
    assert (found.code, [item["digest"] for item in found.json()["problems"]]) == (1, [layer])


def test_the_job_says_what_is_damaged_and_does_not_fail(here: Here) -> None:
    host = here.settings.host
    clean = here.run("store.verify", host=host, level="content")
    assert (clean["problems"], clean["problems_more"], clean["level"]) == ([], 0, "content")
    layer = load_manifest(here.store.blobs, here.store.refs(ID).get().digest).layers[0].digest
    damage(here.store, layer, 30)
    found = here.run("store.verify", host=host, level="sample", sample_percent=100.0, seed=5)
    assert [(item["digest"], item["refs"]) for item in found["problems"]] == [(layer, [f"{ID}:latest", f"{ID}:snap-1"])]
    assert (found["seed"], found["sample"]) == (5, 100.0)
    events = here.registry.events.list(kind="store.damaged")
    assert len(events) == 1
    assert (events[0].fields["host"], json.loads(events[0].fields["blobs"])) == (host, [layer])


def test_another_hosts_store_is_verified_by_a_job_there(here: Here, cli: Callable[..., Answer]) -> None:
    argv = ("verify", ID, "--host", here.settings.host, "--sample", "12.5%", "--seed", "4")
    job = here.registry.jobs.get(cli(*argv, "--no-wait", "--json").json()["job"])
    assert (job.task, job.host, job.workspace) == ("store.verify", here.settings.host, None)
    found = here.deliver(job)
    assert (found["level"], found["sample"], found["seed"], found["refs"]) == ("sample", 12.5, 4, 2)
    assert here.fleet.job(job.id).wait(5) == found
    assert cli(*argv, "--timeout", "10ms").code == 75


@pytest.mark.parametrize(
    "args", [{"level": "all"}, {"sample_percent": 0.0}, {"sample_percent": 101.0}, {"seed": -1}, {"deep": True}]
)
def test_wrong_arguments_are_refused(here: Here, args: dict[str, Any]) -> None:
    job = here.submit("store.verify", host=here.settings.host, **args)
    try:
        here.deliver(job)
    except MothballError as error:
        assert isinstance(error, InvalidParams)
    assert here.registry.jobs.get(job.id).error_code == "invalid_params"


def test_the_sweep_asks_every_online_host_once(here: Here) -> None:
    here.registry.hosts.heartbeat("other", {})
    assert verify_all(services.current()) == {"asked": 2, "joined": 0, "failed": 0}
    assert verify_all(services.current()) == {"asked": 0, "joined": 2, "failed": 0}
    waiting = [job for job in here.registry.jobs.list(state="queued") if job.task == "store.verify"]
    assert {job.host for job in waiting} == {here.settings.host, "other"}
    mine = next(job for job in waiting if job.host == here.settings.host)
    found = here.deliver(mine)
    assert (found["level"], found["sample"], found["problems"]) == ("sample", here.settings.verify_sample_percent, [])


def test_an_outcome_fits_into_redis_however_much_is_damaged() -> None:
    problems = [
        {"digest": f"sha256:{number:064x}", "refs": [f"{'w' * 120}{each}:latest" for each in range(500)], "reason": "r" * 300}
        for number in range(2000)
    ]
    found = _bounded({"problems": problems, "repaired": ["x" * 71] * 5000, "unrepaired": [["x" * 71, "y" * 500]] * 5000})
    assert len(json.dumps(found)) < 128 * 1024
    assert len(found["problems"]) + found["problems_more"] == 2000
    assert len(found["problems"][0]["refs"]) + found["problems"][0]["refs_more"] == 500
    assert len(found["repaired"]) + found["repaired_more"] == 5000
