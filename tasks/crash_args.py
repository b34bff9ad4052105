"""Arguments of the tasks of crash reports, as producers send them and as Flower shows them: small, and without secrets."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.hosts import HostArgs
from tasks.spec import WorkspaceId

MAX_PATH = 4096
MAX_REFERENCE = 1000
_MAX_SIGNAL = 64


class CrashReportArgs(BaseModel):
    """Arguments of workspace.crash_report."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    workspace: WorkspaceId = Field(description="id of a registered workspace")
    error: str = Field(default="", description="the text of the failure")
    error_bytes: int | None = Field(default=None, ge=0, description="bytes of the whole text, when `error` is a part of it")
    title: str = Field(default="", max_length=1000, description="one line that names the failure")
    exit_code: int | None = Field(default=None, ge=-(2**31), lt=2**32, description="with which the command ended")
    signal: int | None = Field(default=None, ge=1, le=_MAX_SIGNAL, description="number of the signal that ended it")
    command: list[str] | None = Field(default=None, max_length=1000, description="the command that failed")
    log: str | None = Field(default=None, max_length=MAX_PATH, description="log file on the host; its end is kept")
    env: dict[str, str] | None = Field(default=None, max_length=1000, description="environment of the command")
    cgroup: str | dict[str, Any] | None = Field(default=None, description="cgroup in which it ran, or what was read of it")
    pid: int | None = Field(default=None, ge=1, description="a process of it that still runs")
    since: str | None = Field(default=None, max_length=MAX_REFERENCE, description="compare with this; default the newest snapshot")
    package: bool = Field(default=True, description="write the package as well")
    binaries: Literal["include", "exclude"] = Field(default="include", description="what becomes of binary files in the package")
    base: str | None = Field(default=None, max_length=MAX_REFERENCE, description="OCI image below the workspace in the package")
    capture: bool = Field(default=True, description="capture now; else the last capture is taken as it is")
    by: str = Field(default="", max_length=500, description="who asks")
    auto: bool = Field(default=False, description="filed by the fleet itself")
    failed_job: str | None = Field(default=None, max_length=128, description="the job whose failure it is about")


class _ReportArgs(HostArgs):
    report: str = Field(max_length=128, description="id of a crash report")


class CrashDeleteArgs(_ReportArgs):
    """Arguments of crash.delete."""

    by: str = Field(default="", max_length=500, description="who asks")


class CrashPackageArgs(_ReportArgs):
    """Arguments of crash.package."""

    binaries: Literal["include", "exclude"] = Field(default="include", description="what becomes of binary files")
    base: str | None = Field(default=None, max_length=MAX_REFERENCE, description="OCI image below the workspace")


class CrashShowArgs(_ReportArgs):
    """Arguments of crash.show."""


class CrashRetainArgs(HostArgs):
    """Arguments of crash.retain."""

    dry_run: bool = Field(default=False, description="say what would go and why; change nothing")
