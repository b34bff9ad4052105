"""One run over a declared image cache of this host, for the job and for the command alike.

What is done is in `mothball.ocicache`. Here it gets what the fleet knows: who holds a lease, when a blob was used last; and the
fleet is told what went. Only a cache that the settings declare is ever touched.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from mothball import cache_fields
from mothball.cache_fields import Cache, CachePolicy
from mothball.durations import show
from mothball.errors import Busy, NoSpace, PathNotAllowed

if TYPE_CHECKING:
    from mothball.ocicache import Lease
    from mothball.ocicache.types import Tick
    from mothball.registry import Registry
    from mothball.settings import Settings

T = TypeVar("T")
PRUNE_TASK, VERIFY_TASK = "image.cache.prune", "image.cache.verify"
UNDELETE_TASK, LIST_TASK = "image.cache.undelete", "image.cache.ls"
WAIT_SECONDS: Final = 30.0
"""How long a run waits for another process that works on the same cache before it is `busy`."""
END_QUARANTINE: Final = {"older_than": "never", "max_bytes": "never", "min_free": "never"}
"""Words of a prune that takes nothing and only ends what is over: the quarantine of an earlier one."""
_SHORT: Final = 300
RESULT_ERRORS: Final = 20
"""Problems of a result that the registry keeps beside the cache; the job's outcome has more."""


def lane_of(args: Mapping[str, Any]) -> str:
    """The lane of a prune: requests join only when they ask for exactly the same, or one would change what another asked for."""
    # Why it was asked makes no other request of it, and neither does a default that was said.
    said = {name: value for name, value in args.items() if name != "reason" and value not in (None, False, {})}
    text = json.dumps(said, sort_keys=True, ensure_ascii=True)
    return f"cache-{hashlib.sha256(text.encode()).hexdigest()[:20]}"


def declared(settings: Settings, folder: str) -> Cache:
    """The declared cache at `folder`; raises `PathNotAllowed` for any other folder, `InvalidParams` for what is no path."""
    path = cache_fields.clean_path(folder, "a cache")
    for cache in settings.caches:
        if cache.path == path:
            return cache
    those = ", ".join(cache.path for cache in settings.caches) or "none"
    raise PathNotAllowed(
        f"{path!r} is not declared as an image cache of host {settings.host}, so it is left alone (declared: {those}); "
        "add it to MOTHBALL_IMAGE_CACHES there and restart the worker",
        path=path,
    )


def policy_for(settings: Settings, cache: Cache, words: Mapping[str, Any] | None = None) -> CachePolicy:
    """The policy of `cache`: `words` over its own, those over the host's. Raises `InvalidParams`."""
    return cache_fields.merge(cache_fields.parse_text(settings.image_cache_policy), cache.own, words or {})


