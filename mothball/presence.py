"""Presence of a producer: a thread that says "somebody works here" for as long as a ``with`` block runs, and then says goodbye.

    with fleet.active("owner/repo#12"):
        run_the_agent()

Missing is not idle (design, section 7): a workspace whose heartbeats end without goodbye is stranded, because its producer
died, and not merely idle. So the goodbye belongs to the thread that sends the heartbeats: none can overtake it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Self

from mothball import errors

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from mothball.registry import Registry
    from mothball.registry.presence import Beat

LEAST_SECONDS, MOST_SECONDS = 1.0, 86_400.0
BEATS = 3
"""Heartbeats per timeout: two may be lost before the workspace counts as left."""
RETRY_SECONDS = 1.0
GOODBYE_SECONDS = 300.0
"""How long a goodbye is tried again in the background when Redis is away; later it would only meet a stranded workspace."""
RESTING = ("stopped", "stranded", "abandoned")
"""States in which nobody expects work."""

logger = logging.getLogger("mothball.client")


class Active:
    """The presence of one holder in one workspace. Use it once, in a ``with``.

    Entering raises `NotFound`, `Gone` or `Unavailable`: who cannot say that he works there should know. An outage later is
    survived: heartbeats go on as soon as Redis is back, and the goodbye is tried again in the background. The thread never
    keeps the process alive; a process that dies says no goodbye, and that is the point.
    """

    def __init__(self, connect: Callable[[], Registry], workspace: str, holder: str, timeout: float) -> None:
        """`timeout`: seconds for which one heartbeat counts, from 1 to a day; three are sent in that time."""
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not LEAST_SECONDS <= timeout <= MOST_SECONDS:
            raise errors.InvalidParams(f"timeout must be from {LEAST_SECONDS:g} to {MOST_SECONDS:g} seconds, not {timeout!r}")
        self.workspace = workspace
        self.holder = holder
        self._connect = connect
        self._timeout = float(timeout)
        self._done = threading.Event()
        self._said = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid = 0
        self._patience = 0.0
        self._until = 0
        self._state = ""
        self._error: errors.MothballError | None = None

    @property
    def until(self) -> int:
        """ms of Redis TIME until which the last heartbeat that arrived keeps the workspace in use."""
        return self._until

    @property
    def state(self) -> str:
        """The workspace's state at the last heartbeat. Heartbeats change none: `Fleet.resume` brings a stopped one back."""
        return self._state

    @property
    def error(self) -> errors.MothballError | None:
        """Why no heartbeat arrives any more, such as `Gone` when the workspace was released meanwhile; None while all is well."""
        return self._error

    def __enter__(self) -> Self:
        if self._thread is not None:
            raise errors.InvalidParams("an activity is entered once; ask `active` for another one")
        # A connection of its own: the fleet may be closed, or busy with a long answer, while the work goes on.
        registry = self._connect()
        try:
            self._note(registry.presence.beat(self.workspace, self.holder, self._timeout_ms, "lease"))
        except BaseException:
            registry.close()
            raise
        self._pid = os.getpid()
        self._patience = 2 * (2 * registry.settings.redis_timeout + 1)  # connecting and the answer may take the timeout each
        name = f"mothball-active-{self.workspace}"
        self._thread = threading.Thread(target=self._run, args=(registry,), name=name, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pid != os.getpid():
            return  # a forked child has no such thread, and its parent still works there
        self._done.set()
        # At most a heartbeat under way and one try of the goodbye.
        self._said.wait(self._patience)

    def _note(self, beat: Beat) -> None:
        if beat.state != self._state and beat.state in RESTING:
            reason = f" ({beat.state_reason})" if beat.state_reason else ""
            logger.warning("workspace %s is %s%s; Fleet.resume brings it back", self.workspace, beat.state, reason)
        self._until, self._state = beat.until, beat.state

    @property
    def _timeout_ms(self) -> int:
        return int(self._timeout * 1000)

    def _run(self, registry: Registry) -> None:
        try:
            if self._beat(registry):
                self._goodbye(registry)
        finally:
            self._said.set()
            registry.close()

    def _beat(self, registry: Registry) -> bool:
        """Heartbeats until the block ends; False when there is nobody to say goodbye to."""
        every = self._timeout / BEATS
        pause, quiet = every, False
        while not self._done.wait(pause):
            try:
                self._note(registry.presence.beat(self.workspace, self.holder, self._timeout_ms, "lease"))
            except (errors.NotFound, errors.Gone) as error:
                self._error = error
                logger.warning("workspace %s counts as in use no longer: %s", self.workspace, error.message)
                return False
            except Exception as error:  # whatever it was, the next heartbeat may arrive, and the work must not notice
                self._error = error if isinstance(error, errors.MothballError) else errors.OperationFailed(reason=str(error))
                if not quiet:
                    logger.warning("heartbeat for workspace %s did not arrive (%s); trying again", self.workspace, error)
                pause, quiet = min(every, RETRY_SECONDS), True
            else:
                if quiet:
                    logger.warning("heartbeats for workspace %s arrive again", self.workspace)
                self._error, pause, quiet = None, every, False
        return True

    def _goodbye(self, registry: Registry) -> None:
        last = time.monotonic() + GOODBYE_SECONDS
        while True:
            try:
                registry.presence.goodbye(self.workspace, self.holder, "lease")
            except (errors.NotFound, errors.Gone):
                return
            except Exception as error:
                if not self._said.is_set():
                    logger.warning(
                        "goodbye to workspace %s did not arrive (%s); trying again while this process runs, else it is stranded",
                        self.workspace, error,
                    )  # fmt: skip
                    self._said.set()
                if time.monotonic() >= last:
                    return
                time.sleep(RETRY_SECONDS)
            else:
                return
