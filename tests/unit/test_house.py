"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import mothball

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mothball", "tasks", "workers")
MAX_LINES = 400
SOURCES = sorted(path for package in (*PACKAGES, "benchmarks") for path in (ROOT / package).rglob("*.py"))
CELERY_CLASS = {("celery", "Celery"), ("celery.app", "Celery"), ("celery.app.base", "Celery")}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def texts() -> list[Path]:
    """Every text file that is, or would be, committed."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listed.stdout.split("\0") if name and not name.startswith("tests/data/"))
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()]


def imports_of(path: Path) -> Iterator[tuple[str, str | None]]:
    """(module, name) of every import; name None for ``import module``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield node.module, alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None


def test_only_workers_app_imports_the_celery_class() -> None:
    guilty = {name_of(path) for path in SOURCES for found in imports_of(path) if found in CELERY_CLASS}
    by_attribute = {name_of(path) for path in SOURCES if re.search(r"\bcelery\.Celery\(", path.read_text())}
    assert guilty | by_attribute == {"workers.app"}


def test_mothball_imports_no_celery_and_nothing_from_above() -> None:
    for path in SOURCES:
        package = name_of(path).partition(".")[0]
        above = {"mothball": {"tasks", "workers", "celery"}, "tasks": {"workers"}}.get(package, set())
        found = {module.partition(".")[0] for module, _ in imports_of(path)} & above
        assert not found, f"{name_of(path)} imports {found}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_module_stays_under_400_lines_and_says_what_it_is_for(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    if path.name not in {"__init__.py", "launch.py"}:
        assert "from __future__ import annotations" in text


def test_public_functions_and_classes_have_docstrings() -> None:
    missing = []
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                missing.append(f"{name_of(path)}.{node.name}")
    assert not missing


def test_no_file_names_a_machine_an_index_or_unfinished_work() -> None:
    # Written in halves, so that this file does not name them either.
    halves = (
        ("/wo", "rk/"), ("/tm", r"p/w\b"), (r"(?<![\w}>])/ro", "ot/"), ("/ho", "me/[a-z]"), ("files.python", "hosted"),
        ("pypi.or", "g/simple"), ("--extra", "-index-url"), (r"\bTO", r"DO\b"), (r"\bFIX", r"ME\b"), (r"\bXX", r"X\b"),
    )  # fmt: skip
    forbidden = re.compile("|".join(first + second for first, second in halves))
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in texts()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if (match := forbidden.search(line))
    ]
    assert not found


def test_every_task_and_lua_file_is_packaged() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == list(PACKAGES)
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").is_file()


def test_the_changelog_has_the_version_or_what_comes_next() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text or f"## [{mothball.__version__}]" in text
    assert "keepachangelog.com" in text


def test_every_make_target_is_explained() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.+)$", text, re.MULTILINE)
    assert phony
    for target in phony[1].split():
        assert re.search(rf"^{target}:.*## \S", text, re.MULTILINE), target


def test_every_lint_exception_is_justified() -> None:
    """An ignore without a reason is copied by the next reader; each stands under its comment."""
    text = (ROOT / "pyproject.toml").read_text()
    ignores = re.search(r"^ignore = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert ignores
    lines = [line.strip() for line in ignores[1].splitlines()]
    assert lines[0].startswith("#")
    for before, line in pairwise(lines):
        if line.startswith('"'):
            assert before.startswith(("#", '"')), line
