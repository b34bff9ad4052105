"""The documentation says what the code does."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import SecretStr
from pydantic_core import PydanticUndefined

from mothball import policy
from mothball.capture.types import REASONS
from mothball.names import QUEUE_CONTROL, QUEUE_DISPATCH
from mothball.settings import Settings
from tasks.capture import CaptureOptions
from tasks.job import SPECS
from workers.config import task_limits
from workers.main import build

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
START, END = "<!-- settings -->\n", "<!-- /settings -->"
GENERATED = {"host": "the machine's host name", "data_dir": "`~/.local/share/mothball`"}


def shown(name: str, default: Any) -> str:
    if name in GENERATED:
        return GENERATED[name]
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    if default in {"", ()}:
        return "empty"
    if isinstance(default, tuple):
        default = ",".join(default)
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def settings_table() -> str:
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        assert field.default is not PydanticUndefined or name in GENERATED
        lines.append(f"| `MOTHBALL_{name.upper()}` | {shown(name, field.default)} | {field.description} |")
    return "\n".join(lines) + "\n"


def test_docs_settings_lists_every_setting_with_its_default() -> None:
    path = DOCS / "settings.md"
    text = path.read_text()
    before, rest = text.split(START)
    table, after = rest.split(END)
    if os.environ.get("MOTHBALL_TEST_WRITE_DOCS"):
        path.write_text(before + START + settings_table() + END + after)
        pytest.skip("written; run again without MOTHBALL_TEST_WRITE_DOCS")
    assert table == settings_table()


def test_no_page_names_a_setting_that_does_not_exist() -> None:
    known = {f"MOTHBALL_{name.upper()}" for name in Settings.model_fields}
    for path in [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"]:
        named = set(re.findall(r"\bMOTHBALL_[A-Z_]*[A-Z]\b", path.read_text()))
        assert {name for name in named if not name.startswith("MOTHBALL_TEST_")} <= known, path.name


def test_docs_tasks_lists_exactly_the_registered_tasks() -> None:
    section = (DOCS / "tasks.md").read_text().split("## Tasks")[1].split("###")[0]
    assert set(re.findall(r"^\| `([a-z_.]+)` \|", section, re.MULTILINE)) == set(task_limits(Settings.load()))


def section_of(task: str) -> dict[str, str]:
    """The argument rows of a task's section."""
    parts = (DOCS / "tasks.md").read_text().split(f"### {task}\n")
    assert len(parts) == 2, f"docs/tasks.md needs one section ### {task}"
    return dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", re.split(r"\n##", parts[1])[0], re.MULTILINE))


def test_docs_tasks_lists_exactly_the_arguments_of_each_job() -> None:
    task_limits(Settings.load())  # imports every module that declares tasks
    # Those of tests that declare tasks of their own are not for readers.
    specs = {name: spec for name, spec in SPECS.items() if spec.function.__module__.startswith("tasks.")}
    assert "workspace.capture" in specs
    for name, spec in specs.items():
        assert set(section_of(name)) == set(spec.args.model_fields), name


def test_docs_tasks_lists_every_option_of_a_capture() -> None:
    for option in CaptureOptions.model_fields:
        assert f"`{option}`" in section_of("workspace.capture")["options"], option


def test_docs_tasks_names_the_queues_and_the_job_states() -> None:
    text = (DOCS / "tasks.md").read_text()
    for queue in (QUEUE_CONTROL, QUEUE_DISPATCH, "host.<host>"):
        assert f"| `{queue}` |" in text
    states = text.split("## Job states")[1].split("##")[0]
    assert re.findall(r"^\| `(\w+)` \|", states, re.MULTILINE) == ["queued", "running", "succeeded", "failed", "cancelled", "dead"]


def test_docs_formats_names_every_reason_for_an_omission() -> None:
    text = (DOCS / "formats.md").read_text()
    assert [reason for reason in REASONS if f"`{reason}`" not in text] == []


def test_every_command_in_the_docs_exists() -> None:
    command = typer.main.get_command(build())
    known = set(command.commands)  # type: ignore[attr-defined]  # typer returns its group under the base class
    for path in [*DOCS.rglob("*.md"), ROOT / "CHANGELOG.md"]:
        named = set(re.findall(r"`mothball ([a-z-]+)", path.read_text()))
        assert named <= known, f"{path.name}: {named - known}"


def reclaiming() -> str:
    """The chapter about what reclaims a workspace."""
    return (DOCS / "operations.md").read_text().split("## What reclaims a workspace\n")[1].split("\n## ")[0]


def test_operations_lists_every_rule_in_the_order_in_which_they_are_asked() -> None:
    table = reclaiming().split("| rule |")[1].split("\n\n")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == policy.RULES


def test_operations_names_every_field_of_a_policy_with_its_default() -> None:
    text = reclaiming()
    defaults = policy.to_dict(policy.merge(policy.parse_text(Settings.load().policy)))
    for name, value in defaults.items():
        shown = "all" if name == "signals" else str(value).lower()
        hours = {"1d": "24h"}.get(shown, shown)
        in_rules, in_fields = f"`{name}={hours}`" in text, re.search(rf"^\| `{name}` \| `?{hours}`? \|", text, re.MULTILINE)
        assert in_rules or in_fields, f"{name}={hours}"


def test_every_policy_that_the_docs_recommend_can_be_set() -> None:
    default = policy.parse_text(Settings.load().policy)
    commands = re.findall(r"mothball policy set ((?:\w+=\S+ ?)+)(--repo|--workspace)?", reclaiming())
    advised = re.findall(r"^\| \*\*[^|]+\| `((?:\w+=\S+ ?)+)`", reclaiming(), re.MULTILINE)
    assert len(commands) >= 3
    assert len(advised) >= 5
    for text, scope in [*commands, *((text, "") for text in advised)]:
        level: Any = {"--repo": "repo", "--workspace": "workspace"}.get(scope, "fleet")
        policy.merge(default, policy.check(policy.parse_text(",".join(text.split())), level))


def test_operations_names_every_signal_and_every_state() -> None:
    for name in (*policy.SIGNALS, *policy.STATES, policy.EVICTED):
        assert re.search(rf"\b{name}\b", reclaiming()), name


def test_every_link_between_the_pages_leads_somewhere() -> None:
    for path in [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_test_that_the_readme_names_exists() -> None:
    table = (ROOT / "README.md").read_text().split("| guarantee | tested by |")[1].split("\n## ")[0]
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for named in re.findall(r"`(test_\w+\.py|test_\w+|tests/[\w/.]+)`", table):
        if named.startswith("tests/"):
            assert (ROOT / named).exists(), named
        elif named.endswith(".py"):
            assert named in files, named
        else:
            assert any(f"def {named}(" in text for text in files.values()), named
