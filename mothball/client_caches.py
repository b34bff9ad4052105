"""The producers' API about image caches: which there are, prune and verify them, and say that one is in use.

    with fleet.cache_lease("build-7", "/var/cache/oci") as lease:
        pull()                                   # nothing that it writes or reads is pruned meanwhile
        lease.used(["sha256:..."])               # better than file times, where a mount keeps none
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
from typing import TYPE_CHECKING, Any, Self

from mothball import errors
from mothball.client_base import Connected
from mothball.handles import FINAL_STATES, JobHandle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import TracebackType

    from mothball.registry import Registry

LEASE_SECONDS = 60.0
RENEWALS = 3
"""Renewals per length of a lease: two may be lost."""
_RETRY_SECONDS = 1.0
logger = logging.getLogger("mothball.client")


class HeldCache:
    """A lease of one cache, renewed by a thread while a ``with`` block runs. Entering raises `Busy` or `Unavailable`."""

    def __init__(self, connect: Callable[[], Registry], host: str, folder: str, by: str, seconds: float) -> None:
        self.host = host
        self.dir = folder
        self.id = str(uuid.uuid4())
        self._by = by
        self._ms = int(seconds * 1000)
        self._connect = connect
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._registry: Registry | None = None
        self._pid = 0
        self._lost = False

    @property
    def lost(self) -> bool:
        """True when the lease ran out although it was renewed (Redis was away too long): a prune may have taken what was pulled."""
        return self._lost

    def used(self, digests: Iterable[str]) -> int:
        """Say that these blobs are used now."""
        if self._registry is None:
            raise errors.InvalidParams("the lease is not held: call `used` inside its with block")
        return self._registry.caches.used(self.host, self.dir, digests)

    def __enter__(self) -> Self:
        if self._thread is not None:
            raise errors.InvalidParams("a lease is entered once; ask `cache_lease` for another one")
        # A connection of its own: the fleet may be closed, or busy with a long answer, while the pull goes on.
        registry = self._connect()
        try:
            registry.caches.lease(self.host, self.dir, self.id, lasts_ms=self._ms, by=self._by)
        except BaseException:
            registry.close()
            raise
        self._pid, self._registry = os.getpid(), registry
        self._thread = threading.Thread(target=self._keep, args=(registry,), name=f"mothball-cache-{self.id[:8]}", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        registry, thread = self._registry, self._thread
        if registry is None or thread is None or self._pid != os.getpid():
            return  # a forked child has no such thread, and its parent still uses the cache
        self._done.set()
        thread.join(2 * registry.settings.redis_timeout + 1)
        self._registry = None
        try:
            registry.caches.drop(self.host, self.dir, self.id)
        except errors.MothballError as trouble:
            logger.warning("the lease of cache %s was not given back (%s); it runs out by itself", self.dir, trouble)
        finally:
            registry.close()

    def _keep(self, registry: Registry) -> None:
        every = pause = self._ms / 1000 / RENEWALS
        while not self._done.wait(pause):
            pause = every
            try:
                registry.caches.renew(self.host, self.dir, self.id, lasts_ms=self._ms, by=self._by)
            except errors.LeaseLost:
                self._lost = True
                logger.warning("the lease of cache %s ran out; it is taken again, but a prune may have begun", self.dir)
                pause = every if self._again(registry) else min(every, _RETRY_SECONDS)
            except errors.MothballError as trouble:
                logger.warning("the lease of cache %s could not be renewed (%s); trying again", self.dir, trouble)
                pause = min(every, _RETRY_SECONDS)

    def _again(self, registry: Registry) -> bool:
        try:
            registry.caches.lease(self.host, self.dir, self.id, lasts_ms=self._ms, by=self._by)
        except errors.MothballError:
            return False
        return True


class CacheCalls(Connected):
    """See `mothball.client.Fleet`, which inherits all of it."""

    def caches(self, *, host: str | None = None) -> list[dict[str, Any]]:
        """The image caches that hosts declare, of one host if asked: ``host``, ``online``, ``dir``, ``kind`` (as declared),
        ``policy``, the figures of its disk (``total_bytes``, ``free_bytes``, ``used_percent``, or ``problem``), ``leases`` (who
        uses it now) and ``last`` (the last prune: ``at`` in ms of Redis TIME, ``result``; None). `caches_ls` measures one.
        """
        found = self.registry.hosts.list() if host is None else [self.registry.hosts.get(host)]
        out = []
        for each in found:
            for cache in _announced(each.info):
                last = self.registry.caches.last(each.host, cache["dir"])
                leases = self.registry.caches.leases(each.host, cache["dir"])
                out.append(
                    {
                        "host": each.host,
                        "online": each.online,
                        **cache,
                        "leases": [{"by": one.by, "began": one.began, "until": one.until} for one in leases],
                        "last": None if last is None else {"at": last.at, "result": last.result},
                    }
                )
        return out

    def cache_prune(
        self,
        host: str,
        dir: str,  # noqa: A002 - as the cache is called everywhere
        policy: Mapping[str, Any] | str | None = None,
        *,
        dry_run: bool = False,
        everything: bool = False,
        pressure: bool = False,
    ) -> JobHandle[dict[str, Any]]:
        """Ask `host` to prune its cache `dir`; the result has ``bytes_freed``, ``blobs_freed``, ``kept`` by reason and more (N-01).

        `policy`: words such as ``older_than=7d,max_bytes=10GiB`` that count over those of the cache, in this run. `everything`
        empties the cache. `pressure`: only while its disk is above the high mark. While the same request waits or runs, this one
        joins it. Raises `InvalidParams`, `HostOffline`, `Unavailable`; what the host finds wrong is raised by the handle.
        """
        from mothball import cache_fields
        from mothball.pruning import PRUNE_TASK, lane_of

        words = cache_fields.parse_text(policy) if isinstance(policy, str) else cache_fields.check(policy or {})
        if everything and (words or pressure):
            raise errors.InvalidParams("everything leaves nothing for a policy or for pressure to decide; say one of them")
        folder = cache_fields.clean_path(dir, "a cache")
        args: dict[str, Any] = {
            "host": host, "dir": folder, "policy": words, "dry_run": dry_run, "everything": everything, "pressure": pressure
        }  # fmt: skip
        lane = lane_of(args)
        running = self.registry.caches.running(host, folder, lane)
        if running is not None and (handle := self._still_running(running)) is not None:
            return handle
        submitted = self.submit(PRUNE_TASK, {**args, "reason": "asked"}, workspace=None, host=host, lane=lane)
        return JobHandle(self, submitted.job.id, dict, joined=submitted.joined)

    def cache_verify(self, host: str, dir: str, *, delete: bool = True) -> JobHandle[dict[str, Any]]:  # noqa: A002
        """Ask `host` to read every entry of its cache `dir`; with `delete` those go that are not what their name says (N-04)."""
        from mothball.pruning import VERIFY_TASK

        return self._cache_job(VERIFY_TASK, host, dir, delete=delete)

    def cache_undelete(self, host: str, dir: str, digests: Sequence[str] = ()) -> JobHandle[dict[str, Any]]:  # noqa: A002
        """Ask `host` to bring back what a policy removed from its cache `dir` and is in quarantine, all of it or `digests`."""
        from mothball.pruning import UNDELETE_TASK

        if isinstance(digests, (str, bytes)):
            raise errors.InvalidParams("digests must be a list of digests")
        return self._cache_job(UNDELETE_TASK, host, dir, digests=list(digests))

    def cache_ls(self, host: str, dir: str, *, unused_for: str | None = None) -> JobHandle[dict[str, Any]]:  # noqa: A002
        """Ask `host` to measure its cache `dir`: size, count, oldest, newest, and what was unused for `unused_for` (``30d``)."""
        from mothball.pruning import LIST_TASK

        return self._cache_job(LIST_TASK, host, dir, unused_for=unused_for)

    def cache_used(self, host: str, dir: str, digests: Iterable[str]) -> int:  # noqa: A002
        """Say that blobs of `host`'s cache `dir` were used now, so that they leave last; returns how many uses are remembered.

        Raises `InvalidParams` for what is no digest, `PathNotAllowed` for a cache that the host does not declare, `HostOffline`.
        """
        return self.registry.caches.used(host, self._known_cache(host, dir), digests)

    def cache_lease(self, host: str, dir: str, *, by: str = "", seconds: float = LEASE_SECONDS) -> HeldCache:  # noqa: A002
        """Protect `host`'s cache `dir` while a ``with`` block runs: a full prune is `busy`, and no policy takes what is used or
        written since it began. `seconds`: how long the lease stands when this process dies; it is renewed in time.
        """
        from mothball.registry import Registry

        folder = self._known_cache(host, dir)
        return HeldCache(lambda: Registry.connect(self.settings), host, folder, by, seconds)

    def _known_cache(self, host: str, folder: str) -> str:
        """`folder` as the host announced it; a use or a lease of any other would be of no effect, and nobody would notice."""
        from mothball import cache_fields

        path = cache_fields.clean_path(folder, "a cache")
        try:
            known = [each["dir"] for each in _announced(self.registry.hosts.get(host).info)]
        except errors.NotFound:
            raise errors.HostOffline(host=host) from None
        if path not in known:
            those = ", ".join(known) or "none"
            raise errors.PathNotAllowed(f"{path!r} is not an image cache of host {host} (declared: {those})", path=path)
        return path

    def _cache_job(self, task: str, host: str, folder: str, **more: Any) -> JobHandle[dict[str, Any]]:
        from mothball import cache_fields

        args = {"host": host, "dir": cache_fields.clean_path(folder, "a cache"), **more}
        return JobHandle(self, self.submit(task, args, workspace=None, host=host).job.id, dict)

    def _still_running(self, job: str) -> JobHandle[dict[str, Any]] | None:
        try:
            if self.job_record(job).state in FINAL_STATES:
                return None
        except errors.NotFound:
            return None
        return JobHandle(self, job, dict, joined=True)


def _announced(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = info.get("image_caches")
    if not isinstance(found, list):
        return []
    return [each for each in found if isinstance(each, dict) and isinstance(each.get("dir"), str)]
