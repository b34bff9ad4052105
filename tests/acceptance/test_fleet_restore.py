"""Restores as jobs and as commands: done, refused, cancelled, killed and continued, interrupted, and from a registry."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mothball.client import Fleet
from mothball.errors import InvalidParams
from mothball.package.remote import push
from mothball.settings import Settings
from mothball.store import Store
from tests.acceptance.command import Command
from tests.acceptance.fleet import FleetRun
from tests.acceptance.registry import ImageRegistry, image_registry
from tests.support import eventually
from tests.unit.store.build import Dir, File, capture, layer
from tests.unit.store.restoring import contents, leftovers

__all__ = ["image_registry"]
WORKSPACE = "r/restore#1"
SMALL = {b"a": File(b"one"), b"d": Dir(), b"d/b": File(b"two")}
FILES = 20_000
MANY = {b"d%02d" % number: Dir() for number in range(50)} | {
    b"d%02d/f%05d" % (number % 50, number): File(b"%d\n" % number) for number in range(FILES)
}


def stored(settings: Settings, spec: object = SMALL) -> str:
    """A capture of `spec` in the host's store, as the latest of the workspace; returns its digest."""
    store = Store(settings.store_dir, fsync=False)
    store.prepare()
    return capture(store, layer(spec, frame_bytes=256 * 1024), workspace=WORKSPACE)  # type: ignore[arg-type]


def half_done(target: Path) -> bool:
    """True when a restore beside `target` has made some files."""
    tree = target.with_name(f".{target.name}.mothball-restore") / "tree"
    return tree.is_dir() and any(os.listdir(folder) for folder in tree.iterdir())


def complete(target: Path) -> bool:
    return sum(len(files) for _, _, files in os.walk(target)) == FILES


def test_a_plain_producer_restores_and_what_is_wrong_is_said(fleet: FleetRun, tmp_path: Path) -> None:
    fleet.worker()
    fleet.workspace(WORKSPACE)
    stored(fleet.settings)
    target = tmp_path / "back"
    kwargs = {"workspace": WORKSPACE, "to": str(target)}
    outcome = fleet.producer().send_task("workspace.restore", kwargs=kwargs, queue="dispatch").get(timeout=30)
    assert contents(target) == {"a": "one", "d": "/", "d/b": "two"}
    assert (outcome["written"], outcome["files"], outcome["resumed"]) == (4, 2, False)
    cases = {
        "already_exists": {"to": str(target)},
        "path_not_allowed": {"to": "/elsewhere/x"},
        "not_found": {"to": str(tmp_path / "other"), "ref": "snap-9"},
        "invalid_params": {"to": str(target), "delete_extra": True},
    }
    for code, args in cases.items():
        job = fleet.finished(fleet.submit("workspace.restore", workspace=WORKSPACE, **args))
        assert (job.state, job.error_code) == ("failed", code), job
    with Fleet(settings=fleet.settings) as client:
        (target / "a").write_text("mine")
        planned = client.restore(WORKSPACE, str(target), overwrite="changed", dry_run=True).wait(timeout=30)
        assert [(each.action, each.path) for each in planned.actions] == [("write", "a")]
        assert client.restore(WORKSPACE, str(target), overwrite="changed").wait(timeout=30).written == 1
        with pytest.raises(InvalidParams, match="push"):
            client.restore(WORKSPACE, str(target), host="elsewhere")
        with pytest.raises(InvalidParams, match="absolute"):
            client.restore(WORKSPACE, "relative")
    assert leftovers(tmp_path) == []


def test_a_cancelled_restore_leaves_nothing(fleet: FleetRun, tmp_path: Path) -> None:
    fleet.worker()
    fleet.workspace(WORKSPACE)
    stored(fleet.settings, MANY)
    target = tmp_path / "back"
    job = fleet.submit("workspace.restore", workspace=WORKSPACE, to=str(target))
    eventually(lambda: half_done(target), seconds=20, every=0.002, what="files are made")
    fleet.registry.jobs.cancel(job)
    ended = fleet.finished(job)
    if ended.state == "succeeded":  # a machine that made the rest within one look at the registry
        assert complete(target)
    else:
        assert ended.state == "cancelled"
        assert not target.exists()
    assert leftovers(tmp_path) == []


def test_a_killed_restore_is_continued_by_the_next_worker(fleet: FleetRun, tmp_path: Path) -> None:
    worker = fleet.worker()
    fleet.workspace(WORKSPACE)
    stored(fleet.settings, MANY)
    target = tmp_path / "back"
    job = fleet.submit("workspace.restore", workspace=WORKSPACE, to=str(target))
    eventually(lambda: half_done(target), seconds=20, every=0.002, what="files are made")
    worker.kill()
    assert not target.exists(), "the restore was over before it could be killed"
    fleet.worker("w2")
    fleet.beat()
    ended = fleet.finished(job, seconds=60)
    assert (ended.state, ended.deliveries) == ("succeeded", 2), ended
    assert ended.outcome is not None
    assert ended.outcome["resumed"]
    assert complete(target)
    assert leftovers(tmp_path) == []


