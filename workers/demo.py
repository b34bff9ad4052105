"""`mothball demo [PATH]`: the main job on a real tree, from registration to a killed worker, checked at every step.

Everything lives in one temporary folder that is removed at the end. The tree that was named is copied and never touched.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mothball.cli.output import emit_json, table
from mothball.cli.text import human_bytes, human_seconds, printable
from mothball.client import FINAL_STATES, CaptureJob, Fleet
from mothball.errors import MothballError, OperationFailed
from mothball.settings import Settings
from workers import demo_tree
from workers.demo_cache import PullCache, settings_of
from workers.demo_crash import Crash
from workers.demo_life import Life
from workers.demo_return import WayBack
from workers.local import LocalFleet, Signals

if TYPE_CHECKING:
    from mothball.capture import CaptureResult
    from mothball.registry import Job
    from mothball.store.tree import Entry, Tree

WORKSPACE = "demo/tree#1"
HOST = "demo"
WAIT_SECONDS = 600.0
RECOVERY_SECONDS = 60.0
KILL_TRIES = 5
# Long enough that a capture of it cannot end between two looks at the job.
NOISE_BYTES = 192 * 1024**2
QUICK_CAPTURE_SECONDS = 3.0
MIDDLE_SECONDS = 0.4
LOOK_SECONDS = 0.005
READ_BACK = 25
LOG_LINES = 15
TIMINGS = {
    "lease_seconds": 4, "ring_seconds": 1, "queued_ring_after_seconds": 4, "heartbeat_seconds": 2, "host_offline_seconds": 10,
    "soft_shutdown_seconds": 2, "redis_timeout": 2.5, "sweep_seconds": 1, "stop_stale_seconds": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One line of the final table. `seconds` of wall time, `bytes` added to the store (or of the tree)."""

    step: str
    seconds: float
    bytes: int | None
    digest: str
    shows: str


