"""config.json of a runtime bundle (B-112, B-118): what runc needs, nothing of the host, the same bytes for the same command.

Every line that could be left out was left out once, and runc refused it, wrote device nodes into the rootfs or left a mount
on the host. So specs are made here alone, and one that comes from elsewhere is looked at before anything is started with it.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mothball.errors import InvalidParams
from mothball.store.manifest import canonical
from mothball.store.read import show

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

OCI_VERSION: Final = "1.0.2"
WORKSPACE: Final = "/workspace"
DEFAULT_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_PIDS: Final = 1024
"""Most processes and threads in a bundle, unless the caller says otherwise."""
LEAST_MEMORY: Final = 6 * 1024**2
"""Bytes; below this runc itself does not come as far as the command."""
MAX_ARGS: Final = 1000
MAX_ENV: Final = 1000
MAX_TEXT: Final = 128 * 1024
"""Longest argument or variable, bytes: the kernel's own limit."""
MAX_SPEC: Final = 4 * 1024**2
MAX_VALUES: Final = 10_000
"""Most values of a config.json that somebody else wrote."""
NAMESPACES: Final = ("mount", "pid", "ipc", "uts", "network")

_MOST_KILLABLE: Final = 1000
_TMPFS: Final = ["nosuid", "nodev", "mode=1777"]
_MOUNTS: Final[tuple[dict[str, Any], ...]] = (
    {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
    # Without it runc makes the device nodes in the bundle's own rootfs: its digests change.
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
    {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
     "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
    {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": [*_TMPFS, "noexec", "size=65536k"]},  # noqa: S108
    {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
    {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": [*_TMPFS, "size=1g"]},  # noqa: S108 - of the bundle
)  # fmt: skip
_MASKED: Final = (
    "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug", "/proc/scsi",
    "/proc/timer_list", "/proc/timer_stats",
)  # fmt: skip
_READONLY: Final = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_CAPABILITIES: Final = ("ambient", "bounding", "effective", "inheritable", "permitted")
MOUNT_POINTS: Final = ("dev", "proc", "tmp")
"""Folders of the rootfs over which something is mounted; runc would make them, even below a read-only root."""

_KERNEL: Final = frozenset({"dev", "proc", "sys"})
"""Through /proc/self/fd a working directory was a way out of the container (CVE-2024-21626)."""
_TEMPORARY: Final = "/tmp"  # noqa: S108 - of the bundle
_TYPES: Final = frozenset({"proc", "tmpfs", "devpts", "mqueue", "sysfs", "cgroup"})
"""Types of mounts that show nothing of the host's files."""
_PROCESS_KEYS: Final = frozenset(
    {"terminal", "user", "args", "env", "cwd", "capabilities", "noNewPrivileges", "rlimits", "oomScoreAdj", "consoleSize"}
)
_LINUX_KEYS: Final = frozenset(
    {"namespaces", "maskedPaths", "readonlyPaths", "resources", "uidMappings", "gidMappings", "seccomp", "cgroupsPath", "devices"}
)


def runtime_spec(
    *,
    args: Sequence[str],
    env: Mapping[str, str] | None = None,
    cwd: str = WORKSPACE,
    rootless: bool = False,
    uid: int = 0,
    gid: int = 0,
    memory: int | None = None,
    pids: int | None = DEFAULT_PIDS,
    readonly: bool = True,
    hostname: str = "mothball",
    root: str = "rootfs",
    cgroup: bool | None = None,
) -> bytes:
    """config.json for `args`, as canonical JSON with a line feed at its end.

    The command is user 0 without any capability, cannot gain one, sees no network and nothing of the host; /tmp is its own and
    the rest read-only unless `readonly` is False. `rootless`: in a user namespace in which its user 0 is `uid` and `gid` of the
    host, who must be whoever starts it. There are no cgroups then: `memory` (bytes) bounds the address space of every process
    instead of the sum, and `pids` counts for nothing. None: no limit. `cgroup` True: there are cgroups all the same, for it is root
    who starts it. Raises `InvalidParams`.
    """
    cgroup = not rootless if cgroup is None else cgroup
    process: dict[str, Any] = {
        "terminal": False,
        "user": {"uid": 0, "gid": 0},
        "args": check_command(args),
        "env": [f"{name}={value}" for name, value in sorted(check_env(env or {}).items())],
        "cwd": check_cwd(cwd),
        "capabilities": {name: [] for name in _CAPABILITIES},
        "noNewPrivileges": True,
        # When memory runs out on a host, let it be this. The most there is: less than a worker's own would be a privilege.
        "oomScoreAdj": _MOST_KILLABLE,
        "rlimits": [{"type": "RLIMIT_CORE", "hard": 0, "soft": 0}, {"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
    }
    if memory is not None and memory < LEAST_MEMORY:
        raise InvalidParams(f"a memory limit of {memory} bytes is too small for runc itself; at least {LEAST_MEMORY} are needed")
    if pids is not None and pids < 1:
        raise InvalidParams(f"a limit of {pids} processes lets none run")
    linux: dict[str, Any] = {
        "namespaces": [{"type": name} for name in NAMESPACES],
        "maskedPaths": list(_MASKED),
        "readonlyPaths": list(_READONLY),
    }
    if rootless:
        linux["namespaces"].append({"type": "user"})
        linux["uidMappings"] = [{"containerID": 0, "hostID": uid, "size": 1}]
        linux["gidMappings"] = [{"containerID": 0, "hostID": gid, "size": 1}]
        if memory is not None and not cgroup:
            process["rlimits"].append({"type": "RLIMIT_AS", "hard": memory, "soft": memory})
    if cgroup:
        resources: dict[str, Any] = {"devices": [{"allow": False, "access": "rwm"}]}
        if memory is not None:
            resources["memory"] = {"limit": memory, "swap": memory}
        if pids is not None:
            resources["pids"] = {"limit": pids}
        linux["resources"] = resources
    document = {
        "ociVersion": OCI_VERSION,
        "process": process,
        "root": {"path": root, "readonly": readonly},
        "hostname": hostname,
        "mounts": [dict(mount) for mount in _MOUNTS],
        "linux": linux,
    }
    return canonical(document) + b"\n"


def check_command(args: object) -> list[str]:
    """`args` when a program can be started with them: at least one, texts without NUL; else `InvalidParams`."""
    if isinstance(args, str) or not isinstance(args, Sequence) or not args or not all(isinstance(each, str) for each in args):
        raise InvalidParams("a command is a list of texts with at least one in it, the program's name")
    if len(args) > MAX_ARGS or any(not _is_text(each) for each in args):
        raise InvalidParams(f"a command has at most {MAX_ARGS} arguments of at most {MAX_TEXT} bytes of UTF-8, without NUL")
    if not args[0]:
        raise InvalidParams("the name of the program to start is empty")
    return list(args)


def check_env(env: Mapping[str, str]) -> dict[str, str]:
    """`env` with a PATH, without which runc finds no program by its bare name; else `InvalidParams`, which names no value."""
    for name, value in env.items():
        if not name or "=" in name or not _is_text(name):
            raise InvalidParams(f"{name[:100]!r} cannot be the name of an environment variable")
        if not _is_text(value):
            raise InvalidParams(f"the environment variable {name[:100]} has a value that holds a NUL, is too long or is no UTF-8")
    if len(env) > MAX_ENV:
        raise InvalidParams(f"{len(env)} environment variables are too many; at most {MAX_ENV}")
    return {"PATH": DEFAULT_PATH, **env}


def check_cwd(cwd: str) -> str:
    """`cwd` when it is an absolute path in its shortest form."""
    if not cwd.startswith("/") or posixpath.normpath(cwd) != cwd or cwd.startswith("//") or not _is_text(cwd):
        raise InvalidParams(f"the working directory {cwd[:200]!r} must be absolute, without '.', '..' and double '/'")
    if cwd.split("/")[1] in _KERNEL:
        raise InvalidParams(f"the working directory {cwd[:200]!r} is the kernel's and no place to work in")
    return cwd


def _is_text(text: str) -> bool:
    try:
        return "\0" not in text and len(text.encode()) <= MAX_TEXT
    except UnicodeEncodeError:
        return False


# -- the published schema ----------------------------------------------------------------------------------------------


@cache
def _validator() -> Validator:
    from jsonschema import Draft4Validator
    from referencing import Registry
    from referencing.jsonschema import DRAFT4

    folder = Path(__file__).parent / "schema"
    documents = {path.name: json.loads(path.read_bytes()) for path in folder.glob("*.json")}
    registry: Registry[Any] = Registry().with_resources((name, DRAFT4.create_resource(each)) for name, each in documents.items())
    return Draft4Validator({"$ref": "config-schema.json"}, registry=registry)


def check_schema(document: Any, what: str = "config.json") -> None:
    """`InvalidParams` unless `document` is what the published JSON schema of the OCI runtime specification asks for."""
    worst = min(_validator().iter_errors(document), key=lambda error: (len(error.absolute_path), str(error.message)), default=None)
    if worst is not None:
        place = ".".join(str(part) for part in worst.absolute_path) or "the document"
        raise InvalidParams(f"{what} is no runtime spec: {show(f'{place}: {worst.message}'.encode('utf-8', 'replace')[:300])}")


# -- what somebody else's bundle may ask for -----------------------------------------------------------------------------


def check_bundle(folder: Path) -> dict[str, Any]:
    """The spec of the bundle `folder`, when it asks for nothing that reaches the host; else `InvalidParams` with every reason.

    Schema and our own policy: no hooks, no folder or namespace of the host, no capability, no new privileges, ``rootfs`` a real
    folder in which all mount points are real folders. Nothing is started or changed.
    """
    spec = read_spec(folder)
    rootless = any(each.get("type") == "user" for each in spec.get("linux", {}).get("namespaces", []))
    wrong = list(_violations(spec))
    if not wrong:
        wrong = list(_missing_folders(folder, [each["destination"] for each in spec["mounts"]], spec["process"]["cwd"]))
    if wrong:
        how = "rootless " if rootless else ""
        raise InvalidParams(f"the {how}bundle {folder} is not started: {'; '.join(wrong[:10])}")
    return spec


def read_spec(folder: Path) -> dict[str, Any]:
    """config.json of the bundle `folder`, valid by the published schema; `InvalidParams`."""
    from mothball.errors import Corrupt
    from mothball.store.foreign import read_json

    try:
        fd = os.open(folder / "config.json", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            data = file.read(MAX_SPEC + 1)
    except OSError as error:
        raise InvalidParams(f"{folder} is no bundle: its config.json cannot be read ({error.strerror})") from None
    try:
        spec = read_json(data, dict, "config.json", limit=MAX_SPEC)
    except Corrupt as error:
        raise InvalidParams(f"{folder} is no bundle: {error.message}") from None
    if _values(spec, MAX_VALUES) >= MAX_VALUES:  # each costs the validator time, and nobody's command has so many
        raise InvalidParams(f"{folder} is no bundle: its config.json holds more than {MAX_VALUES:,} values")
    check_schema(spec, f"{folder / 'config.json'}")
    return spec


def _values(document: Any, limit: int) -> int:
    """How many values `document` (of bounded depth) holds; counting ends at `limit`."""
    found, waiting = 0, [document]
    while waiting and found < limit:
        value = waiting.pop()
        found += 1
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return found


def _violations(spec: dict[str, Any]) -> list[str]:
    process, linux, root = spec.get("process"), spec.get("linux"), spec.get("root")
    if not isinstance(process, dict) or not isinstance(linux, dict) or not isinstance(root, dict):
        return ["it has no process, no root or no linux section"]
    wrong = []
    if not str(spec.get("ociVersion", "")).startswith("1."):
        wrong.append("its ociVersion is not 1.x")
    if any((spec.get("hooks") or {}).values()):
        wrong.append("it has hooks, which are programs of the host")
    if root.get("path") != "rootfs":
        wrong.append("its root is not the folder rootfs beside config.json")
    wrong += _process(process) + _linux(linux)
    mounts = spec.get("mounts") or []
    for mount in mounts:
        options = mount.get("options") or []
        shown = show(str(mount.get("destination", "")).encode("utf-8", "replace")[:100])
        if mount.get("type") not in _TYPES or {"bind", "rbind"} & set(options):
            wrong.append(f"it mounts something of the host at {shown}")
        elif any(name in options for name in ("shared", "rshared", "suid", "slave", "rslave", "tmpcopyup")):
            wrong.append(f"it mounts {shown} with options that are not allowed")
    found = {mount.get("destination"): mount.get("type") for mount in mounts}
    if found.get("/proc") != "proc" or found.get("/dev") != "tmpfs":
        wrong.append("it does not mount /proc and /dev")
    return wrong


def _process(process: dict[str, Any]) -> list[str]:
    wrong = [f"process.{name[:50]} is not supported" for name in sorted(set(process) - _PROCESS_KEYS)]
    if int(process.get("oomScoreAdj") or 0) < 0:
        wrong.append("it wants to outlive others when memory runs out")
    if process.get("terminal"):
        wrong.append("it asks for a terminal")
    if any((process.get("capabilities") or {}).get(name) for name in _CAPABILITIES) or "capabilities" not in process:
        wrong.append("it keeps capabilities")
    if not process.get("noNewPrivileges"):
        wrong.append("it may gain privileges")
    user = process.get("user") or {}
    if user.get("uid") or user.get("gid") or user.get("additionalGids"):
        wrong.append("its user is not 0:0")
    try:
        check_command(process.get("args"))
        check_cwd(process.get("cwd", ""))
        check_env(env_of(process))
    except InvalidParams as error:
        wrong.append(error.message)
    return wrong


def _linux(linux: dict[str, Any]) -> list[str]:
    wrong = [f"linux.{name[:50]} is not supported" for name in sorted(set(linux) - _LINUX_KEYS)]
    namespaces = linux.get("namespaces") or []
    if any(each.get("path") for each in namespaces):
        wrong.append("it joins a namespace of the host")
    missing = sorted(set(NAMESPACES) - {each.get("type") for each in namespaces})
    if missing:
        wrong.append(f"it shares with the host the namespaces {', '.join(missing)}")
    if linux.get("devices"):
        wrong.append("it makes devices of the host")
    if any(each.get("allow") for each in (linux.get("resources") or {}).get("devices") or []):
        wrong.append("it allows devices of the host")
    return wrong


def env_of(process: dict[str, Any]) -> dict[str, str]:
    """The environment in a spec's `process`; an entry without ``=`` is `InvalidParams`, for runc refuses it."""
    found: dict[str, str] = {}
    for entry in process.get("env") or []:
        name, equals, value = str(entry).partition("=")
        if not equals:
            raise InvalidParams(f"an environment entry without '=' ({show(name.encode('utf-8', 'replace')[:100])})")
        found[name] = value
    return found


def _missing_folders(folder: Path, mounts: list[str], cwd: str) -> list[str]:
    """Mount points and the working directory that are no real folders; below a mounted /dev nothing needs to be there."""
    from mothball.store.below import FOLDER_FLAGS

    wrong = []
    try:
        root = os.open(folder / "rootfs", FOLDER_FLAGS)
    except OSError:
        return ["its rootfs is no folder (a link to one is none)"]
    try:
        wanted = [each for each in mounts if not each.startswith("/dev/")]
        if cwd != _TEMPORARY and not cwd.startswith(_TEMPORARY + "/"):  # ours is empty; what it mounts elsewhere does not count
            wanted.append(cwd)
        for path in wanted:
            fd = os.dup(root)
            try:
                for part in path.strip("/").split("/"):
                    if part in {"", ".", ".."}:
                        continue
                    deeper = os.open(part, FOLDER_FLAGS, dir_fd=fd)
                    os.close(fd)
                    fd = deeper
            except (OSError, ValueError):  # a NUL in a name
                wrong.append(f"there is no folder {show(path.encode('utf-8', 'replace')[:100])} in its rootfs")
            finally:
                os.close(fd)
    finally:
        os.close(root)
    return wrong
