"""Push and pull against a real registry: what is sent, what is not sent twice, and what every kind of trouble leads to."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mothball.errors import (
    Corrupt,
    InvalidParams,
    MothballError,
    NoSpace,
    NotFound,
    OperationFailed,
    RegistryDenied,
    RegistryUnavailable,
)
from mothball.package import distribution, download, remote, upload
from mothball.package.remote import pull, push
from mothball.package.repair import repair
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.manifest import load_manifest
from mothball.store.tree import Tree
from mothball.store.verify import verify
from tests.acceptance.registry import (
    PASSWORD,
    Fault,
    ImageRegistry,
    Middleman,
    Request,
    TokenServer,
    docker_config,
    htpasswd,
    image_registry,
)
from tests.unit.store.build import Blob, Dir, File, Spec, capture, damage, layer, new_store, pack

__all__ = ["image_registry"]
CHUNK = 64 * 1024
BIG = 5 * CHUNK + 1000


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks and short pauses: the same paths, in less time."""
    monkeypatch.setattr(upload, "CHUNK", CHUNK)
    monkeypatch.setattr(distribution, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(distribution, "PIECE", 16 * 1024)


@pytest.fixture
def settings(make_settings: Callable[..., Settings], tmp_path: Path) -> Settings:
    return make_settings(docker_config=tmp_path / "docker.json")


@pytest.fixture
def here(tmp_path: Path) -> Store:
    return new_store(tmp_path / "here")


@pytest.fixture
def there(tmp_path: Path) -> Store:
    return new_store(tmp_path / "there")


@pytest.fixture
def middle(image_registry: ImageRegistry) -> Iterator[Middleman]:
    with Middleman(image_registry.address) as man:
        yield man


def big_layer(size: int = BIG) -> Blob:
    return layer({b"": Dir(), b"random": File(os.urandom(size)), b"small": File(b"small")}, frame_bytes=32 * 1024)


def names(store: Store) -> set[str]:
    return {path.name for path in store.blobs.folder.iterdir()}


def whole(store: Store, digest: str, content: dict[str, bytes]) -> None:
    """The capture is there with this content, and nothing is left in tmp."""
    with Tree.open(store, digest) as tree:
        for path, data in content.items():
            assert tree.read(path) == data
    assert list(store.blobs.temp.iterdir()) == []


# -- there and back -----------------------------------------------------------------------------------------------------


def test_a_capture_comes_back_byte_for_byte(here: Store, there: Store, settings: Settings, image_registry: ImageRegistry) -> None:
    digest = capture(here, big_layer(), layer({b"": Dir(), b"small": File(b"changed")}))
    target = f"{image_registry.address}/team/repo-1:snap-1"
    pushed = push(here, digest, target, settings)
    assert (pushed.reference, pushed.digest, pushed.uploaded, pushed.mounted, pushed.skipped) == (target, digest, 3, 0, 0)
    pulled = pull(there, target, settings)
    assert (pulled.digest, pulled.size, pulled.fetched, pulled.skipped) == (digest, here.blobs.size(digest), 3, 0)
    assert pulled.bytes == pushed.bytes == sum(map(here.blobs.size, (f"sha256:{name}" for name in names(here) - {digest[7:]})))
    assert names(there) == names(here)
    for name in names(here):
        assert there.blobs.path(f"sha256:{name}").read_bytes() == here.blobs.path(f"sha256:{name}").read_bytes()
    by_digest = pull(there, f"{image_registry.address}/team/repo-1@{digest}", settings)
    assert (by_digest.digest, by_digest.fetched, by_digest.skipped, by_digest.bytes) == (digest, 0, 3, 0)


def test_what_is_there_is_not_sent_and_what_another_repository_has_is_mounted(
    here: Store, settings: Settings, middle: Middleman
) -> None:
    base = big_layer()
    first = capture(here, base)
    second = capture(here, base, layer({b"": Dir(), b"new": File(b"new")}))
    assert push(here, first, f"{middle.address}/a:1", settings).uploaded == 2
    again = push(here, first, f"{middle.address}/a:again", settings)
    assert (again.uploaded, again.mounted, again.skipped, again.bytes) == (0, 0, 2, 0)
    grown = push(here, second, f"{middle.address}/a:2", settings)
    assert (grown.uploaded, grown.skipped) == (2, 1)
    middle.requests.clear()
    elsewhere = push(here, second, f"{middle.address}/b/c:2", settings)
    assert (elsewhere.uploaded, elsewhere.mounted, elsewhere.skipped, elsewhere.bytes) == (0, 3, 0, 0)
    assert middle.count("PATCH") == 0
    assert [request.path for request in middle.requests if request.method == "PUT"] == ["/v2/b/c/manifests/2"]


def test_a_mount_that_the_registry_does_not_do_becomes_an_upload(
    here: Store, there: Store, settings: Settings, middle: Middleman, image_registry: ImageRegistry
) -> None:
    digest = capture(here, big_layer())
    push(here, digest, f"{middle.address}/a:1", settings)
    middle.rule = lambda request: Fault(status=405) if "mount=" in request.path else None
    pushed = push(here, digest, f"{middle.address}/b:1", settings)
    assert (pushed.uploaded, pushed.mounted) == (2, 0)
    assert pull(there, f"{image_registry.address}/b:1", settings).digest == digest


def test_the_list_of_pushed_blobs_is_a_cache(here: Store, settings: Settings, image_registry: ImageRegistry) -> None:
    digest = capture(here, big_layer())
    push(here, digest, f"{image_registry.address}/a:1", settings)
    (known,) = [path for path in (here.cache / "mounts").iterdir() if path.suffix == ".json"]
    known.write_text("damaged")
    assert push(here, digest, f"{image_registry.address}/b:1", settings).uploaded == 2
    assert push(here, digest, f"{image_registry.address}/c:1", settings).mounted == 2


def test_progress_grows_to_the_total_and_counts_blobs(
    here: Store, there: Store, settings: Settings, image_registry: ImageRegistry
) -> None:
    digest = capture(here, big_layer())
    target = f"{image_registry.address}/a:1"
    for job in (
        lambda report: push(here, digest, target, settings, progress=report),
        lambda report: pull(there, target, settings, progress=report),
    ):
        seen: list[dict[str, Any]] = []
        job(lambda seen=seen, **fields: seen.append(fields))  # type: ignore[misc]
        moved = [item["bytes"] for item in seen if "total_bytes" in item]
        assert moved == sorted(moved)
        assert moved[-1] == next(item["total_bytes"] for item in seen if "total_bytes" in item)
        assert len(set(moved)) > 5


# -- broken lines -------------------------------------------------------------------------------------------------------


def once_each(fault: Callable[[], Fault], wanted: Callable[[Request], bool], times: int = 1) -> Callable[[Request], Fault | None]:
    left = [times]

    def rule(request: Request) -> Fault | None:
        if wanted(request) and left[0]:
            left[0] -= 1
            return fault()
        return None

    return rule


@pytest.mark.parametrize("arrived", [0, CHUNK // 2], ids=["between chunks", "within a chunk"])
def test_an_upload_that_is_cut_goes_on_where_the_registry_lets_it(
    here: Store, there: Store, settings: Settings, middle: Middleman, image_registry: ImageRegistry, arrived: int
) -> None:
    """docker's registry drops an upload whose line broke within a chunk; then the blob begins again."""
    digest = capture(here, big_layer())
    seen: list[int] = []

    def rule(request: Request) -> Fault | None:
        if request.method == "PATCH":
            seen.append(int(request.headers["Content-Range"].partition("-")[0]))
            return Fault(cut_request=arrived) if len(seen) in {3, 4} else None
        return None

    middle.rule = rule
    push(here, digest, f"{middle.address}/a:1", settings)
    begun = middle.count("POST")
    if arrived:
        assert begun <= 2 + 2
    else:
        assert begun == 2, "the upload began anew instead of going on"
        assert seen[2] == seen[3] == seen[4] == 2 * CHUNK
    assert pull(there, f"{image_registry.address}/a:1", settings).digest == digest


def test_an_answer_that_is_lost_does_not_send_the_blob_again(here: Store, settings: Settings, middle: Middleman) -> None:
    digest = capture(here, layer({b"": Dir(), b"f": File(os.urandom(9000))}))
    middle.rule = once_each(lambda: Fault(lose_answer=True), lambda r: r.method == "PUT" and "digest=" in r.path)
    assert push(here, digest, f"{middle.address}/a:1", settings).uploaded == 2
    assert sum(1 for r in middle.requests if r.method == "PUT" and "digest=" in r.path) == 2


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_a_registry_in_trouble_is_asked_again(
    here: Store, there: Store, settings: Settings, middle: Middleman, status: int
) -> None:
    digest = capture(here, big_layer())
    calls: dict[tuple[str, str], int] = {}

    def rule(request: Request) -> Fault | None:
        key = (request.method, re.sub(r"uploads/.+", "uploads/", request.path))
        calls[key] = calls.get(key, 0) + 1
        return Fault(status=status, headers={"Retry-After": "0"}) if calls[key] == 1 else None

    middle.rule = rule
    push(here, digest, f"{middle.address}/a:1", settings)
    assert pull(there, f"{middle.address}/a:1", settings).digest == digest


def test_retry_after_is_waited_for(here: Store, settings: Settings, middle: Middleman) -> None:
    digest = capture(here, layer({b"": Dir()}))
    middle.rule = once_each(lambda: Fault(status=429, headers={"Retry-After": "1"}), lambda r: r.method == "HEAD")
    started = time.monotonic()
    push(here, digest, f"{middle.address}/a:1", settings)
    assert time.monotonic() - started >= 1


def test_a_registry_that_stays_in_trouble_is_unavailable_and_may_be_tried_later(
    here: Store, settings: Settings, middle: Middleman
) -> None:
    digest = capture(here, big_layer())
    middle.rule = lambda _: Fault(status=503)
    with pytest.raises(RegistryUnavailable, match=f"registry {middle.address} .*503") as caught:
        push(here, digest, f"{middle.address}/a:1", settings)
    assert (caught.value.retryable, caught.value.exit_code, caught.value.code) == (True, 69, "registry_unavailable")
    assert len(middle.requests) == distribution.TRIES


@pytest.mark.parametrize("direction", ["push", "pull"])
def test_a_registry_that_is_down_is_named(here: Store, settings: Settings, direction: str) -> None:
    target = "127.0.0.1:1/a:1"
    with pytest.raises(RegistryUnavailable, match=r"registry 127\.0\.0\.1:1 cannot be reached: Connection refused"):
        if direction == "push":
            push(here, capture(here, layer({b"": Dir()})), target, settings)
        else:
            pull(here, target, settings)


def test_a_registry_that_does_not_answer_is_given_up(here: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(distribution, "READ_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=20) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RegistryUnavailable, match=f"{address} .*no answer within"):
            pull(here, f"{address}/a:1", settings)


def test_plain_http_on_a_port_that_is_taken_for_tls_says_which_setting(
    here: Store, settings: Settings, image_registry: ImageRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distribution, "is_insecure", lambda *_: False)
    with pytest.raises(RegistryUnavailable, match="MOTHBALL_INSECURE_REGISTRIES"):
        pull(here, f"{image_registry.address}/a:1", settings)


def test_a_push_that_was_stopped_goes_on_in_the_middle_of_the_blob(
    here: Store, there: Store, settings: Settings, image_registry: ImageRegistry
) -> None:
    """What a killed worker leaves: the address of the upload, for the owner alone."""
    blob = big_layer()
    digest = capture(here, blob)

    def stop(*, bytes: int, **_: Any) -> None:  # noqa: A002 -- the reporter's name
        if bytes > 3 * CHUNK + 1000:
            raise SystemExit

    with pytest.raises(SystemExit):
        push(here, digest, f"{image_registry.address}/a:1", settings, progress=stop)
    (kept,) = (here.cache / "uploads").iterdir()
    assert kept.stat().st_mode & 0o777 == 0o600
    pushed = push(here, digest, f"{image_registry.address}/a:1", settings)
    assert pushed.bytes <= len(blob.data) - 2 * CHUNK
    assert list((here.cache / "uploads").iterdir()) == []
    assert pull(there, f"{image_registry.address}/a:1", settings).digest == digest


def test_an_upload_that_the_registry_has_forgotten_begins_again(
    here: Store, settings: Settings, middle: Middleman, image_registry: ImageRegistry
) -> None:
    digest = capture(here, big_layer())

    def stop(*, bytes: int, **_: Any) -> None:  # noqa: A002 -- the reporter's name
        if bytes > 3 * CHUNK:
            raise SystemExit

    with pytest.raises(SystemExit):
        push(here, digest, f"{middle.address}/a:1", settings, progress=stop)
    for path in image_registry.folder.glob("data/docker/registry/v2/repositories/a/_uploads/*/*"):
        if path.is_file():
            path.unlink()
    assert push(here, digest, f"{middle.address}/a:1", settings).uploaded >= 1


def test_a_registry_without_chunks_gets_each_blob_in_one_request(
    here: Store, there: Store, settings: Settings, middle: Middleman
) -> None:
    digest = capture(here, big_layer())
    middle.rule = lambda request: Fault(status=405) if request.method == "PATCH" else None
    push(here, digest, f"{middle.address}/a:1", settings)
    assert middle.count("PATCH") == 1
    assert pull(there, f"{middle.address}/a:1", settings).digest == digest


@pytest.mark.parametrize("fault", [Fault(cut_answer=40_000), Fault(short_answer=40_000)], ids=["cut", "short"])
def test_a_download_that_is_cut_goes_on_with_a_range(
    here: Store, there: Store, settings: Settings, middle: Middleman, fault: Fault
) -> None:
    blob = big_layer()
    digest = capture(here, blob)
    push(here, digest, f"{middle.address}/a:1", settings)
    middle.requests.clear()
    middle.rule = once_each(lambda: fault, lambda r: r.method == "GET" and blob.digest in r.path, 3)
    pulled = pull(there, f"{middle.address}/a:1", settings)
    assert pulled.digest == digest
    assert pulled.bytes < len(blob.data) + 50_000
    ranges = [r.headers["Range"] for r in middle.requests if "Range" in r.headers]
    places = [int(text.removeprefix("bytes=").removesuffix("-")) for text in ranges]
    assert len(places) == 3
    assert places == sorted(set(places))
    assert places[0] >= 2 * 16 * 1024, "what had arrived was thrown away"


def test_a_registry_without_ranges_sends_the_blob_again(here: Store, there: Store, settings: Settings, middle: Middleman) -> None:
    blob = big_layer()
    digest = capture(here, blob)
    push(here, digest, f"{middle.address}/a:1", settings)
    seen: list[int] = []

    def rule(request: Request) -> Fault | None:
        if request.method == "GET" and blob.digest in request.path:
            seen.append(1)
            return Fault(no_range=True, cut_answer=40_000 if len(seen) == 1 else -1)
        return None

    middle.rule = rule
    assert pull(there, f"{middle.address}/a:1", settings).digest == digest
    assert len(seen) == 2


def test_a_pull_that_was_stopped_goes_on_in_the_middle_of_the_blob(
    here: Store, there: Store, settings: Settings, middle: Middleman
) -> None:
    blob = big_layer()
    digest = capture(here, blob)
    push(here, digest, f"{middle.address}/a:1", settings)

    def stop(*, bytes: int = 0, **_: Any) -> None:  # noqa: A002 -- the reporter's name
        if bytes > 3 * CHUNK:
            raise SystemExit

    with pytest.raises(SystemExit):
        pull(there, f"{middle.address}/a:1", settings, progress=stop)
    assert [path.name for path in there.blobs.temp.iterdir()] == [f"pull-{blob.digest[7:]}"]
    assert there.blobs.sweep_temp() == 0, "a part as young as this is somebody's work"
    pulled = pull(there, f"{middle.address}/a:1", settings)
    assert pulled.bytes < len(blob.data) - 2 * CHUNK
    whole(there, digest, {"small": b"small"})


def test_a_long_part_is_read_again_in_the_open(
    here: Store, there: Store, settings: Settings, middle: Middleman, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever continues a large download must be heard of, and be heard, before its first byte comes; the part stays."""
    blob = big_layer()
    digest = capture(here, blob)
    push(here, digest, f"{middle.address}/a:1", settings)
    monkeypatch.setattr(download, "PIECE", 16 * 1024)
    part = there.blobs.temp / f"pull-{blob.digest[7:]}"
    part.write_bytes(blob.data[:200_000])
    config = load_manifest(here.blobs, digest).config

    def stop(*, bytes: int = 0, **_: Any) -> None:  # noqa: A002 -- the reporter's name
        if bytes > config.size + 50_000:
            raise SystemExit

    with pytest.raises(SystemExit):
        pull(there, f"{middle.address}/a:1", settings, progress=stop)
    assert not middle.count("GET", blob.digest)
    assert pull(there, f"{middle.address}/a:1", settings).bytes == len(blob.data) - 200_000
    whole(there, digest, {"small": b"small"})


def test_a_part_that_is_not_of_this_blob_costs_one_more_try(
    here: Store, there: Store, settings: Settings, middle: Middleman
) -> None:
    blob = big_layer()
    digest = capture(here, blob)
    push(here, digest, f"{middle.address}/a:1", settings)
    for left in (b"x" * 1000, b"x" * (len(blob.data) + 5), b"x" * len(blob.data)):
        store = new_store(there.root / str(len(left)))
        (store.blobs.temp / f"pull-{blob.digest[7:]}").write_bytes(left)
        assert pull(store, f"{middle.address}/a:1", settings).digest == digest
        whole(store, digest, {"small": b"small"})


def test_two_pulls_of_the_same_capture_at_once_are_both_right(
    here: Store, there: Store, settings: Settings, image_registry: ImageRegistry
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    digest = capture(here, big_layer())
    push(here, digest, f"{image_registry.address}/a:1", settings)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: pull(there, f"{image_registry.address}/a:1", settings).digest, range(4)))
    assert found == [digest] * 4
    whole(there, digest, {"small": b"small"})


# -- registries that lie ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(short_answer=40_000, no_range=True), "sends only 40000 of"),
        (Fault(flip=True), "other bytes than its digest"),
        (Fault(longer=b"x"), "sends more than"),
        (Fault(status=404), "does not have it"),
    ],
    ids=["truncates", "flips", "appends", "has lost it"],
)
def test_a_registry_with_wrong_bytes_is_corrupt_and_nothing_is_left(
    here: Store, there: Store, settings: Settings, middle: Middleman, fault: Fault, reason: str
) -> None:
    blob = big_layer()
    digest = capture(here, blob)
    push(here, digest, f"{middle.address}/a:1", settings)
    middle.rule = lambda request: fault if request.method == "GET" and blob.digest in request.path else None
    with pytest.raises(Corrupt, match=reason) as caught:
        pull(there, f"{middle.address}/a:1", settings)
    assert blob.digest in str(caught.value)
    assert middle.address in str(caught.value)
    assert not caught.value.retryable
    assert blob.digest[7:] not in names(there)
    assert digest[7:] not in names(there)
    assert list(there.blobs.temp.iterdir()) == []


def test_a_manifest_with_another_digest_than_was_asked_for_is_corrupt(
    here: Store, there: Store, settings: Settings, middle: Middleman
) -> None:
    digest = capture(here, big_layer())
    push(here, digest, f"{middle.address}/a:1", settings)
    middle.rule = lambda request: Fault(longer=b" ") if "/manifests/" in request.path else None
    with pytest.raises(Corrupt, match="the registry sends one with the digest"):
        pull(there, f"{middle.address}/a@{digest}", settings)


def test_b104_a_table_of_contents_that_lies_is_found_before_the_pull_counts(
    here: Store, there: Store, settings: Settings, image_registry: ImageRegistry
) -> None:
    """Digests are right, for the sender made them; the table promises another file than the tar unpacks to."""
    import zstandard

    honest = layer({b"": Dir(), b"run.sh": File(b"echo good")})
    tar = b"".join(zstandard.ZstdDecompressor().decompress(honest.data[at : at + size]) for at, size, _ in honest.frames)

    def with_row(change: Callable[[list[Any]], list[Any]]) -> Blob:
        return pack(tar, [tuple(change(list(row))) if row[0] == b"run.sh" else row for row in honest.rows])

    liars = {
        "mode": with_row(lambda row: [*row[:2], 0o4755, *row[3:]]),
        "name": with_row(lambda row: [b"other.sh", *row[1:]]),
        "content": with_row(lambda row: [*row[:7], b"\7" * 32, *row[8:]]),
        "diff id": with_row(lambda row: row),
    }
    liars["diff id"].diff_id = "sha256:" + "1" * 64
    for reason, blob in liars.items():
        digest = capture(here, blob)
        push(here, digest, f"{image_registry.address}/liars:{reason.replace(' ', '-')}", settings)
        with pytest.raises(Corrupt) as caught:
            pull(there, f"{image_registry.address}/liars:{reason.replace(' ', '-')}", settings)
        assert blob.digest in str(caught.value), reason


def test_b104_paths_that_lead_out_are_refused_when_they_are_pulled(
    here: Store, there: Store, settings: Settings, image_registry: ImageRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mothball.store import tocformat

    monkeypatch.setattr(tocformat, "paths_fault", lambda *_, **__: None)
    evil: list[Spec] = [
        {b"": Dir(), b"../evil": File(b"x")}, {b"": Dir(), b"/evil": File(b"x")}, {b"": Dir(), b"d/../../evil": File(b"x")},
    ]  # fmt: skip
    digests = [capture(here, layer(spec)) for spec in evil]
    for number, digest in enumerate(digests):
        push(here, digest, f"{image_registry.address}/evil:{number}", settings)
        with pytest.raises(Corrupt, match=r"a path|absolute|component"):
            pull(there, f"{image_registry.address}/evil:{number}", settings)


def test_a_blob_that_has_rotted_here_is_fetched_again(
    here: Store, there: Store, settings: Settings, image_registry: ImageRegistry
) -> None:
    blob = big_layer()
    digest = capture(here, blob)
    push(here, digest, f"{image_registry.address}/a:1", settings)
    capture(there, blob)
    damage(there, blob.digest, at=70)
    pulled = pull(there, f"{image_registry.address}/a:1", settings)
    assert (pulled.fetched, pulled.skipped) == (1, 1)
    whole(there, digest, {"small": b"small"})


def test_a_blob_that_has_rotted_here_is_not_pushed(here: Store, settings: Settings, image_registry: ImageRegistry) -> None:
    blob = big_layer()
    digest = capture(here, blob)
    damage(here, blob.digest, at=70)
    with pytest.raises(Corrupt, match=blob.digest):
        push(here, digest, f"{image_registry.address}/a:1", settings)
    with pytest.raises(NotFound):
        pull(here, f"{image_registry.address}/a:1", settings)


@pytest.mark.parametrize("missing", ["layer", "manifest", "short"])
def test_a_capture_that_is_not_whole_is_not_pushed(
    here: Store, settings: Settings, image_registry: ImageRegistry, missing: str
) -> None:
    blob = big_layer()
    digest = capture(here, blob)
    if missing == "short":
        damage(here, blob.digest, size=100)
    else:
        here.blobs.path(blob.digest if missing == "layer" else digest).unlink()
    with pytest.raises(Corrupt, match=digest if missing == "manifest" else blob.digest):
        push(here, digest, f"{image_registry.address}/a:1", settings)


# -- what is not ours ---------------------------------------------------------------------------------------------------


def put_image(address: str, repository: str, document: dict[str, Any]) -> None:
    """Put a manifest of any kind and the blobs it names into a registry, as another tool would."""
    import hashlib
    import urllib.request

    for item in [document.get("config"), *document.get("layers", [])]:
        if item is None:
            continue
        data = item.pop("data")
        item |= {"digest": "sha256:" + hashlib.sha256(data).hexdigest(), "size": len(data)}
        start = urllib.request.Request(f"http://{address}/v2/{repository}/blobs/uploads/", method="POST", data=b"")
        with urllib.request.urlopen(start, timeout=10) as answer:
            place = answer.headers["Location"]
        end = urllib.request.Request(f"{place}&digest={item['digest']}", method="PUT", data=data)
        end.add_header("Content-Type", "application/octet-stream")
        urllib.request.urlopen(end, timeout=10).close()
    body = json.dumps(document).encode()
    request = urllib.request.Request(f"http://{address}/v2/{repository}/manifests/1", method="PUT", data=body)
    request.add_header("Content-Type", document["mediaType"])
    urllib.request.urlopen(request, timeout=10).close()


def test_an_image_of_another_tool_is_refused_and_nothing_is_fetched(
    there: Store, settings: Settings, image_registry: ImageRegistry
) -> None:
    oci = "application/vnd.oci.image"
    config = {"mediaType": f"{oci}.config.v1+json", "data": b"{}"}
    image = {"schemaVersion": 2, "mediaType": f"{oci}.manifest.v1+json", "config": config}
    documents: dict[str, dict[str, Any]] = {
        "gzip": {**image, "layers": [{"mediaType": f"{oci}.layer.v1.tar+gzip", "data": b"gz"}]},
        "no-table": {**image, "layers": [{"mediaType": f"{oci}.layer.v1.tar+zstd", "data": b"zstd"}]},
        "index": {"schemaVersion": 2, "mediaType": f"{oci}.index.v1+json", "manifests": []},
        "artifact": {**image, "config": {"mediaType": "application/vnd.oci.empty.v1+json", "data": b"{}"},
                     "layers": [{"mediaType": "text/plain", "data": b"text"}]},
        "no-layers": {**image, "layers": []},
        "docker": {
            "schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {"mediaType": "application/vnd.docker.container.image.v1+json", "data": b"{}"},
            "layers": [{"mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip", "data": b"gz"}],
        },
    }  # fmt: skip
    for name, document in documents.items():
        copied = json.loads(json.dumps(document, default=lambda data: data.decode()))
        for item in [copied.get("config"), *copied.get("layers", [])]:
            if item is not None:
                item["data"] = item["data"].encode() + b" " * len(name)
        put_image(image_registry.address, name, copied)
        with pytest.raises(InvalidParams, match="is not a capture as Mothball pushes it"):
            pull(there, f"{image_registry.address}/{name}:1", settings)
    assert names(there) == set()


def test_an_image_that_would_not_fit_is_refused_before_anything_is_fetched(
    here: Store, there: Store, settings: Settings, middle: Middleman, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = capture(here, big_layer())
    push(here, digest, f"{middle.address}/a:1", settings)
    real = os.statvfs

    def small(path: Any) -> os.statvfs_result:
        found = list(real(path))
        found[4] = 20  # f_bavail
        return os.statvfs_result(found)

    monkeypatch.setattr(remote.os, "statvfs", small)
    middle.requests.clear()
    with pytest.raises(NoSpace, match=r"needs [\d,]+ bytes"):
        pull(there, f"{middle.address}/a:1", settings)
    assert middle.count("GET", "/blobs/") == 0


def test_an_image_or_a_registry_that_is_not_there(there: Store, settings: Settings, image_registry: ImageRegistry) -> None:
    with pytest.raises(NotFound, match=f"registry {image_registry.address} has no image"):
        pull(there, f"{image_registry.address}/none:1", settings)


@pytest.mark.parametrize("target", ["r.io/a", "r.io/a@sha256:" + "0" * 64, "a:1"])
def test_a_push_needs_a_tag(here: Store, settings: Settings, target: str) -> None:
    with pytest.raises(InvalidParams):
        push(here, capture(here, layer({b"": Dir()})), target, settings)


def test_a_registry_that_changes_the_manifest_is_noticed(here: Store, settings: Settings, middle: Middleman) -> None:
    digest = capture(here, layer({b"": Dir()}))

    def rule(request: Request) -> Fault | None:
        other = {"Docker-Content-Digest": "sha256:" + "0" * 64}
        return Fault(status=201, headers=other) if request.method == "PUT" and "/manifests/" in request.path else None

    middle.rule = rule
    with pytest.raises(OperationFailed, match="changed the manifest"):
        push(here, digest, f"{middle.address}/a:1", settings)


# -- who may ------------------------------------------------------------------------------------------------------------


def texts(error: MothballError) -> str:
    """Everything of an error that is shown, stored or logged."""
    chain: list[str] = []
    seen: BaseException | None = error
    while seen is not None:
        chain.append(f"{seen!r} {seen} {getattr(seen, 'fields', '')}")
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return "\n".join(chain)


def test_a_registry_with_basic_login(here: Store, there: Store, settings: Settings, tmp_path: Path, capfd: Any) -> None:
    with ImageRegistry(tmp_path / "basic", htpasswd(tmp_path / "auth")) as registry:
        digest = capture(here, big_layer())
        target = f"{registry.address}/a:1"
        with pytest.raises(RegistryDenied, match="there is no login for it in docker's config file") as caught:
            push(here, digest, target, settings)
        assert str(settings.docker_config) in str(caught.value)
        assert (caught.value.exit_code, caught.value.retryable) == (78, False)
        docker_config(settings.docker_config, registry.address, "wrong " + PASSWORD)
        for attempt in (lambda: push(here, digest, target, settings), lambda: pull(there, target, settings)):
            with pytest.raises(RegistryDenied, match=f"registry {registry.address} refuses: .*401") as denied:
                attempt()
            assert PASSWORD not in texts(denied.value)
            assert "Basic " not in texts(denied.value)
        docker_config(settings.docker_config, registry.address)
        push(here, digest, target, settings)
        assert pull(there, target, settings).digest == digest
    shown = capfd.readouterr()
    assert PASSWORD not in shown.out + shown.err


def test_a_registry_with_tokens(here: Store, there: Store, settings: Settings, tmp_path: Path, capfd: Any) -> None:
    with TokenServer(tmp_path / "tokens") as tokens, ImageRegistry(tmp_path / "bearer", tokens.auth) as registry:
        digest = capture(here, big_layer())
        target = f"{registry.address}/team/a:1"
        with pytest.raises(RegistryDenied, match="there is no login"):
            push(here, digest, target, settings)
        docker_config(settings.docker_config, registry.address, "wrong")
        with pytest.raises(RegistryDenied, match="is not accepted or does not suffice"):
            push(here, digest, target, settings)
        docker_config(settings.docker_config, registry.address)
        tokens.asked.clear()
        push(here, digest, target, settings)
        scopes = {(*one.split(":")[:2], *sorted(one.split(":")[2].split(","))) for one, known in tokens.asked if known}
        assert ("repository", "team/a", "pull", "push") in scopes
        assert len(tokens.asked) <= 4, "a token is used until it is refused"
        assert pull(there, target, settings).digest == digest
        assert push(here, digest, f"{registry.address}/team/b:1", settings).mounted == 2, "it needs a token for two repositories"
        tokens.status = 503
        with pytest.raises(RegistryUnavailable, match="its token server answers 503"):
            pull(there, target, settings)
    shown = capfd.readouterr()
    assert PASSWORD not in shown.out + shown.err


def test_a_token_that_runs_out_in_the_middle_is_asked_for_again(
    here: Store, there: Store, settings: Settings, tmp_path: Path
) -> None:
    with TokenServer(tmp_path / "tokens") as tokens, ImageRegistry(tmp_path / "bearer", tokens.auth) as registry:
        tokens.seconds = -58  # the registry allows a minute of leeway: valid for two seconds
        docker_config(settings.docker_config, registry.address)
        digest = capture(here, big_layer())
        waited: list[int] = []

        def slow(*, bytes: int = 0, **_: Any) -> None:  # noqa: A002 -- the reporter's name
            if bytes > 2 * CHUNK and not waited:
                waited.append(1)
                time.sleep(2.5)

        push(here, digest, f"{registry.address}/a:1", settings, progress=slow)
        assert waited
        assert len(tokens.asked) >= 2
        tokens.seconds = 300
        assert pull(there, f"{registry.address}/a:1", settings).digest == digest


def test_a_netrc_does_not_speak_for_the_config_file(
    here: Store, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with ImageRegistry(tmp_path / "basic", htpasswd(tmp_path / "auth")) as registry:
        docker_config(settings.docker_config, registry.address)
        push(here, capture(here, layer({b"": Dir()})), f"{registry.address}/a:1", settings)


def test_a_login_is_not_sent_to_where_an_upload_is_redirected(here: Store, settings: Settings, tmp_path: Path) -> None:
    with ImageRegistry(tmp_path / "basic", htpasswd(tmp_path / "auth")) as registry, Middleman(registry.address) as stranger:
        docker_config(settings.docker_config, registry.address)
        with Middleman(registry.address) as middle:
            docker_config(settings.docker_config, middle.address)
            elsewhere = {"Location": f"http://{stranger.address}/v2/a/blobs/uploads/1"}
            middle.rule = lambda request: Fault(status=202, headers=elsewhere) if request.method == "POST" else None
            with pytest.raises(MothballError):
                push(here, capture(here, layer({b"": Dir()})), f"{middle.address}/a:1", settings)
            assert any("Authorization" in request.headers for request in middle.requests)
        assert stranger.requests
        assert not any("Authorization" in request.headers for request in stranger.requests)


# -- repair -------------------------------------------------------------------------------------------------------------


def test_damaged_and_missing_blobs_are_repaired_and_what_cannot_be_had_is_said(
    here: Store, settings: Settings, image_registry: ImageRegistry
) -> None:
    lower, upper = big_layer(), layer({b"": Dir(), b"x": File(os.urandom(5000))})
    digest = capture(here, lower, upper, workspace="w")
    lost = capture(here, layer({b"": Dir(), b"never": File(b"pushed")}), workspace="v")
    push(here, digest, f"{image_registry.address}/w:1", settings)
    manifest = load_manifest(here.blobs, digest)
    damage(here, lower.digest, at=70)
    damage(here, upper.digest, size=10)
    here.blobs.path(manifest.config.digest).unlink()
    here.blobs.path(digest).unlink()
    here.blobs.path(lost).unlink()
    wanted = [lower.digest, upper.digest, manifest.config.digest, digest, lost]
    result = repair(here, wanted, f"{image_registry.address}/w", settings)
    assert result.repaired == wanted[:-1]
    assert [name for name, _ in result.failed] == [lost]
    assert "does not have it" in result.failed[0][1]
    assert verify(here, "w", "content").problems == []
    whole(here, digest, {"small": b"small"})


def test_a_repair_never_replaces_a_blob_by_wrong_bytes(here: Store, settings: Settings, image_registry: ImageRegistry) -> None:
    blob = big_layer()
    digest = capture(here, blob)
    push(here, digest, f"{image_registry.address}/w:1", settings)
    stored = image_registry.blob(blob.digest)
    stored.write_bytes(stored.read_bytes()[:-1] + b"!")
    damage(here, blob.digest, at=70)
    before = here.blobs.path(blob.digest).read_bytes()
    result = repair(here, [blob.digest], f"{image_registry.address}/w", settings)
    assert (result.repaired, [name for name, _ in result.failed]) == ([], [blob.digest])
    assert here.blobs.path(blob.digest).read_bytes() == before
    assert list(here.blobs.temp.iterdir()) == []


def test_a_repair_needs_a_repository_that_answers(here: Store, settings: Settings) -> None:
    digest = capture(here, big_layer())
    with pytest.raises(RegistryUnavailable):
        repair(here, [digest], "127.0.0.1:1/w", settings)
    with pytest.raises(InvalidParams, match="the repository alone"):
        repair(here, [digest], "127.0.0.1:1/w:1", settings)
