"""The command of a package, what is below it, and what is taken when there is nothing fresh to package."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mothball.crash import last_good
from mothball.crash.last_good import is_empty, why_not
from mothball.crash.publish import config_of, learn_credentials, sealing
from mothball.errors import InvalidParams
from mothball.package.bundle_spec import LEAST_MEMORY
from mothball.redact import Redactor, Rules
from mothball.settings import Settings
from tests.unit.store.build import File, capture, layer, new_store

HOME = "/srv/ws/a"


def document(**evidence: Any) -> dict[str, Any]:
    env = evidence.pop("env", {})
    return {
        "workspace": {"path": HOME},
        "evidence": {"command": ["make"], "environment": {"variables": env}, "exit": {}, "cgroup": None, **evidence},
    }


def process(told: dict[str, Any], base: Any = None) -> dict[str, Any]:
    return json.loads(config_of(told, base))["process"]


def env_of(told: dict[str, Any], base: Any = None) -> dict[str, str]:
    return dict(each.split("=", 1) for each in process(told, base)["env"])


def test_the_command_is_the_one_that_failed_where_the_workspace_is_now() -> None:
    command = [f"{HOME}/bin/run", "--at", HOME, f"{HOME}-other", f"x={HOME}/y", "/srv/ws"]
    told = process(document(command=command))
    assert told["args"] == ["/workspace/bin/run", "--at", "/workspace", f"{HOME}-other", f"x={HOME}/y", "/srv/ws"]
    assert told["cwd"] == "/workspace"


def test_without_a_command_it_is_that_of_the_image_or_a_shell() -> None:
    base = SimpleNamespace(args=["/bin/bash", "-l"], env={"PATH": "/bin"})
    assert process(document(command=[]), base)["args"] == ["/bin/bash", "-l"]
    assert process(document(command=[]))["args"] == ["/bin/sh"]
    assert process(document(command=None), SimpleNamespace(args=[], env={}))["args"] == ["/bin/sh"]


def test_paths_in_the_environment_move_with_the_workspace_and_home_can_be_written() -> None:
    env = env_of(document(env={"PATH": f"{HOME}/venv/bin:/usr/bin", "HOME": "/elsewhere", "CI": "1", "PYTHONPATH": HOME}))
    assert env == {"PATH": "/workspace/venv/bin:/usr/bin", "HOME": "/tmp", "CI": "1", "PYTHONPATH": "/workspace"}


def test_an_images_own_environment_counts_and_its_path_is_added() -> None:
    base = SimpleNamespace(args=[], env={"PATH": "/opt/tool/bin", "JAVA_HOME": "/opt/java", "LANG": "C.UTF-8"})
    env = env_of(document(env={"PATH": f"{HOME}/bin", "LANG": "de_DE"}), base)
    assert env == {"PATH": "/workspace/bin:/opt/tool/bin", "JAVA_HOME": "/opt/java", "LANG": "C.UTF-8", "HOME": "/tmp"}
    assert env_of(document(), base)["PATH"] == "/opt/tool/bin"


@pytest.mark.parametrize(
    ("killed", "limit", "said"),
    [
        (True, 64 * 1024**2, 64 * 1024**2),
        (True, 1024, LEAST_MEMORY),
        (False, 64 * 1024**2, None),
        (None, 1, None),
        (True, None, None),
    ],
)
def test_the_memory_limit_is_repeated_when_it_was_what_killed(killed: bool | None, limit: int | None, said: int | None) -> None:
    told = document(exit={"oom_killed": killed}, cgroup={"memory_limit": limit})
    assert json.loads(config_of(told, None))["linux"]["resources"].get("memory", {}).get("limit") == said


def test_a_workspace_at_the_root_moves_nothing() -> None:
    told = document(command=["/bin/true"])
    told["workspace"]["path"] = "/"
    assert process(told)["args"] == ["/bin/true"]


def test_packages_are_sealed_when_somebody_is_named_and_a_wrong_name_is_said_at_once(tmp_path: Path) -> None:
    assert sealing(Settings.load(data_dir=tmp_path)) is None
    with pytest.raises(InvalidParams):
        sealing(Settings.load(data_dir=tmp_path, crash_recipients=("age1wrong",)))


def test_what_credential_files_hold_is_known_everywhere_and_other_files_teach_nothing(tmp_path: Path) -> None:
    store = new_store(tmp_path / "store")
    tree = {b".env": File(b"DB_PASSWORD=quiet-Harbour-4711\n"), b"notes.txt": File(b"the harbour is Loud-Harbour-4712\n")}
    digest = capture(store, layer(tree))
    redactor = Redactor(b"k" * 32, Rules.default())
    steps: list[dict[str, Any]] = []
    learn_credentials(store, digest, redactor, lambda **told: steps.append(told))
    assert redactor.text("login quiet-Harbour-4711 refused").startswith("login [redacted:")
    assert redactor.text("Loud-Harbour-4712") == "Loud-Harbour-4712"
    assert steps
    learn_credentials(store, "sha256:" + "0" * 64, redactor)  # whoever packages it will say that it is not there


# -- a directory that is no workspace any more ------------------------------------------------------------------------------


def test_why_a_directory_cannot_be_captured_is_said(tmp_path: Path) -> None:
    roots = (tmp_path,)
    good = tmp_path / "good"
    good.mkdir()
    assert why_not(str(good), roots) == ""
    assert "does not exist" in why_not(str(tmp_path / "none"), roots)
    (tmp_path / "file").write_text("x")
    assert "not a folder" in why_not(str(tmp_path / "file"), roots)
    (tmp_path / "link").symlink_to(good)
    assert "symbolic link" in why_not(str(tmp_path / "link"), roots)
    assert "allowed root" in why_not("/etc", roots)


def test_a_directory_whose_disk_does_not_answer_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> list[str]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(last_good.os, "listdir", broken)
    assert "cannot be read: Input/output error" in why_not(str(tmp_path), (tmp_path.parent,))


def test_only_files_and_links_make_a_directory_more_than_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "ws"
    (place / "a" / "b").mkdir(parents=True)
    (place / "c").mkdir()
    assert is_empty(str(place), (tmp_path,))
    (place / "a" / "b" / "l").symlink_to("nowhere")
    assert not is_empty(str(place), (tmp_path,))
    (place / "a" / "b" / "l").unlink()
    monkeypatch.setattr(last_good, "_MOST", 2)
    assert not is_empty(str(place), (tmp_path,)), "too many to look at all of them: a capture will say it exactly"