class Demo:
    """The story. `say` prints one line; `check` raises KeyboardInterrupt when a signal asked for the end."""

    def __init__(self, folder: Path, *, say: Callable[[str], None], signals: Signals) -> None:
        self.folder = folder
        self.tree = folder / "workspaces" / "tree"
        self.steps: list[Step] = []
        self.say = say
        self._signals = signals

    def run(self, found: Sequence[demo_tree.Source]) -> None:
        """Everything; raises `MothballError` with what went wrong."""
        self._copy(found)
        settings = Settings.load(
            redis_url="redis://127.0.0.1", data_dir=self.folder / "data", workspace_roots=(self.folder / "workspaces",), host=HOST,
            flower_port=0, flower_address="127.0.0.1", flower_basic_auth="", **TIMINGS,
            **settings_of(self.folder),
        )  # fmt: skip
        started = time.monotonic()
        self.say("starting the fleet: embedded Redis, a Celery worker, beat and Flower")
        self.say("  so that recovery is quick to watch: leases of 4 s (default 30), doorbells every second (default 10 s)")
        local = LocalFleet(settings, say=lambda text: self.say(f"  {text}"), hurry=self._signals.hurry)
        try:
            with local:
                self.say(f"  Flower: {local.flower_url}")
                self.add("start", started, None, "", "Redis, worker, beat and Flower answer")
                with Fleet(settings=local.settings) as fleet:
                    self._story(fleet, local)
                started = time.monotonic()
                self.say("stopping everything")
        except MothballError:
            self._show_log()
            raise
        self.add("stop", started, None, "", "no process is left behind")

    def check(self) -> None:
        """Raise KeyboardInterrupt when a signal came."""
        if self._signals.count:
            raise KeyboardInterrupt

    def _story(self, fleet: Fleet, local: LocalFleet) -> None:
        started = time.monotonic()
        self.say(f"registering {self.tree} as {WORKSPACE}")
        record = fleet.register(WORKSPACE, self.tree, title="the demo's tree")
        again = fleet.register(WORKSPACE, self.tree)
        self.expect(again.created_at == record.created_at, "registering twice made a second record")
        self.add("register", started, None, "", "a record; the same id again is the same record")

        self.say("first capture: every file is read, hashed and written as one layer")
        first = self._capture(fleet, local, "first capture")
        self.expect(first.changed and first.generation == 1, f"the first capture is generation {first.generation}")
        self._step_of(first, "first capture", f"{first.files:,} files, {human_bytes(first.bytes)}")

        self.say("the same again: nothing changed")
        same = self._capture(fleet, local, "second capture")
        self.expect(not same.changed and same.digest == first.digest, "an unchanged tree gave another digest")
        self._step_of(same, "unchanged", "same digest, no layer, no generation")

        back = WayBack(self, fleet, local, WORKSPACE, WAIT_SECONDS)
        snapshot = back.snapshot(first.digest)
        hashes, deleted, small = self._edit(fleet, local, first)
        edited = [name for name in hashes if name != deleted]
        self._read_back(local.settings, small, edited, deleted)
        back.diff(snapshot.digest, small.digest, edited, deleted)
        back.restore(snapshot)
        back.compare(snapshot, hashes)
        Life(self, fleet, local).run()
        self._kill(fleet, local, small)
        self._verify(local.settings)
        PullCache(self, fleet, local).run()
        Crash(self, fleet, local).run()

    def _copy(self, found: Sequence[demo_tree.Source]) -> None:
        started = time.monotonic()
        demo_tree.check_room(found, self.folder)
        total = demo_tree.Copied()
        self.tree.mkdir(parents=True)
        for source in found:
            self.say(printable(f"copying {source.path}; the original is only read, every edit happens in the copy"))
            copied = demo_tree.copy_tree(source.path, self.tree / source.below if source.below else self.tree, self.check)
            total.files += copied.files
            total.bytes += copied.bytes
            total.skipped += copied.skipped
        left_out = f", {total.skipped} not copied (unreadable, sockets or devices)" if total.skipped else ""
        added = demo_tree.ensure_files(self.tree)
        self.say(
            f"  {total.files:,} files, {human_bytes(total.bytes)}{left_out}" + (f"; {added} added to edit later" if added else "")
        )
        self.add("copy", started, total.bytes, "", f"{total.files:,} files to work on")

    def _edit(self, fleet: Fleet, local: LocalFleet, first: CaptureResult) -> tuple[dict[str, str], str, CaptureResult]:
        """Edit three files and delete one, and capture that: their sha256 from before, the deleted one, the capture."""
        with self.open(local.settings, first.digest) as tree:
            names = [entry.path for entry in tree.walk() if entry.type == "file"]
        chosen = demo_tree.pick(self.tree, names, demo_tree.EDITS + 1)
        hashes = {name: demo_tree.sha256(self.tree / name) for name in chosen}
        *edited, deleted = chosen
        self.say("editing three files and deleting one:")
        for name in edited:
            self.say(printable(f"  edited   {name}"))
            demo_tree.edit(self.tree / name, "# edited by the demo")
        self.say(printable(f"  deleted  {deleted}"))
        (self.tree / deleted).unlink()
        small = self._capture(fleet, local, "capture of the edit")
        self.expect(small.generation == first.generation + 1, "the edit made no generation")
        counts = (small.modified, small.deleted)
        self.expect(counts == (demo_tree.EDITS, 1), f"3 files were edited and 1 deleted, the capture says {counts}")
        limit = sum((self.tree / name).stat().st_size for name in edited) + 2 * demo_tree.SMALL_FILE_BYTES
        self.expect(small.stored_bytes <= limit, f"the layer of a small edit has {human_bytes(small.stored_bytes)}")
        self._step_of(small, "edit", f"a layer with {small.modified} changed files and {small.deleted} whiteout")
        return hashes, deleted, small

    def _read_back(self, settings: Settings, small: CaptureResult, edited: list[str], deleted: str) -> None:
        started = time.monotonic()
        with self.open(settings, small.digest) as tree:
            entries = list(tree.walk())
            names = {entry.path for entry in entries}
            self.expect(deleted not in names and set(edited) <= names, "the listing does not show the edit")
            self.say(f"listing the capture: {len(entries):,} entries, the deleted file is gone")
            self.add("list", started, None, small.digest, f"{len(entries):,} entries, no content decompressed")
            started = time.monotonic()
            wanted = [*edited, *_sample([entry for entry in entries if entry.type == "file"], READ_BACK)]
            size = sum(self._compare(tree, name) for name in wanted)
        self.say(f"read {len(wanted)} files back out of the capture: sha256 equal to the files on disk")
        self.add("read back", started, size, small.digest, f"{len(wanted)} files equal, sha256 compared")

    def _compare(self, tree: Tree, name: str) -> int:
        import hashlib

        content = tree.read(name)
        same = hashlib.sha256(content).hexdigest() == demo_tree.sha256(self.tree / name)
        self.expect(same, printable(f"{name} read out of the capture differs from the file on disk"))
        return len(content)

    def _kill(self, fleet: Fleet, local: LocalFleet, before: CaptureResult) -> None:
        self.say("killing the worker with SIGKILL in the middle of a capture")
        job = self._capture_until_killed(fleet, local)
        killed = time.monotonic()
        result = job.wait(RECOVERY_SECONDS, on_poll=self.watch(local))
        seconds = time.monotonic() - killed
        record = job.record()
        self.expect(record.deliveries > 1, "the job did not need a second worker: the kill came too early or too late")
        self.expect(result.generation == before.generation + 1, f"generation {result.generation} after {before.generation}")
        ends = [
            event for event in fleet.registry.events.list(limit=1000, kind="job.succeeded") if event.fields.get("job") == job.id
        ]
        self.expect(len(ends) == 1, f"the job succeeded {len(ends)} times")
        self.say(
            f"  the next worker finished it {seconds:.1f} s after the kill, on run {record.deliveries}; one generation, one success"
        )
        shows = f"the same job, run {record.deliveries}: one success, one generation"
        self.steps.append(Step("killed worker", seconds, result.stored_bytes, result.digest, shows))

    def _capture_until_killed(self, fleet: Fleet, local: LocalFleet) -> CaptureJob:
        """A capture whose worker was killed while the record said `running`.

        The worker is frozen first: a frozen worker cannot finish between the look at the record and the kill.
        """
        for attempt in range(KILL_TRIES):
            if attempt or self.steps_seconds("first capture") < QUICK_CAPTURE_SECONDS:
                size = NOISE_BYTES << min(attempt, 2)
                self.say(f"  adding {human_bytes(size)} of noise to the copy, so that there is a middle to hit")
                demo_tree.write_noise(self.tree / "mothball-demo-noise.bin", size)
            job = fleet.capture(WORKSPACE, full=True)
            if self._reached_middle(job, local):
                local.worker.signal(signal.SIGSTOP)
                record = job.record()
                if record.state == "running":
                    pid = local.worker.pid
                    local.worker.signal(signal.SIGKILL)
                    done = ", ".join(f"{key} {value}" for key, value in record.progress.items())
                    self.say(printable(f"  killed pid {pid} and its pool at: {done}"))
                    return job
                local.worker.signal(signal.SIGCONT)
            self.say("  the capture was quicker than the kill; once more")
            job.wait(WAIT_SECONDS, on_poll=self.watch(local))
        raise OperationFailed(f"the worker could not be killed in the middle of a capture in {KILL_TRIES} tries")

    def _reached_middle(self, job: CaptureJob, local: LocalFleet) -> bool:
        """Wait until the job has read something (or ran for a moment); False when it ended before."""
        running_since: float | None = None
        watch = self.watch(local)
        deadline = time.monotonic() + RECOVERY_SECONDS
        while time.monotonic() < deadline:
            record = job.record()
            watch(record)
            if record.state in FINAL_STATES:
                return False
            if record.state == "running":
                running_since = running_since or time.monotonic()
                if record.progress.get("bytes") or (record.progress and time.monotonic() - running_since > MIDDLE_SECONDS):
                    return True
            time.sleep(LOOK_SECONDS)
        raise OperationFailed(f"job {job.id} did not start within {RECOVERY_SECONDS:g} s")

    def _verify(self, settings: Settings) -> None:
        from mothball.store import Store
        from mothball.store.verify import verify

        started = time.monotonic()
        self.say("verifying the store: every blob and every file of every capture")
        report = verify(Store(settings.store_dir), level="content", progress=lambda *_args, **_kwargs: self.check())
        self.expect(not report.problems, f"the store has {len(report.problems)} problems: {report.problems[:3]}")
        self.add("verify", started, report.bytes, "", f"{report.checked:,} blobs as they were written")

    # -- helpers ----------------------------------------------------------------------------------------------------

    def steps_seconds(self, name: str) -> float:
        """Wall time of a finished step."""
        return next(step.seconds for step in self.steps if step.step == name)

    def _capture(self, fleet: Fleet, local: LocalFleet, name: str) -> CaptureResult:
        started = time.monotonic()
        result = fleet.capture(WORKSPACE).wait(WAIT_SECONDS, on_poll=self.watch(local))
        self._seconds = time.monotonic() - started
        omitted = (
            f"; left out: {', '.join(f'{count} {reason}' for reason, count in result.omitted.items())}" if result.omitted else ""
        )
        self.say(
            f"  {name}: {result.digest[:19]}, generation {result.generation}, {human_bytes(result.stored_bytes)} added, "
            f"{human_seconds(self._seconds)}{omitted}"
        )
        return result

    def _step_of(self, result: CaptureResult, name: str, shows: str) -> None:
        self.steps.append(Step(name, self._seconds, result.stored_bytes, result.digest, shows))

    def add(self, name: str, started: float, size: int | None, digest: str, shows: str) -> None:
        """One more finished step, begun at `started` (monotonic)."""
        self.steps.append(Step(name, time.monotonic() - started, size, digest, shows))

    def watch(self, local: LocalFleet) -> Callable[[Job], None]:
        """Called at each look at a job: ends the demo when a signal came or a process of the fleet died."""

        def watch(_job: Job) -> None:
            self.check()
            local.poll()

        return watch

    def open(self, settings: Settings, digest: str) -> Tree:
        """The capture `digest`, to be closed."""
        from mothball.store import Store
        from mothball.store.tree import Tree

        return Tree.open(Store(settings.store_dir), digest)

    def expect(self, condition: bool, message: str) -> None:
        """Raise `OperationFailed` with `message` unless `condition`."""
        if not condition:
            raise OperationFailed(f"the demo expected something else: {message}")

    def _show_log(self) -> None:
        try:
            lines = (self.folder / "data" / "logs" / "worker.log").read_text(errors="replace").splitlines()
        except OSError:
            return
        self.say("the worker's last lines:")
        for text in lines[-LOG_LINES:]:
            self.say(printable(f"  | {text}"))


