"""Crash reports that the fleet files by itself: of jobs that failed for good, and of workspaces that fell silent.

They come without package, and the storm brake counts what repeats. Nothing here ever raises: what counts is the failure itself.
"""

from __future__ import annotations

import uuid
from typing import Any, Final

import structlog

from mothball.errors import MothballError
from mothball.registry import Doorbell
from tasks import services

log = structlog.stdlib.get_logger("mothball.crash")

REPORT_TASK: Final = "workspace.crash_report"
OF_THE_WORKSPACE: Final = frozenset({"source_missing", "operation_failed", "timeout", "dead", "oversize"})
"""Codes of failures for which the workspace is to blame, or what runs in it."""
OF_THE_FLEET: Final = frozenset({"no_space", "corrupt", "unavailable"})
"""Codes of failures of the fleet's own making; reported only when the setting says ``all``."""


def report_failure(job_id: str, code: str, message: str, *, blames: bool) -> bool:
    """File a crash report about a job that has failed for good with `code`, if the settings want one; True when it was asked for.

    `blames` is what the job's task declares: a job that says nothing of its workspace (a restore elsewhere) is not reported.
    """
    try:
        here = services.current()
        if not blames or code not in _codes(here.settings.auto_crash_report):
            return False
        job = here.registry.jobs.get(job_id)
        if job.state not in {"failed", "dead"} or not job.workspace or job.task == REPORT_TASK:
            return False
        args: dict[str, Any] = {
            "workspace": job.workspace, "error": _without_secrets(here, message), "title": f"{job.task} failed: {code}",
            "package": False, "auto": True, "failed_job": job.id, "by": "fleet",
        }  # fmt: skip
        # One per failed job, however often its end is told.
        name = str(uuid.uuid5(uuid.NAMESPACE_URL, f"mothball:crash:{job.id}"))
        submitted = here.registry.jobs.submit(REPORT_TASK, args, workspace=job.workspace, job_id=name, origin="beat")
        if submitted.ring:
            made = submitted.job
            here.ringer.ring(Doorbell(job=made.id, task=made.task, queue=made.queue))
    except MothballError as error:
        log.warning("no crash report of the failed job", failed=job_id, code=error.code, error=error.message)
        return False
    except Exception as error:  # whatever is wrong here, the job's own outcome stands
        log.error("no crash report of the failed job", failed=job_id, error=f"{type(error).__name__}: {error}"[:500])
        return False
    log.info("a crash report was asked for", failed=job_id, report_job=name, code=code)
    return True


def _codes(setting: str) -> frozenset[str]:
    return {"workspace": OF_THE_WORKSPACE, "all": OF_THE_WORKSPACE | OF_THE_FLEET}.get(setting, frozenset())


def _without_secrets(here: services.Services, text: str) -> str:
    from mothball.crash.text import clean, clip
    from mothball.redact import redactor_for

    return clip(redactor_for(here.settings, here.registry).text(clean(text))).text
