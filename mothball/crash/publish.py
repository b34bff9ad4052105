"""From a finished report to a package: which command its config.json starts, what lies below it, to whom it is sealed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal

from mothball.crash.facts import Packaged, PackageFacts
from mothball.crash.report import encode, finish, with_package
from mothball.errors import Corrupt, NotFound
from mothball.settings import Settings
from mothball.store import Store

if TYPE_CHECKING:
    from mothball.package.base import Base
    from mothball.redact import Redactor

Tick = Callable[..., None]
SHELL: Final = ("/bin/sh",)
"""What a package starts whose report names no command and whose image has none."""


def sealing(settings: Settings) -> Callable[[BinaryIO, BinaryIO], None] | None:
    """How packages are sealed on this host, None when they are not; raises `InvalidParams` for a recipient that is none."""
    if not settings.crash_recipients:
        return None
    from mothball.seal.sealed import seal_stream

    return seal_stream(settings.crash_recipients)


def learn_credentials(store: Store, digest: str, redactor: Redactor, tick: Tick = lambda **_: None) -> None:
    """Make the secrets in the credential files of a capture (by their names: .env, .netrc, ...) known to `redactor`.

    A file or a capture that is damaged teaches nothing here; whoever packages it will say so.
    """
    from mothball.crash import content
    from mothball.store.tree import Tree

    with suppress(Corrupt, NotFound), Tree.open(store, digest) as tree:
        content.learn_credentials(tree, redactor, lambda names: tick(step="learn", entries=names))


def config_of(document: Mapping[str, Any], base: Base | None) -> bytes:
    """config.json of a report's package: the command that failed, where the workspace is now, in what is known of its environment.

    After an OOM kill it has the memory limit under which that happened, so that it happens again. A base image's PATH, and what
    else its programs need, is its own; HOME is a folder that is there and can be written.
    """
    from mothball.package.bundle_spec import LEAST_MEMORY, runtime_spec

    evidence, home = document["evidence"], document["workspace"]["path"]
    args = [_moved(word, home) for word in evidence.get("command") or ()] or list((base and base.args) or SHELL)
    told = (evidence.get("environment") or {}).get("variables") or {}
    env = {name: ":".join(_moved(part, home) for part in value.split(":")) for name, value in told.items()}
    if base is not None:
        path = {"PATH": f"{env['PATH']}:{base.env['PATH']}"} if "PATH" in env and "PATH" in base.env else {}
        env = {**env, **base.env, **path}
    env["HOME"] = "/tmp"  # noqa: S108 - in the container, where it is a tmpfs of its own
    limit = (evidence.get("cgroup") or {}).get("memory_limit")
    killed = (evidence.get("exit") or {}).get("oom_killed") is True
    memory = max(limit, LEAST_MEMORY) if killed and isinstance(limit, int) else None
    return runtime_spec(args=args, env={name: value for name, value in env.items() if "\0" not in value}, memory=memory)


def package(
    store: Store,
    digest: str,
    document: Mapping[str, Any],
    *,
    redactor: Redactor,
    settings: Settings,
    to: Path | None = None,
    seal: Callable[[BinaryIO, BinaryIO], None] | None = None,
    binaries: Literal["include", "exclude"] = "include",
    base: str | None = None,
    roots: tuple[Path, ...] | None = None,
    tick: Tick = lambda **_: None,
) -> Packaged:
    """Write the package of the finished report `document` about the capture `digest` into this host's folder, or as the file `to`.

    With `roots` an image `base` that is a layout or an archive must lie below one of them: for jobs, whose arguments anybody may
    send. Raises as `mothball.crash.package.write_package`, and what opening the image `base` raises.
    """
    from mothball.crash.package import write_package, write_package_to

    def report(facts: PackageFacts) -> bytes:
        # Once more each time: what was learned to be a secret on the way may stand in the report as well.
        again = finish(document, redactor, key_id=document["redactions"]["key_id"])
        return encode(with_package({**again, "id": document["id"]}, facts, redactor))

    with _opened(base, settings, tick, roots) as below:
        config = config_of(document, below)
        if to is not None:
            return write_package_to(
                store, digest, report=report, config=config, redactor=redactor, path=to, binaries=binaries, base=below, seal=seal,
                tick=tick,
            )  # fmt: skip
        return write_package(
            store, digest, report=report, config=config, redactor=redactor, folder=settings.crash_dir, name=document["id"],
            binaries=binaries, base=below, seal=seal, tick=tick,
        )  # fmt: skip


@contextmanager
def _opened(reference: str | None, settings: Settings, tick: Tick, roots: tuple[Path, ...] | None) -> Iterator[Base | None]:
    if reference is None:
        yield None
        return
    from mothball.package.base import open_base
    from mothball.package.bundle import scratch_dir
    from mothball.package.target import scratch_folder

    with (
        scratch_folder(scratch_dir(settings.data_dir) / "base") as folder,
        open_base(reference, settings, folder, tick, roots=roots) as base,
    ):
        yield base


def _moved(word: str, home: str) -> str:
    """`word`, a path below the workspace's directory told as it is in the package."""
    from mothball.package.bundle_spec import WORKSPACE

    if home and home != "/" and (word == home or word.startswith(home + "/")):
        return WORKSPACE + word[len(home) :]
    return word
