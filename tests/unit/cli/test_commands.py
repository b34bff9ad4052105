"""What the commands print: text for people, JSON of a fixed shape for programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mothball import errors
from mothball.cli.jobs import OMISSION_HINTS
from mothball.settings import Settings
from tests.commands import Answer
from tests.unit.cli.conftest import NOW, FakeFleet, job, workspace
from workers.main import build

Cli = Callable[..., Answer]
COMMANDS = tuple(str(command.name) for command in build().registered_commands)
HEAVY = (
    "celery",
    "kombu",
    "flower",
    "tornado",
    "zstandard",
    "redis",
    "pydantic",
    "msgspec",
    "mothball.registry",
    "psutil",
)


def loaded_after(code: str) -> set[str]:
    """The modules that a fresh interpreter has after `code`."""
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import mothball",
        "from mothball import Fleet",
        "import mothball.cli.app; mothball.cli.app.build_app()",
        "import workers.main; workers.main.build()",
    ],
)
def test_what_must_start_quickly_loads_no_heavy_module(code: str) -> None:
    assert loaded_after(code).isdisjoint(HEAVY)


def test_help_names_every_command_and_each_has_a_help_of_its_own(cli: Cli) -> None:
    top = cli("--help")
    assert top.code == 0
    assert {"register", "capture", "snapshot", "files", "cat", "diff", "restore", "export", "verify", "collect"} <= {*COMMANDS}
    for name in COMMANDS:
        assert name in top.out
        answer = cli(name, "--help")
        assert (answer.code, answer.err) == (0, "")
        assert "Usage: mothball " + name in answer.out


def test_no_arguments_print_the_help(cli: Cli) -> None:
    assert "Usage: mothball" in cli().out


def test_everything_that_prints_has_a_json_form() -> None:
    app = build()
    without = {
        command.name
        for command in app.registered_commands
        if "json" not in (command.callback.__annotations__ if command.callback else {})
    }
    assert without == {"cat"}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.NotFound(what="workspace", id="x"), 1),
        (errors.Unavailable(url="redis://h", reason="refused"), 69),
        (errors.Busy(what="w", reason="r"), 75),
        (errors.AlreadyExists(id="a", path="/b"), 73),
        (errors.ConfigError("bad"), 78),
        (errors.TimedOut(what="job", seconds=3), 75),
    ],
)
def test_an_error_is_one_line_with_its_code_and_the_exit_code_of_its_class(
    cli: Cli, fake_fleet: type[FakeFleet], error: errors.MothballError, code: int
) -> None:
    fake_fleet.raises = error
    answer = cli("ls")
    assert answer.code == code
    assert answer.out == ""
    first, *rest = answer.err.splitlines()
    assert first == f"error: {error.code}: {error.message}"
    assert all(line.startswith("hint: ") for line in rest)


def test_with_json_an_error_is_one_object_on_stderr(cli: Cli, fake_fleet: type[FakeFleet]) -> None:
    fake_fleet.raises = errors.OverBudget(what="w", reason="full")
    answer = cli("ls", "--json")
    found = json.loads(answer.err)["error"]
    assert (answer.out, found["code"], found["number"], found["retryable"]) == ("", "over_budget", -32003, False)
    assert found["details"] == {"what": "w", "reason": "full"}


def test_an_error_text_with_control_characters_stays_on_one_harmless_line(cli: Cli, fake_fleet: type[FakeFleet]) -> None:
    fake_fleet.raises = errors.OperationFailed("a\nerror: fake\x1b[2J")
    assert cli("ls").err == "error: operation_failed: a\\nerror: fake\\x1b[2J\n"


def test_an_unexpected_exception_is_operation_failed_with_a_hint_and_no_traceback(cli: Cli, fake_fleet: type[FakeFleet]) -> None:
    fake_fleet.raises = RuntimeError("boom")
    answer = cli("ls")
    assert answer.code == 1
    assert answer.err == "error: operation_failed: RuntimeError: boom\nhint: MOTHBALL_LOG_LEVEL=debug shows where it happened\n"


def test_log_level_debug_shows_the_traceback(cli: Cli, fake_fleet: type[FakeFleet], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTHBALL_LOG_LEVEL", "debug")
    fake_fleet.raises = RuntimeError("boom")
    assert "Traceback" in cli("ls").err


def test_ctrl_c_ends_with_130_and_no_text(cli: Cli, fake_fleet: type[FakeFleet]) -> None:
    fake_fleet.raises = KeyboardInterrupt()
    assert cli("ls") == (130, "", "")


@pytest.mark.parametrize("argv", [("ls", "--nope"), ("nope",), ("show",), ("ls", "--limit", "x"), ("ls", "--limit", "0")])
def test_wrong_usage_is_one_line_and_exit_code_2(cli: Cli, argv: tuple[str, ...]) -> None:
    answer = cli(*argv)
    assert answer.code == 2
    assert answer.err.startswith("error: invalid_params: ")
    assert answer.err.count("\n") == 1
    assert "--help`" in answer.err


def test_wrong_usage_with_json_is_an_object_too(cli: Cli) -> None:
    answer = cli("ls", "--json", "--nope")
    assert (answer.code, json.loads(answer.err)["error"]["code"]) == (2, "invalid_params")


def test_a_wrong_setting_is_told_with_exit_code_78(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTHBALL_LEASE_SECONDS", "many")
    answer = cli("ls")
    assert answer.code == 78
    assert "MOTHBALL_LEASE_SECONDS" in answer.err


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    script = (
        "import mothball.client, sys\n"
        "from tests.unit.cli.conftest import FakeFleet, workspace\n"
        "mothball.client.Fleet = FakeFleet\n"
        "FakeFleet.records = [workspace()] * 20000\n"
        "from workers.main import main\n"
        "main(['ls', '--json'])\n"
    )
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )
    os.close(writer)
    os.read(reader, 100)
    os.close(reader)
    _, err = process.communicate(timeout=60)
    assert err == ""
    assert process.returncode in (1, 141)


def test_ls_shows_people_sizes_and_ages(cli: Cli, fake_fleet: type[FakeFleet]) -> None:
    out = cli("ls").out
    assert "owner/repo#7" in out
    assert "3.0 MiB" in out
    assert "5 s ago" in out


def test_ls_json_is_an_array_of_whole_records_with_sizes_in_bytes(cli: Cli, fake_fleet: type[FakeFleet]) -> None:
    assert cli("ls", "--json").json() == [workspace().to_dict()]
    fake_fleet.records = []
    assert cli("ls", "--json").json() == []


def test_a_long_path_is_never_cut_in_a_pipe(cli: Cli, fake_fleet: type[FakeFleet]) -> None:
    fake_fleet.records = [workspace(id="a" * 128, host="h" * 100)]
    assert "a" * 128 in cli("ls").out


def test_show_never_sends_an_escape_sequence_to_the_terminal(cli: Cli, fake_fleet: type[FakeFleet]) -> None:
    out = cli("show", "owner/repo#7").out
    assert "\x1b" not in out
    assert "fix\\x1b[2Jit" in out


def test_show_json_is_the_record(cli: Cli, fake_fleet: type[FakeFleet]) -> None:
    assert cli("show", "owner/repo#7", "--json").json() == workspace().to_dict()


@pytest.mark.parametrize(
    ("argv", "keys"),
    [
        (("touch", "w", "--json"), {"moved", "last_active", "signal"}),
        (("release", "w", "--json"), {"id", "released"}),
        (("capture", "w", "--json"), {"job", "joined"}),
        (("cancel", "job-1", "--json"), {"job", "cancelled", "state"}),
        (("pin", "w", "--reason", "r", "--json"), set(workspace().to_dict())),
        (("unpin", "w", "--json"), set(workspace().to_dict())),
        (("job", "job-1", "--json"), set(job().to_dict())),
    ],
)
def test_json_objects_have_fixed_keys(cli: Cli, fake_fleet: type[FakeFleet], argv: tuple[str, ...], keys: set[str]) -> None:
    answer = cli(*argv)
    assert answer.code == 0
    assert set(answer.json()) == keys


def test_register_json_says_whether_the_record_is_new(cli: Cli, fake_fleet: type[FakeFleet], tmp_path: Path) -> None:
    found = cli("register", "w", "--path", str(tmp_path), "--json").json()
    assert found["created"] is True
    assert found["workspace"]["path"] == str(tmp_path)


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_register_of_what_is_no_directory_here_is_source_missing(
    cli: Cli, fake_fleet: type[FakeFleet], tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "x"
    if kind == "file":
        path.touch()
    answer = cli("register", "w", "--path", str(path))
    assert answer.code == 1
    assert answer.err.startswith("error: source_missing: ")


def test_register_for_another_host_looks_at_nothing_here(cli: Cli, fake_fleet: type[FakeFleet]) -> None:
    assert cli("register", "w", "--path", "/not/here", "--host", "other").code == 0


def test_register_refuses_an_unknown_mode_and_a_wrong_duration(cli: Cli, fake_fleet: type[FakeFleet], tmp_path: Path) -> None:
    assert cli("register", "w", "--path", str(tmp_path), "--mode", "x").code == 2
    assert cli("register", "w", "--path", str(tmp_path), "--expires-in", "soon").code == 2


def test_jobs_show_the_error_of_a_failed_job_and_the_progress_of_a_running_one(cli: Cli, fake_fleet: type[FakeFleet]) -> None:
    fake_fleet.job_list = [
        job(state="failed", error_code="no_space", error="disk\nfull"),
        job(id="job-2", state="running", finished_at=None, progress={"step": "read", "files": 1200, "bytes": 2048}),
    ]
    out = cli("jobs").out
    assert "no_space: disk\\nfull" in out
    assert "read, 1,200 files, 2.0 KiB" in out
    assert cli("jobs", "--json").json() == [record.to_dict() for record in fake_fleet.job_list]


def test_job_shows_runs_and_outcome(cli: Cli, fake_fleet: type[FakeFleet]) -> None:
    fake_fleet.job_list = [job(deliveries=2, attempts=1, outcome={"digest": "sha256:1", "omitted": {"ignored": 1}})]
    out = cli("job", "job-1").out
    assert "2 (1 failed)" in out
    assert "digest: sha256:1" in out


def test_hosts_and_events_have_both_forms(cli: Cli, fake_fleet: type[FakeFleet]) -> None:
    assert cli("hosts", "--json").json() == [
        {"host": "box", "online": True, "last_seen": NOW - 1000, "info": {"version": "1", "concurrency": 2, "data_dir": "/d"}}
    ]
    assert "online" in cli("hosts").out
    kinds = [event["kind"] for event in cli("events", "--json").json()]
    assert kinds == ["workspace.registered", "job.succeeded"]
    lines = cli("events").out.splitlines()
    assert len(lines) == 2
    assert "workspace=a\\nb" in lines[0]


def test_every_reason_of_an_omission_has_a_hint() -> None:
    from mothball.capture.types import REASONS

    assert set(OMISSION_HINTS) == set(REASONS)


def test_a_capture_says_what_changed_and_what_was_left_out(
    cli: Cli, fake_fleet: type[FakeFleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from mothball.capture.types import CaptureResult

    result = CaptureResult(
        workspace="w", digest="sha256:" + "b" * 64, parent=None, generation=4, changed=True, files=10, bytes=2048, stored_bytes=512,
        layers=2, added=1, modified=3, deleted=0, omitted={"ignored": 5}, torn=["t\x1b"],
        git=[{"path": "", "kind": "dir", "head": "d" * 40, "branch": "main", "dirty": True, "unpushed": 3, "stashes": 0}],
        omissions=[{"path": f"p{number}", "reason": "ignored", "size": 1} for number in range(5)], seconds=0.5,
    )  # fmt: skip
    handle = SimpleNamespace(id="job-1", joined=False, wait=lambda _timeout, on_poll: result)
    monkeypatch.setattr(fake_fleet, "capture", lambda self, workspace_id, **options: handle)
    out = cli("capture", "w", "--wait").out
    assert out.splitlines()[0] == result.digest
    assert "generation 4: 1 added, 3 modified\n" in out
    assert "left out: 5 ignored (an ignore rule says so" in out
    assert "  p2\n  and 2 more" in out
    assert "torn: t\\x1b changed" in out
    assert "git .: main at dddddddddddd, uncommitted changes, 3 commits not pushed\n" in out
    found: dict[str, Any] = cli("capture", "w", "--timeout", "5s", "--json").json()
    assert found["result"] == result.to_dict()


def test_capture_hands_its_options_over_in_bytes(cli: Cli, fake_fleet: type[FakeFleet], monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    seen: dict[str, Any] = {}

    def capture(self: object, workspace_id: str, **given: Any) -> Any:
        seen.update(given)
        return SimpleNamespace(id="job-1", joined=False)

    monkeypatch.setattr(fake_fleet, "capture", capture)
    answer = cli("capture", "w", "--max-file-bytes", "20MiB", "--ignore", "*.log", "--no-gitignore", "--path", "a", "--full")
    assert answer.code == 0
    assert seen == {
        "paths": ["a"], "full": True, "verify": False,
        "options": {"ignore": ["*.log"], "use_gitignore": False, "max_file_bytes": 20 * 1024**2},
    }  # fmt: skip


def test_files_of_another_hosts_workspace_say_where_to_run_it(
    cli: Cli, fake_fleet: type[FakeFleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTHBALL_HOST", "other")
    for argv in (("files", "owner/repo#7"), ("cat", "owner/repo#7", "a"), ("verify", "owner/repo#7")):
        answer = cli(*argv)
        assert answer.code == 69
        assert "lives on host 'box'" in answer.err


def test_files_of_a_workspace_without_a_capture_say_so(
    cli: Cli, fake_fleet: type[FakeFleet], monkeypatch: pytest.MonkeyPatch, make_settings: Callable[..., Settings]
) -> None:
    monkeypatch.setenv("MOTHBALL_HOST", "box")
    monkeypatch.setenv("MOTHBALL_DATA_DIR", str(make_settings().data_dir))
    answer = cli("files", "owner/repo#7")
    assert answer.code == 1
    assert "has no capture" in answer.err
