"""What tests share and import by name: `from tests.support import require_tool`."""

from __future__ import annotations

import os
import shutil
import tarfile
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

TAR_FILTER: dict[str, Any] = {"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}
"""For `TarFile.extractall`: Python 3.11 knows filters since 3.11.4 only."""
ON_CI = os.environ.get("CI", "").lower() in {"1", "true", "yes"}


def missing(what: str) -> None:
    """Something a test needs is not on this machine: skip on a laptop, fail where everything must be there (CI=true)."""
    if ON_CI:
        pytest.fail(f"{what} is missing, and CI must not skip: add it to `make system-deps`", pytrace=False)
    pytest.skip(f"{what} is not installed; `make system-deps` installs it")


def not_permitted(what: str) -> None:
    """The user may not do what a test needs (mount, make a device): skip for an ordinary user, fail on CI, which is root."""
    if ON_CI:
        pytest.fail(f"CI must be able to {what}", pytrace=False)
    pytest.skip(f"only root may {what}")


def require_tool(name: str) -> str:
    """The path of program `name`; skips the test where it is missing, fails it when CI=true."""
    found = shutil.which(name)
    if found is None:
        missing(name)
    assert found is not None
    return found


def eventually(probe: Callable[[], T], *, seconds: float = 10.0, every: float = 0.02, what: str = "the condition") -> T:
    """The first truthy answer of `probe`, asked again and again for `seconds`; fails with the last answer."""
    deadline = time.monotonic() + seconds
    while True:
        answer = probe()
        if answer:
            return answer
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not become true within {seconds:g} s; last answer: {answer!r}")
        time.sleep(every)
