"""The real app plus a slow and a faulty job, to catch jobs in the middle: ``celery -A tests.acceptance.slow_app``."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

import tasks
from mothball.errors import from_code
from tasks.context import JobContext
from tasks.hosts import HostArgs
from tasks.job import Outcome, job_task


class SlowArgs(BaseModel):
    """`seconds` of work, then one line appended to `effects`: the effect that must happen exactly once."""

    model_config = ConfigDict(extra="forbid", strict=True)

    workspace: str
    seconds: float
    effects: str
    deaf: bool = False


@job_task(name="probe.slow", args=SlowArgs, queue="host", time_limit=120, soft_time_limit=100)
def slow(ctx: JobContext, args: SlowArgs) -> Outcome:
    """Work in small steps with a checkpoint after each; `deaf` works without checkpoints."""
    with Path(args.effects).with_suffix(".started").open("a") as started:
        started.write(f"{ctx.job.id} {ctx.fence}\n")
    end = time.monotonic() + args.seconds
    while time.monotonic() < end:
        time.sleep(0.02)
        if not args.deaf:
            ctx.checkpoint("work", left=round(end - time.monotonic(), 1))
    ctx.checkpoint("publish")
    with Path(args.effects).open("a") as effects:
        effects.write(f"{ctx.job.id} {ctx.fence}\n")
    return Outcome(result={"slept": args.seconds, "fence": ctx.fence})


class FaultyArgs(BaseModel):
    """How to go wrong: the code of a MothballError, ``bug``, ``disk``, ``soft`` or ``hard``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    workspace: str
    how: str


@job_task(name="probe.faulty", args=FaultyArgs, queue="host", time_limit=4, soft_time_limit=1)
def faulty(ctx: JobContext, args: FaultyArgs) -> Outcome:
    """End in one of the ways that a task can end without success."""
    if args.how == "bug":
        raise ZeroDivisionError("a bug")
    if args.how == "disk":
        raise OSError(5, "Input/output error")
    if args.how == "memory":
        raise MemoryError("no more")
    if args.how in {"soft", "hard"}:
        if args.how == "hard":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # deaf to the soft limit, like a long C call
        time.sleep(60)
    raise from_code(args.how, f"it went wrong: {args.how}")


class PlaceArgs(HostArgs):
    """`effects` gets a line per run."""

    effects: str


@job_task(name="probe.place", args=PlaceArgs, queue="host", lane="place", time_limit=20, soft_time_limit=10)
def place(ctx: JobContext, args: PlaceArgs) -> Outcome:
    """Say on which host this runs."""
    ctx.checkpoint("work")
    with Path(args.effects).open("a") as effects:
        effects.write(f"{ctx.host}\n")
    return Outcome(result={"host": ctx.host})


tasks.MODULES = (*tasks.MODULES, __name__)

from workers.app import app  # noqa: E402 - the module list must be complete before the app is configured

__all__ = ["app"]