def test_a_capture_is_restored_from_a_registry_on_any_host(fleet: FleetRun, tmp_path: Path, image_registry: ImageRegistry) -> None:
    """The workspace and its store are elsewhere: this host has neither."""
    elsewhere = fleet.with_settings(data_dir=tmp_path / "elsewhere", host="elsewhere")
    digest = stored(elsewhere)
    reference = f"{image_registry.address}/team/tree:v1"
    push(Store(elsewhere.store_dir), digest, reference, elsewhere)
    fleet.worker()
    with Fleet(settings=fleet.settings) as client:
        result = client.restore(None, str(tmp_path / "back"), source=reference).wait(timeout=60)
    assert result.digest == digest
    assert contents(tmp_path / "back") == {"a": "one", "d": "/", "d/b": "two"}
    job = fleet.finished(fleet.submit("store.restore", host=fleet.settings.host, source=reference, to="/elsewhere/x"))
    assert job.error_code == "path_not_allowed"
    run = Command(tmp_path, data_dir=tmp_path / "third", redis_url="redis://127.0.0.1:1", host="third")
    done = run("restore", "--from", reference, "--to", str(tmp_path / "by-command"))
    assert done.code == 0, done.err
    assert contents(tmp_path / "by-command") == contents(tmp_path / "back")


def test_a_restore_from_a_registry_that_fails_for_good_leaves_nothing_of_its_earlier_runs(
    fleet: FleetRun, tmp_path: Path, image_registry: ImageRegistry
) -> None:
    """The first run was killed while it wrote; the second finds that the capture is no longer there to be fetched."""
    elsewhere = fleet.with_settings(data_dir=tmp_path / "elsewhere", host="elsewhere")
    reference = f"{image_registry.address}/team/tree:v1"
    push(Store(elsewhere.store_dir), stored(elsewhere, MANY), reference, elsewhere)
    worker, target = fleet.worker(), tmp_path / "back"
    job = fleet.submit("store.restore", host=fleet.settings.host, source=reference, to=str(target))
    eventually(lambda: half_done(target), seconds=30, every=0.002, what="files are made")
    worker.kill()
    assert leftovers(tmp_path) != []
    shutil.rmtree(image_registry.folder / "data/docker/registry/v2/repositories/team")
    fleet.worker("w2")
    fleet.beat()
    ended = fleet.finished(job, seconds=60)
    assert (ended.state, ended.error_code) == ("failed", "not_found"), ended
    assert not target.exists()
    assert leftovers(tmp_path) == []


def test_the_command_restores_without_any_server(tmp_path: Path, make_settings: Callable[..., Settings]) -> None:
    settings = make_settings()
    digest = stored(settings)
    run = Command(tmp_path, data_dir=settings.data_dir, redis_url="redis://127.0.0.1:1", host=settings.host)
    target = tmp_path / "back"
    planned = run("restore", WORKSPACE, "--to", str(target), "--dry-run")
    assert (planned.code, target.exists()) == (0, False), planned.err
    assert b"write     d/b\n" in planned.out
    done = run("restore", WORKSPACE, "latest", "--to", str(target), "--json")
    assert (done.code, done.json()["digest"], done.json()["written"]) == (0, digest, 4), done.err
    again = run("restore", WORKSPACE, "--to", str(target))
    assert again.code == 73
    assert "overwrite" in again.err
    (target / "a").write_text("mine")
    (target / "extra").write_text("x")
    some = run("restore", WORKSPACE, "--to", str(target), "--overwrite", "changed", "--delete-extra", "--include", "d")
    assert (some.code, contents(target)["a"]) == (0, "mine")
    every = run("restore", WORKSPACE, "--to", str(target), "--overwrite", "changed", "--delete-extra")
    assert every.code == 0
    assert contents(target) == {"a": "one", "d": "/", "d/b": "two"}
    assert b"delete    extra\n" in every.out
    for wrong in (["--to", "x"], [WORKSPACE, "--to", "x", "--from", "a/b:c"], [WORKSPACE, "--to", "x", "--no-wait"]):
        assert run("restore", *wrong).code == 2


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Tests may have been started where Ctrl-C is ignored (behind a shell's ``&``), which a started program inherits."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupted_command_says_how_to_go_on_and_goes_on(tmp_path: Path, make_settings: Callable[..., Settings]) -> None:
    settings = make_settings()
    stored(settings, MANY)
    run = Command(tmp_path, data_dir=settings.data_dir, redis_url="redis://127.0.0.1:1", host=settings.host)
    target = tmp_path / "back"
    process = run.start("restore", WORKSPACE, "--to", str(target), log=tmp_path / "log")
    eventually(lambda: half_done(target), seconds=20, every=0.002, what="files are made")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130, (tmp_path / "log").read_text()
    assert "the same command goes on" in (tmp_path / "log").read_text()
    assert not target.exists()
    done = run("restore", WORKSPACE, "--to", str(target), "--json")
    assert (done.code, done.json()["resumed"]) == (0, True), done.err
    assert done.json()["unchanged"] > 0
    assert complete(target)
    assert leftovers(tmp_path) == []


def test_a_restore_that_can_not_be_done_is_given_up_and_leaves_nothing(fleet: FleetRun, tmp_path: Path) -> None:
    fleet.worker()
    fleet.workspace(WORKSPACE)
    digest = stored(fleet.settings, MANY)
    store = Store(fleet.settings.store_dir)
    blobs = sorted(store.blobs.folder.iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(blobs[-1].read_bytes())
    data[len(data) // 3] ^= 1  # a frame in the middle
    blobs[-1].write_bytes(data)
    begin = time.monotonic()
    job = fleet.finished(fleet.submit("workspace.restore", workspace=WORKSPACE, ref=digest, to=str(tmp_path / "back")))
    assert (job.state, job.error_code, job.attempts) == ("failed", "corrupt", 1), job
    assert time.monotonic() - begin < 30
    assert leftovers(tmp_path) == []
