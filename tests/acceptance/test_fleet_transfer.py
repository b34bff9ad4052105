"""workspace.push, workspace.pull and `mothball export`: through the fleet, and through the command line."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mothball.client import Fleet
from mothball.errors import Cancelled, NotFound
from mothball.store import Store
from mothball.store.snapshots import snapshots
from mothball.store.tree import Tree
from tests.acceptance.command import Command
from tests.acceptance.fleet import FleetRun
from tests.acceptance.registry import Fault, ImageRegistry, Middleman, Request, docker_config, htpasswd, image_registry
from tests.support import eventually

__all__ = ["image_registry"]


def tree_of(fleet: FleetRun, name: str = "r/a#1", size: int = 0) -> Path:
    """A registered workspace with two files, captured."""
    folder = fleet.folder / "trees" / "a"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("read me\n")
    (folder / "random").write_bytes(os.urandom(size or 1000))
    fleet.workspace(name, path=folder)
    assert fleet.finished(fleet.submit("workspace.capture", workspace=name)).state == "succeeded"
    return folder


@pytest.fixture
def command(fleet: FleetRun) -> Iterator[Command]:
    settings = fleet.settings
    run = Command(
        fleet.folder, data_dir=settings.data_dir, redis_url=settings.redis_url.get_secret_value(), namespace=settings.namespace,
        host=settings.host, workspace_roots=settings.workspace_roots[0],
    )  # fmt: skip
    yield run
    run.kill_all()


def test_a_capture_goes_to_a_registry_and_comes_back_as_the_next_snapshot(
    fleet: FleetRun, command: Command, image_registry: ImageRegistry
) -> None:
    fleet.worker()
    folder = tree_of(fleet)
    target = f"{image_registry.address}/team/a:first"
    first = fleet.registry.workspaces.get("r/a#1")
    with Fleet(settings=fleet.settings) as client:
        pushed = client.push("r/a#1", target).wait(30)
        assert (pushed.ref, pushed.reference, pushed.digest, pushed.uploaded) == ("latest", target, first.digest, 2)
        (folder / "README.md").write_text("edited\n")
        client.capture("r/a#1").wait(30)
        pulled = client.pull("r/a#1", target, label="as it was").wait(30)
        assert (pulled.name, pulled.digest, pulled.fetched, pulled.skipped) == ("snap-1", first.digest, 0, 2)
        assert client.pull("r/a#1", f"{image_registry.address}/team/a@{first.digest}").wait(30).name == "snap-2"
        assert client.push("r/a#1", f"{image_registry.address}/team/a:again", ref="snap-1").wait(30).digest == first.digest
        with pytest.raises(NotFound):
            client.push("r/a#1", target, ref="snap-9").wait(30)
    refs = Store(fleet.settings.store_dir).refs("r/a#1")
    made = snapshots(refs)
    assert [(each.name, each.digest, each.label, each.files, each.bytes) for each in made] == [
        ("snap-1", first.digest, "as it was", 2, 1008), ("snap-2", first.digest, "", 2, 1008),
    ]  # fmt: skip
    assert refs.get("snap-1").get("pulled-from") == target
    assert refs.get("latest").digest != first.digest
    record = fleet.registry.workspaces.get("r/a#1")
    assert (record.snapshots, record.digest) == (2, refs.get("latest").digest)
    listed = command("snapshots", "r/a#1", "--json")
    assert [item["name"] for item in listed.json()] == ["snap-1", "snap-2"]


def test_a_workspace_on_a_fresh_host_gets_its_content_from_a_registry(fleet: FleetRun, image_registry: ImageRegistry) -> None:
    fleet.worker()
    tree_of(fleet)
    target = f"{image_registry.address}/a:1"
    assert fleet.finished(fleet.submit("workspace.push", workspace="r/a#1", to=target)).state == "succeeded"
    fleet.workspace("r/b#1")
    job = fleet.finished(fleet.submit("workspace.pull", workspace="r/b#1", reference=target))
    assert job.state == "succeeded", job.error
    store = Store(fleet.settings.store_dir)
    with Tree.open(store, store.refs("r/b#1").get("snap-1").digest) as tree:
        assert tree.read("README.md") == b"read me\n"
    assert fleet.registry.workspaces.get("r/b#1").snapshots == 1


def test_a_push_that_its_worker_did_not_survive_is_finished_by_the_next(fleet: FleetRun, image_registry: ImageRegistry) -> None:
    fleet.worker()
    fleet.beat()
    tree_of(fleet, size=100_000)
    slow: list[int] = []

    def rule(request: Request) -> Fault | None:
        if request.method == "PUT" and "digest=" in request.path and len(slow) < 3:
            slow.append(1)
            return Fault(status=503, headers={"Retry-After": "2"})
        return None

    with Middleman(image_registry.address, rule) as middle:
        job = fleet.submit("workspace.push", workspace="r/a#1", to=f"{middle.address}/a:1")
        fleet.until(lambda: slow, "the push is in the middle of a blob")
        fleet.processes[0].kill()
        fleet.worker("w2")
        done = fleet.finished(job, seconds=60)
        assert (done.state, done.deliveries) == ("succeeded", 2), done.error


def test_a_push_can_be_cancelled_and_shows_its_progress(fleet: FleetRun, image_registry: ImageRegistry) -> None:
    fleet.worker()
    tree_of(fleet)
    busy = Fault(status=503, headers={"Retry-After": "30"})
    with Middleman(image_registry.address, lambda _: busy) as middle, Fleet(settings=fleet.settings) as client:
        handle = client.push("r/a#1", f"{middle.address}/a:1")
        eventually(lambda: handle.progress().get("total_bytes", 0) > 0 and middle.requests, what="progress with a total")
        assert handle.progress()["step"] == "push"
        assert handle.cancel()
        with pytest.raises(Cancelled):
            handle.wait(20)
    assert fleet.job(handle.id).state == "cancelled"


def test_the_commands_push_pull_and_explain_a_refusal(fleet: FleetRun, command: Command, tmp_path: Path) -> None:
    config = tmp_path / "docker.json"
    with ImageRegistry(tmp_path / "closed", htpasswd(tmp_path / "auth")) as registry:
        fleet.worker(docker_config=config)
        tree_of(fleet)
        target = f"{registry.address}/a:1"
        refused = command("export", "r/a#1", "--push", target, "--json")
        assert refused.code == 78
        error = json.loads(refused.err)["error"]
        assert error["code"] == "registry_denied"
        assert str(config) in error["message"]
        docker_config(config, registry.address)
        pushed = command("export", "r/a#1", "--push", target, "--json")
        assert (pushed.code, pushed.err) == (0, "")
        assert pushed.json()["result"]["reference"] == target
        pulled = command("pull", "r/a#1", target, "--label", "back")
        assert pulled.code == 0, pulled.err
        assert pulled.out.startswith(b"snap-1  " + pushed.json()["result"]["digest"].encode())
        later = command("pull", "r/a#1", target, "--no-wait", "--json")
        assert fleet.finished(later.json()["job"]).state == "succeeded"


def test_export_writes_files_and_replaces_none(fleet: FleetRun, command: Command, tmp_path: Path) -> None:
    fleet.worker()
    tree_of(fleet)
    digest = fleet.registry.workspaces.get("r/a#1").digest
    out = tmp_path / "out"
    out.mkdir()
    for options in (["--tar"], ["--oci"], ["--oci-archive", "--gzip"]):
        name = out / "".join(options).strip("-")
        argv = ["export", "r/a#1", options[0], str(name), *options[1:], "--json"]
        done = command(*argv)
        assert (done.code, done.err) == (0, ""), done.err
        found = done.json()
        assert name.exists()
        assert found.get("source", found["digest"]) == digest
    again = command(*argv)
    assert (again.code, json.loads(again.err)["error"]["code"]) == (73, "already_exists")
    assert sorted(path.name for path in out.iterdir()) == ["oci", "oci-archive--gzip", "tar"]
    piped = command("export", "r/a#1", "latest", "--tar", "-")
    assert (piped.code, piped.out) == (0, (out / "tar").read_bytes())
    with tarfile.open(out / "tar") as archive:
        assert archive.getnames() == [".", "README.md", "random"]
    text = command("export", "r/a#1", digest, "--oci", str(out / "text"), "--name", "v1")
    assert text.out.decode().splitlines()[0] == f"oci:{out / 'text'}:v1"
