"""The one place where a client of the registry is built, and where its errors become ours.

No automatic retry: redis-py would send a write again whose answer was only late, and it would count twice
(celery-practice.md 1.5). Whoever wants to repeat a call does so knowing that the scripts are fenced.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

from mothball.errors import MothballError, OperationFailed, Unavailable
from mothball.settings import Settings, redact_url

# Answers of a server that is there but cannot serve: for the caller the same as one that is not there. redis-py takes the code
# off the text where it has a class for it; servers before 7 put the code of a refused command inside the text of a script's error.
_NOT_SERVING_ERRORS = (
    redis.OutOfMemoryError,
    redis.ReadOnlyError,
    redis.exceptions.MasterDownError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.TryAgainError,
    redis.exceptions.NoPermissionError,
)
_CODES = "OOM|MISCONF|READONLY|LOADING|MASTERDOWN|NOAUTH|WRONGPASS|NOPERM|BUSY|UNKILLABLE|NOREPLICAS|CLUSTERDOWN|TRYAGAIN"
_NOT_SERVING = re.compile(rf"(?:{_CODES})\b|.*@user_script.* -(?:{_CODES})\b", re.DOTALL)


class Connection:
    """A pool of connections to the registry's database; safe to share between threads, one per process."""

    def __init__(self, settings: Settings) -> None:
        """Build the client; nothing is sent until the first call. One answer takes at most `settings.redis_timeout` s."""
        url = settings.registry_url
        self.namespace = settings.namespace
        self.timeout = settings.redis_timeout
        self.redacted_url = redact_url(url)
        parts = urlsplit(url)
        self._secrets = tuple(text for raw in (parts.password, parts.username) if raw for text in {raw, unquote(raw)})
        self.client: Any = redis.Redis.from_url(
            url,
            decode_responses=True,
            encoding_errors="surrogateescape",
            retry=Retry(NoBackoff(), 0),
            socket_timeout=self.timeout,
            socket_connect_timeout=self.timeout,
            client_name=f"{settings.namespace}-registry",
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
        )

    @contextmanager
    def guard(self) -> Iterator[Any]:
        """The client; every redis error inside becomes `Unavailable` (cannot be reached or cannot serve) or `OperationFailed`."""
        try:
            yield self.client
        except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
            raise Unavailable(url=self.redacted_url, reason=self._clean(error)) from None
        except redis.InvalidResponse as error:
            reason = f"what answers there is no Redis ({self._clean(error)})"
            raise Unavailable(url=self.redacted_url, reason=reason) from None
        except redis.RedisError as error:
            reason = self._clean(error)
            if isinstance(error, _NOT_SERVING_ERRORS) or _NOT_SERVING.match(reason):
                raise Unavailable(url=self.redacted_url, reason=reason) from None
            raise OperationFailed(reason=f"the registry answered: {reason}") from error
        except MothballError:
            raise
        except BaseException:
            # A time limit may strike between a call and its answer. The connection lies in the pool again by now, and its next user
            # would read that answer as his own.
            self.client.connection_pool.disconnect(inuse_connections=False)
            raise

    def _clean(self, error: BaseException) -> str:
        text = str(error).strip() or type(error).__name__
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text[:500]

    def time_ms(self) -> int:
        """Redis TIME in ms: the only clock of the registry."""
        with self.guard() as client:
            seconds, micros = client.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def close(self) -> None:
        """Close every connection of this process; the next call opens a new one."""
        self.client.close()
