"""A message that reaches a worker, without the broker between."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from mothball.registry import Job
from tasks.job import SPECS, execute


def deliver(job: Job) -> dict[str, Any]:
    """The message of `job` reaches a worker of a name of its own, in this process; returns the outcome."""
    request = SimpleNamespace(id=job.id, hostname=f"w{time.monotonic_ns()}@h", mothball=1)
    task = SimpleNamespace(request=request, update_state=lambda **_: None, backend=SimpleNamespace(), send_event=lambda *_: None)
    return execute(task, SPECS[job.task], (), {})
