"""User and password for a registry, from docker's config file: written in it, or kept by a credential helper.

Only the file that the settings name is read. The client library would add ``~/.docker/config.json`` to it, and then an
operator who gave the fleet an account of its own would push with that of whoever started the worker.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import select
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from mothball.errors import ConfigError, Corrupt
from mothball.package.reference import DOCKER_HUB
from mothball.store.foreign import read_json

HELPER_SECONDS: Final = 30
"""How long a credential helper may take; it may have to unlock a key store, and must not hang a worker."""
HELPER_BYTES: Final = 64 * 1024
"""Most that a credential helper may say."""
_FILE_BYTES: Final = 16 * 1024**2
_HELPER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_HUB_KEY: Final = "https://index.docker.io/v1/"
_TOKEN_USER: Final = "<token>"  # noqa: S105 -- what helpers write where a user stands when the secret is an identity token
_NOT_FOUND: Final = "credentials not found"


class Login(NamedTuple):
    """User and password; `repr` shows neither."""

    user: str
    password: str

    def __repr__(self) -> str:
        return "Login(***)"


def find_login(config: Path, registry: str) -> Login | None:
    """The login for `registry` in docker's config file, None when it has none (or there is no such file).

    Raises `ConfigError` for a file that cannot be read, a helper that fails, and an identity token, which needs a kind of
    exchange that the client does not do. No message holds anything of the file's content.
    """
    document = _load(config)
    helpers = document.get("credHelpers")
    helper = helpers.get(registry) if isinstance(helpers, dict) else None
    if isinstance(helper, str) and helper:
        return _ask_helper(helper, registry, config)
    auths = document.get("auths")
    for key, entry in (auths if isinstance(auths, dict) else {}).items():
        if isinstance(entry, dict) and _host(str(key)) in _names(registry) and (login := _inline(entry, registry, config)):
            return login
    store = document.get("credsStore")
    return _ask_helper(store, registry, config) if isinstance(store, str) and store else None


def _load(config: Path) -> dict[str, Any]:
    try:
        # Not blocking: in the place of the file may be a pipe that nobody writes to.
        with open(config, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            data = file.read(_FILE_BYTES + 1)
        document: dict[str, Any] = read_json(data or b"", dict, "config", limit=_FILE_BYTES)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"docker's config file {config} cannot be read: {error.strerror}") from None
    except Corrupt:
        raise ConfigError(f"docker's config file {config} is not a JSON object") from None
    return document


def _host(key: str) -> str:
    """The registry of a key of ``auths``, which old versions of docker wrote as a URL."""
    return re.sub(r"\Ahttps?://", "", key).partition("/")[0]


def _names(registry: str) -> frozenset[str]:
    """Under which names the login may stand; localhost and 127.0.0.1 are one to every client."""
    if registry in DOCKER_HUB:
        return DOCKER_HUB
    names = {registry}
    for one, other in (("localhost", "127.0.0.1"), ("127.0.0.1", "localhost")):
        if registry.partition(":")[0] == one:
            names.add(registry.replace(one, other, 1))
    return frozenset(names)


def _inline(entry: dict[str, Any], registry: str, config: Path) -> Login | None:
    if entry.get("identitytoken"):
        raise _identity(registry, config)
    user, password = entry.get("username"), entry.get("password")
    if isinstance(user, str) and isinstance(password, str) and user:
        return Login(user, password)
    packed = entry.get("auth")
    if not packed:
        return None  # docker writes an empty entry when a helper keeps the login
    try:
        user, colon, password = base64.b64decode(str(packed), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        colon = ""
    if not colon:
        raise ConfigError(f"docker's config file {config}: the `auth` of {registry} is not the base64 form of user:password")
    return Login(str(user), str(password))


def _ask_helper(name: str, registry: str, config: Path) -> Login | None:
    if not _HELPER.match(name):
        raise ConfigError(f"docker's config file {config} names a credential helper with a name that is none")
    program = f"docker-credential-{name}"
    key = _HUB_KEY if registry in DOCKER_HUB else registry
    try:
        code, said = _run(program, key.encode())
    except FileNotFoundError:
        raise ConfigError(f"docker's config file {config} names the credential helper {program}, which is not on PATH") from None
    except subprocess.TimeoutExpired:
        raise ConfigError(f"the credential helper {program} did not answer within {HELPER_SECONDS} s") from None
    except OSError as error:
        raise ConfigError(f"the credential helper {program} failed: {error.strerror or type(error).__name__}") from None
    if code != 0:
        # Helpers say this on stdout, and it only means that nobody is logged in there.
        if _NOT_FOUND in said.decode("utf-8", "replace").lower():
            return None
        raise ConfigError(f"the credential helper {program} failed for {registry} with exit code {code}")
    try:
        answer: dict[str, Any] = read_json(said, dict, "answer", limit=HELPER_BYTES)
        login = Login(_text(answer["Username"]), _text(answer["Secret"]))
    except (Corrupt, KeyError, TypeError):
        raise ConfigError(f"the credential helper {program} gave no login for {registry} that can be read") from None
    if login.user == _TOKEN_USER:
        raise _identity(registry, config)
    return login


def _run(program: str, question: bytes) -> tuple[int, bytes]:
    """Exit code and stdout of a helper. What hangs or talks without end is killed, with the processes that it has started:
    one that sleeps on would hold its end of the pipe, and whoever waits for the end of that."""
    until = time.monotonic() + HELPER_SECONDS
    said = bytearray()
    with subprocess.Popen(
        [program, "get"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        bufsize=0,
    ) as process:
        try:
            assert process.stdin is not None and process.stdout is not None  # noqa: S101 -- they are pipes
            with suppress(BrokenPipeError), process.stdin:
                process.stdin.write(question)  # it fits into any pipe
            while (left := until - time.monotonic()) > 0:
                ended = process.poll() is not None
                if select.select([process.stdout], [], [], 0 if ended else min(left, 0.05))[0]:
                    piece = process.stdout.read(HELPER_BYTES)
                    said += piece
                    if len(said) > HELPER_BYTES:
                        raise OSError(0, f"it says more than {HELPER_BYTES:,} bytes")
                    if not piece:
                        process.wait(left)
                        return process.returncode, bytes(said)
                elif ended:
                    return process.returncode, bytes(said)
            raise subprocess.TimeoutExpired(program, HELPER_SECONDS)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _identity(registry: str, config: Path) -> ConfigError:
    return ConfigError(
        f"docker's config file {config} has an identity token for {registry}, which is not supported; "
        "log in with a user and a password (or an access token as password)"
    )