def _sample(entries: list[Entry], count: int) -> list[str]:
    chosen = entries if len(entries) <= count else [entries[number * len(entries) // count] for number in range(count)]
    return [entry.path for entry in chosen]


def run_demo(path: Path | None, *, keep: bool = False, as_json: bool = False) -> int:
    """Run it; returns the exit code. Progress goes to stdout, with `as_json` to stderr."""

    def say(text: str) -> None:
        stream = sys.stderr if as_json else sys.stdout
        stream.write(f"{text}\n")
        stream.flush()

    found = demo_tree.sources(path)
    folder = Path(tempfile.mkdtemp(prefix="mothball-demo-")).resolve()
    with Signals() as signals:
        demo = Demo(folder, say=say, signals=signals)
        started = time.monotonic()
        try:
            demo.run(found)
        except KeyboardInterrupt:
            say("interrupted; everything is stopped")
            return 128 + (signals.first or signal.SIGINT)
        finally:
            if keep:
                say(f"kept: {folder}")
            else:
                demo_tree.remove_tree(folder)
    seconds = time.monotonic() - started
    if as_json:
        emit_json({"ok": True, "seconds": round(seconds, 3), "steps": [asdict(step) for step in demo.steps]})
        return 0
    say("")
    table(
        ("STEP", "TIME", "BYTES", "DIGEST", "WHAT IT SHOWS"),
        (
            (
                step.step,
                f"{step.seconds:.2f} s",
                "-" if step.bytes is None else human_bytes(step.bytes),
                step.digest[:19] or "-",
                step.shows,
            )
            for step in demo.steps
        ),
        right=("TIME", "BYTES"),
    )
    say(f"\nall steps as expected, {human_seconds(seconds)}; {folder if keep else 'the temporary folder is removed'}")
    return 0