class CacheRun:
    """One cache of this host and what the fleet knows of it.

    `registry` is None when Redis cannot be asked: file times decide alone then, and leases are not known. `ask` makes its calls; a
    job is patient, a command is not.
    """

    def __init__(
        self, settings: Settings, folder: str, registry: Registry | None, ask: Callable[[Callable[[], Any]], Any] | None = None
    ) -> None:
        self.settings = settings
        self.cache = declared(settings, folder)
        self.registry = registry
        self._ask = ask or (lambda call: call())

    def prune(
        self,
        words: Mapping[str, Any] | None = None,
        *,
        dry_run: bool = False,
        everything: bool = False,
        pressure: bool = False,
        tick: Tick | None = None,
    ) -> dict[str, Any]:
        """Prune by the cache's policy changed by `words`, or `everything`; the result in JSON types. Raises what the prune does."""
        from mothball.ocicache import Pressure, PruneResult
        from mothball.ocicache.prune import prune

        here = self.settings
        policy = policy_for(here, self.cache, words)
        marks = Pressure(high=here.cache_high_percent, low=here.cache_low_percent) if pressure else None
        with self._one_per_disk() if pressure and not dry_run else nullcontext(True) as mine:
            if not mine:
                said = "pressure: another cache of this disk is being pruned, nothing to do"
                return PruneResult(cache_dir=self.cache.path, host=here.host, policy=said).to_dict()
            found = prune(
                self.cache,
                policy,
                data_dir=here.data_dir,
                roots=here.workspace_roots,
                host=here.host,
                dry_run=dry_run,
                everything=everything,
                pressure=marks,
                last_use=self._last_use,
                leases=self._leases,
                tick=tick,
                wait_s=WAIT_SECONDS,
            )
        return found.to_dict()

    @contextmanager
    def _one_per_disk(self) -> Iterator[bool]:
        """Two caches of one full disk, pruned at once, would each free all that is wanted. False: another one is being pruned."""
        from mothball.store.blobs import file_lock

        try:
            device = Path(self.cache.path).lstat().st_dev
        except OSError:  # the prune says what is wrong with it
            device = 0
        run_dir = self.settings.run_dir
        with ExitStack() as stack:
            try:
                run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
                lock = file_lock(run_dir / f"cache-disk-{device:x}.lock", f"the disk of {self.cache.path}", wait=WAIT_SECONDS)
                stack.enter_context(lock)
            except (OSError, NoSpace) as error:
                # The disk is so full that there is no room for the lock: that is what this prune is for.
                if isinstance(error, OSError) and error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                    raise
            except Busy:
                yield False
                return
            yield True

    def note(self, result: Mapping[str, Any], run: str, *, reason: str) -> None:
        """Tell the fleet what a prune did, once per `run`. A dry run did nothing."""
        registry = self.registry
        if registry is None or result["dry_run"]:
            return
        errors = [{name: text[:_SHORT] for name, text in each.items()} for each in result["errors"][:RESULT_ERRORS]]
        notes = [each[: 2 * _SHORT] for each in result["notes"][:RESULT_ERRORS]]
        short = {**result, "errors": errors, "notes": notes, "policy": result["policy"][: 2 * _SHORT], "reason": reason}
        host, path = self.settings.host, self.cache.path
        self._ask(lambda: registry.caches.note_pruned(host, path, run, short, reason=reason))
        if result["quarantined_bytes"]:
            self._ask(lambda: registry.caches.quarantined(host, path, result["quarantine_ms"]))

    def verify(self, *, delete: bool, tick: Tick | None = None) -> dict[str, Any]:
        """Read every entry; with `delete` those go whose content is not what their name says (N-04)."""
        from mothball.ocicache.verify import verify

        here = self.settings
        grace = policy_for(here, self.cache).grace
        found = verify(
            self.cache, data_dir=here.data_dir, roots=here.workspace_roots, host=here.host, delete=delete, grace_ms=grace,
            leases=self._leases, tick=tick, wait_s=WAIT_SECONDS,
        )  # fmt: skip
        return found.to_dict()

    def undelete(self, digests: Sequence[str] = (), *, tick: Tick | None = None) -> dict[str, Any]:
        """Bring back what is in quarantine, all of it or `digests`."""
        from mothball.ocicache.undelete import undelete

        here = self.settings
        found = undelete(
            self.cache, data_dir=here.data_dir, roots=here.workspace_roots, host=here.host, digests=digests, tick=tick,
            wait_s=WAIT_SECONDS,
        )  # fmt: skip
        return found.to_dict()

    def usage(self, *, unused_for_ms: int | None = None, tick: Tick | None = None) -> dict[str, Any]:
        """Size, count, oldest, newest; unused for `unused_for_ms`, default what the policy says, else 30 days."""
        from mothball.ocicache.measure import usage

        here = self.settings
        policy = policy_for(here, self.cache)
        span = unused_for_ms or policy.older_than or 30 * 86_400_000
        found = usage(
            self.cache, data_dir=here.data_dir, roots=here.workspace_roots, host=here.host, unused_for_ms=span,
            last_use=self._last_use, tick=tick,
        )  # fmt: skip
        return {**found.to_dict(), "unused_for": show(span), "policy": cache_fields.to_dict(policy)}

    def _last_use(self, digests: Sequence[str]) -> Sequence[int | None]:
        registry = self.registry
        if registry is None:
            return [None] * len(digests)
        host, path = self.settings.host, self.cache.path
        found: Sequence[int | None] = self._ask(lambda: registry.caches.ages(host, path, digests))
        return found

    def _leases(self) -> Sequence[Lease]:
        from mothball.ocicache import Lease

        registry = self.registry
        if registry is None:
            return []
        host, path = self.settings.host, self.cache.path
        found = self._ask(lambda: registry.caches.leases(host, path))
        return [Lease(holder=each.by or each.id, age_ms=each.age) for each in found]
