"""One command line in this process, on real services: an interpreter for each would take longer than what it does."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from mothball.cli.app import run
from mothball.settings import Settings
from workers.config import settings_env
from workers.main import build


class Answer(NamedTuple):
    """What one command printed."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """stdout as one JSON document."""
        return json.loads(self.out)


def in_process(capture: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """`call("ls", "--json")`: run one command line; what it printed is taken from `capture`."""

    def call(*argv: str) -> Answer:
        code = run(build(), argv)
        printed = capture.readouterr()
        return Answer(code, printed.out, printed.err)

    return call


def beside_jobs(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]
) -> Callable[..., Answer]:
    """As `in_process`, with `settings` in the environment, and without what jobs in this process logged before."""
    for name, value in settings_env(settings).items():
        monkeypatch.setenv(name, value)
    ask = in_process(capture)

    def call(*argv: str) -> Answer:
        capture.readouterr()
        return ask(*argv)

    return call
