"""The jobs: one module per family, thin. A task validates, holds its lease, calls `mothball`, records the outcome."""

from __future__ import annotations

MODULES = (
    "tasks.bundle",
    "tasks.capture",
    "tasks.collect",
    "tasks.crash_report",
    "tasks.crash_store",
    "tasks.image_cache",
    "tasks.lifecycle",
    "tasks.maintenance",
    "tasks.notice",
    "tasks.purge",
    "tasks.restore",
    "tasks.runtime",
    "tasks.snapshot",
    "tasks.stop",
    "tasks.transfer",
    "tasks.verify",
)
"""Modules that declare tasks; importing them fills `tasks.job.SPECS` and `tasks.sweep.SWEEPS`."""
