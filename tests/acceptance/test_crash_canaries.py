"""Canary secrets of every rule, planted wherever a secret can stand when something fails: none of them may leave with a report.

The clear capture in the store is the one place where they stay, for that is what a restore needs.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis

from mothball.client import Fleet
from mothball.redact import Redactor, Rules
from mothball.redact.patterns import compiled
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.tree import Tree
from tests.acceptance.canaries import Canary, Search, canaries, credential_files, fit_for_a_name, long_name
from tests.acceptance.command import Command
from tests.acceptance.fleet import FleetRun
from tests.support import require_tool
from workers.config import flower_command, settings_env
from workers.redis_server import RedisServer

ID = "r/a#1"
FRAME = 128 * 1024
BIG = 5 * 1024**2
TITLE = 900
PASSWORD = "open-sesame"
BARE = "7bKz4Qm9Xw2Lr8Tn" + "5Vd3Hs6J"
"""A value that only the workspace's own .env tells to be a secret."""

pytestmark = pytest.mark.timeout(240)


def every_text(seed: str) -> str:
    return "\n".join(canary.text for canary in canaries(seed)) + "\n"


def unreadable(text: bytes) -> bytes:
    """An archive that nobody here can look into: compressed as zip hardly ever is."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.log", text)
    return out.getvalue()


def test_every_built_in_rule_has_a_canary_on_which_it_fires() -> None:
    rules, redactor = Rules.default(), Redactor(b"k" * 32, Rules.default())
    text = every_text("rules").encode()
    left = [
        (rule.name, rule.pattern)
        for rule in rules.builtin
        if not any(word in text for word in rule.keywords) or compiled(rule.pattern).search(text) is None
    ]
    assert left == []
    redactor.data(text)
    for name, (content, _) in credential_files("rules").items():
        redactor.learn(name.encode(), f"{content}LEARNED_TOKEN={BARE}\n".encode())
        redactor.data(content.encode(), name.encode())
    redactor.text(f"bare {BARE}")
    named = set(re.findall(r"\[redacted:([a-z-]+)", redactor.name(long_name("rules").text.encode()).decode()))
    unread = redactor.binary([unreadable(text)])
    assert sorted({*redactor.counts, *named, *unread}) == rules.names


def test_the_search_finds_a_canary_in_every_form() -> None:
    search = Search()
    search.plant("x", [Canary("github", "", ("abcdefgh12345678ijkl",))])
    for data in (b"--abcdefgh12345678ijkl--", "abcdefgh12345678ijkl".encode("utf-16-le"), b"abcdefgh12345678ijkl".hex().encode()):
        assert len(search.within(data)) == 1
    for shift in range(3):
        assert search.within(base64.b64encode(b"#" * shift + b"abcdefgh12345678ijkl" + b"!" * 7))
    assert search.within(b"abcdefgh12345678 ijkl" + base64.b64encode(b"nothing of it")) == []


@dataclass
class Scene:
    """A workspace full of canaries, and everything that is said about its failure."""

    folder: Path
    search: Search = field(default_factory=Search)

    def plant(self, place: str) -> list[Canary]:
        """Canaries of all rules for `place`, made known to the search."""
        found = canaries(place)
        self.search.plant(place, found)
        return found

    def text(self, place: str) -> str:
        return "\n".join([*(canary.text for canary in self.plant(place)), f"bare {BARE}"]) + "\n"

    def put(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def fill(self) -> None:
        """Everything below the workspace's directory."""
        self.search.plant(".env (known)", [Canary("known", "", (BARE,))])
        for number, canary in enumerate(self.plant("files")):
            self.put(f"src/{number:02}-{canary.rule}.txt", f"before\n{canary.text}\nafter\n")
        for name, (content, found) in credential_files("files").items():
            self.put(name, content)
            self.search.plant(name, found)
        with (self.folder / ".env").open("a") as env:
            env.write(f"LEARNED_TOKEN={BARE}\n")
        self.put("notes.txt", f"what is {BARE} for?\n")
        self.put("wide.txt", b"\xff\xfe" + self.text("a file in UTF-16").encode("utf-16-le"))
        self.put("wide-big.txt", b"\xfe\xff" + self.text("a file in big UTF-16").encode("utf-16-be"))
        self.put("core.bin", b"\0\1\2" + self.text("a binary file").encode() + bytes(100))
        self.put("core16.bin", b"\0\1\2\0" + self.text("UTF-16 in a binary file").encode("utf-16-le") + bytes(100))
        self.put("old.log.gz", gzip.compress(self.text("a compressed file").encode()))
        self.put("cut.log.gz", gzip.compress(self.text("a compressed file that was cut").encode() * 3)[:-9])
        packed = Canary("unread", "", ("7bKpacked4711stored",))
        self.search.plant("an archive that cannot be read", [packed])
        self.put("logs.zip", unreadable(packed.secrets[0].encode()))
        self.put("data.json", json.dumps({"config": [{"text": canary.text} for canary in self.plant("JSON")]}))
        dense = self.text("a big file").encode()
        # What stands at a border of frames or windows is another canary each time.
        rest = b"nothing to be seen in this line\n" * (3 * len(dense) // 32)
        self.put("big.txt", b"".join(dense + rest + b"." * (number % 97) + b"\n" for number in range(BIG // len(dense + rest))))
        self.put(f"names/{BARE}.txt", "the name tells\n")
        for canary in self.plant("names of files"):
            if fit_for_a_name(canary):
                self.put(f"names/{canary.text}", "the name tells\n")
        long = long_name("files")
        self.search.plant("a long name", [long])
        self.put(f"names/{long.text}", "the name tells\n")
        for canary in self.plant("names of folders"):
            if fit_for_a_name(canary):
                self.put(f"folders/{canary.text}/file", "the folder's name tells\n")
        (self.folder / "links").mkdir()
        (self.folder / "links" / "bare").symlink_to(f"../{BARE}")
        for number, canary in enumerate(self.plant("targets of links")):
            if "\n" not in canary.text:
                (self.folder / "links" / f"{number:02}").symlink_to(canary.text)

    def as_worktree(self, repository: Path) -> None:
        """The directory as a worktree of a repository whose configuration and names hold canaries."""
        named = {canary.rule: canary.text for canary in self.plant("names in git")}
        branch, message, author = (named[rule] for rule in ("github", "npm", "age"))
        url = next(canary for canary in self.plant("git config") if canary.rule == "url").text

        def git(*words: str) -> None:
            options = ("-c", "user.email=a@b.c", "-c", f"user.name={author}", "-c", "init.defaultBranch=main")
            subprocess.run([require_tool("git"), *options, *words], cwd=repository, check=True, capture_output=True)

        repository.mkdir(parents=True)
        git("init", "-q")
        git("remote", "add", "origin", url.replace("postgresql", "https"))
        git("config", "http.https://github.com/.extraheader", f"AUTHORIZATION: basic {base64.b64encode(url.encode()).decode()}")
        git("commit", "-q", "--allow-empty", "-m", f"with {message}")
        git("worktree", "add", "-q", "-b", branch, str(self.folder))

    def arguments(self) -> dict[str, Any]:
        """What a producer says of the failure."""
        title, spoken = "failed for", self.plant("title")
        for canary in spoken:
            if canary.word and len(title) + len(canary.text) < TITLE:
                title += f" {canary.text}"
        environment = {f"V{number}": canary.text for number, canary in enumerate(self.plant("environment"))}
        telling = [Canary(rule, "", (f"7bKenvironment{rule}4711",)) for rule in ("password", "secret")]
        self.search.plant("environment (told by its name)", telling)
        environment |= {"APP_PASSWORD": telling[0].secrets[0], "SESSION_TOKEN": telling[1].secrets[0], "BARE": BARE}
        flags = [Canary(rule, "", (f"7bKargument{rule}4711",)) for rule in ("password", "secret")]
        self.search.plant("command (told by its option)", flags)
        command = ["./run", "--password", flags[0].secrets[0], f"--token={flags[1].secrets[0]}", BARE]
        return {
            "error": self.text("error text"),
            "title": title,
            "command": [*command, *(canary.text for canary in self.plant("command"))],
            "env": environment,
            "by": " ".join(canary.text for canary in self.plant("by") if canary.rule in {"github", "stripe", "gcp"}),
            "exit_code": 3,
        }


class Filed(NamedTuple):
    """A report that was filed: its job, its result, and what was printed or answered on the way."""

    job: str
    result: dict[str, Any]
    said: str


@dataclass
class Here:
    """The fleet with Flower, and the scene."""

    fleet: FleetRun
    scene: Scene
    settings: Settings
    flower: str
    command: Command
    server: RedisServer


@pytest.fixture
def here(fleet: FleetRun, private_redis: RedisServer, tmp_path: Path) -> Iterator[Here]:
    """A worker, beat and Flower; a process in the workspace whose arguments hold canaries."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = fleet.with_settings(
        crash_env=("*",), frame_bytes=FRAME, flower_port=port, flower_basic_auth=f"ops:{PASSWORD}", log_level="debug"
    )
    fleet.settings = settings
    scene = Scene(fleet.folder / "trees" / "a")
    scene.as_worktree(fleet.folder / "trees" / "repository")
    scene.fill()
    scene.put("logs/run.log", scene.text("log file"))
    fleet.workspace(ID, path=scene.folder)
    flower = fleet._start("flower", flower_command(settings))
    fleet.until(lambda: ask(f"http://127.0.0.1:{port}/healthcheck") is not None, "Flower is up", seconds=30)
    fleet.worker()
    fleet.beat()
    command = Command(tmp_path)
    command.env |= settings_env(settings)
    words = [canary.text for canary in scene.plant("arguments of a process")]
    process = subprocess.Popen(["sh", "-c", "sleep 300 & wait", "sh", *words], cwd=scene.folder, start_new_session=True)
    try:
        yield Here(fleet, scene, settings, f"http://127.0.0.1:{port}", command, private_redis)
        assert flower.alive
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def ask(url: str) -> bytes | None:
    """What Flower answers; None when it does not."""
    request = urllib.request.Request(url)
    request.add_header("Authorization", "Basic " + base64.b64encode(f"ops:{PASSWORD}".encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return bytes(answer.read())
    except OSError:
        return None


# -- the ways in which a report is filed ------------------------------------------------------------------------------------


def by_client(here: Here) -> Filed:
    """The producers' API."""
    with Fleet(settings=here.settings) as fleet:
        job = fleet.crash_report(ID, **here.scene.arguments(), log="logs/run.log")
        here.fleet.finished(job.id, seconds=90)
        result = job.wait(10)
        return Filed(job.id, here.fleet.job(job.id).outcome or {}, repr(result))


def by_command(here: Here) -> Filed:
    """`mothball crash-report`: secrets in our own arguments."""
    given = here.scene.arguments()
    words = shlex.join(given["command"])
    done = here.command(
        "crash-report", ID, "--error", given["error"], "--title", given["title"], "--cmd", words, "--log", "logs/run.log",
        "--exit-code", "3", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    tried = here.command(
        "crash-report", ID, "--error", given["error"], "--title", given["title"], "--cmd", words, "--dry-run", "--json"
    )
    shown = tried.out.decode().replace(BARE, "")  # nobody has looked into the workspace yet
    found = done.json()
    return Filed(found["job"], found["result"], done.out.decode() + done.err + shown + tried.err)


def by_exec(here: Here) -> Filed:
    """`mothball exec`: what the command prints, its arguments and its environment."""
    given = here.scene.arguments()
    said = here.scene.put("say.txt", given["error"])
    log = here.scene.folder / "logs" / "exec.log"
    script = f"cat {said.name}; exit 3"
    environment = {name: value.replace("\0", "") for name, value in given["env"].items()}
    done = here.command("exec", ID, "--log", str(log), "--", "sh", "-c", script, *given["command"], env=environment)
    assert done.code == 3, done.err
    found = re.search(r"crash report: (?:job )?(\S+)", done.err)  # the report itself when a worker made it at once
    assert found is not None, done.err
    job = here.fleet.registry.crashes.get(found[1]).job if found[1].startswith("crash-") else found[1]
    here.fleet.finished(job, seconds=90)
    return Filed(job, here.fleet.job(job).outcome or {}, done.err)


def by_send_task(here: Here) -> Filed:
    """Another code base with a Celery application of its own, which knows nothing of redaction."""
    args = {"workspace": ID, "log": "logs/run.log", **here.scene.arguments()}
    sent = here.fleet.producer().send_task("workspace.crash_report", kwargs=args, queue="dispatch")
    answer = sent.get(timeout=90)
    return Filed(sent.id, answer, repr(answer))


# -- where they may not be --------------------------------------------------------------------------------------------------


def in_redis(here: Here) -> Iterator[tuple[str, bytes]]:
    """Every key and value of every database, and what is compressed in them."""
    url = re.sub(r"/\d+$", "", here.settings.registry_url)
    for number in range(16):
        with redis.Redis.from_url(f"{url}/{number}") as client:
            for key in client.scan_iter("*", count=1000):
                yield f"redis {number} {key!r}", key + b"\n" + b"\n".join(_values(client, key))
    for job in here.fleet.registry.jobs.list(limit=1000):
        if (draft := here.fleet.registry.crashes.drafted(job.id)) is not None:
            yield f"draft of {job.id}", json.dumps(draft.evidence, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _values(client: Any, key: bytes) -> list[bytes]:
    kind = client.type(key)
    read: dict[bytes, Callable[[], Any]] = {
        b"string": lambda: [client.get(key) or b""],
        b"list": lambda: client.lrange(key, 0, -1),
        b"set": lambda: client.smembers(key),
        b"zset": lambda: client.zrange(key, 0, -1),
        b"hash": lambda: [each for pair in client.hgetall(key).items() for each in pair],
        b"stream": lambda: [each for _, entry in client.xrange(key) for pair in entry.items() for each in pair],
        b"none": list,
    }
    return list(read[kind]())


def in_flower(here: Here, job: str) -> Iterator[tuple[str, bytes]]:
    """The API and the pages."""
    for path in ("/api/tasks?limit=1000", f"/api/task/info/{job}", f"/task/{job}", "/api/workers?refresh=1", "/tasks", "/workers"):
        answer = here.fleet.until(lambda path=path: ask(here.flower + path), f"Flower answers {path}")
        assert isinstance(answer, bytes)
        yield f"flower {path}", answer
    assert job in str(ask(f"{here.flower}/api/tasks?limit=1000"))


def in_the_package(path: Path) -> Iterator[tuple[str, bytes]]:
    """The file, each member's name, target and content, and what a member has compressed."""
    yield "package", path.read_bytes()
    with tarfile.open(path) as tar:
        for member in tar:
            name = member.name.encode("utf-8", "surrogateescape")
            yield f"member {member.name}", name + b"\n" + member.linkname.encode("utf-8", "surrogateescape")
            if member.isfile():
                content = tar.extractfile(member)
                assert content is not None
                data = content.read()
                yield f"content of {member.name}", data
                if data[:2] == b"\x1f\x8b":
                    yield f"unzipped {member.name}", zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(data)
                if zipfile.is_zipfile(io.BytesIO(data)):
                    with zipfile.ZipFile(io.BytesIO(data)) as archive:
                        yield f"unzipped {member.name}", b"\n".join(archive.read(name) for name in archive.namelist())


def clear_blobs(store: Store, digests: list[str]) -> set[str]:
    """Hex of the blobs of clear captures: manifests, configs, layers."""
    found: set[str] = set()
    for digest in digests:
        manifest = json.loads(store.blobs.read(digest))
        found |= {each["digest"].partition(":")[2] for each in (manifest["config"], *manifest["layers"])}
        found.add(digest.partition(":")[2])
    return found


def on_disk(here: Here, clear: set[str]) -> Iterator[tuple[str, bytes]]:
    """Every file of the fleet's own but the clear captures, their refs, and the index that captures keep to be quick."""
    for top, folders, names in os.walk(here.settings.data_dir):
        if Path(top) == here.settings.store_dir:
            folders[:] = [name for name in folders if name != "cache"]
        for name in names:
            path = Path(top, name)
            if name not in clear | {"index.json"} and path.is_file():
                yield str(path.relative_to(here.settings.data_dir)), path.read_bytes()


def ref_of(store: Store, report: str) -> dict[str, Any]:
    """What the workspace's index says of the report."""
    index = json.loads(next((store.root / "workspaces").glob("*/index.json")).read_bytes())
    return next(each for each in index["manifests"] if report in each["annotations"].values())


@pytest.mark.parametrize("way", [by_client, by_command, by_exec, by_send_task])
def test_no_canary_leaves_with_a_report_or_stays_behind_it(here: Here, way: Callable[[Here], Filed]) -> None:
    filed = way(here)
    search = here.scene.search
    assert search.rules() == set(Rules.default().names)
    record = here.fleet.registry.crashes.get(filed.result["id"])
    shown = here.command("crash-reports", "show", record.id, "--patch", "--log")
    followed = here.command("job", filed.job, "--json")
    listed = here.command("crash-reports", "--json")
    here.fleet.until(lambda: b"SUCCESS" in (ask(f"{here.flower}/api/task/info/{filed.job}") or b""), "Flower knows of its end")
    store = Store(here.settings.store_dir)
    subject = json.loads(store.blobs.read(record.artifact))["subject"]["digest"]
    assert subject == record.digest
    found: dict[str, list[str]] = {}

    def look(where: str, data: bytes) -> None:
        if labels := search.within(data):
            found[where] = labels

    look("what was said", filed.said.encode("utf-8", "surrogatepass"))
    for done in (shown, followed, listed):
        assert done.code == 0, done.err
        look("the command line", done.out + done.err.encode())
    for process in here.fleet.processes:
        look(f"log of {process.name}", process.log.read_bytes())
    events = [event.to_dict() for event in here.fleet.registry.events.list(limit=1000)]
    look("events", json.dumps(events).encode())
    for where, data in in_redis(here):
        look(where, data)
    for where, data in in_flower(here, filed.job):
        look(where, data)
    for where, data in in_the_package(Path(record.path)):
        look(where, data)
    for where, data in on_disk(here, clear_blobs(store, [record.digest])):
        look(where, data)
    look("the report's ref", json.dumps(ref_of(store, record.id)).encode())
    if way is not by_send_task:  # its message has to pass through the broker as it was sent
        for path in here.server.folder.rglob("*"):
            if path.is_file():
                look(f"redis {path.name}", path.read_bytes().replace(BARE.encode(), b""))  # the producer could not know it
    told = "\n".join(f"{where}: {label}" for where, labels in found.items() for label in labels[:40])
    if keep := os.environ.get("CANARY_OUT"):
        Path(keep, way.__name__).write_text(told)
    assert not found, told[:6000]
    assert_the_capture_is_clear(store, record.digest, search)
    assert_all_rules_fired(filed, Path(record.path), way)


def assert_the_capture_is_clear(store: Store, digest: str, search: Search) -> None:
    """The other half: what is searched for is really there, so nothing was found because there was nothing to find."""
    with Tree.open(store, digest) as tree:
        content = b"\n".join(tree.read(entry.path) for entry in tree.walk() if entry.type == "file")
    for place in ("files", ".env", ".netrc", "a file in UTF-16", "a binary file", "a big file", ".env (known)"):
        assert search.has(place, content), place


def assert_all_rules_fired(filed: Filed, package: Path, way: Callable[[Here], Filed]) -> None:
    """Every rule replaced something in the package, and every one that needs no file's name something in the error text."""
    with tarfile.open(package) as tar:
        member = tar.extractfile("report.json")
        assert member is not None
        report = json.loads(member.read())
        names = re.findall(r"\[redacted:([a-z-]+)", "\n".join(tar.getnames()))
    rules = set(Rules.default().names)
    facts = report["package"]
    fired = {*facts["redactions"], *names, *(rule for each in facts["left_out"] for rule in each["rules"])}
    assert fired >= rules, (rules - fired, filed.result["redactions"])
    said = set(re.findall(r"\[redacted:([a-z-]+)", report["error"]["text"]))
    assert said >= rules - {"env", "name", "unread"}, (way.__name__, rules - said)
    assert BARE not in json.dumps(report)
