"""Names of images, and the login that docker's config file has for a registry."""

from __future__ import annotations

import base64
import json
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from mothball.errors import ConfigError, InvalidParams
from mothball.package import credentials
from mothball.package.credentials import Login, find_login
from mothball.package.reference import api_host, is_insecure, parse_reference
from mothball.settings import Settings
from tests.support import eventually

DIGEST = "sha256:" + "0123456789abcdef" * 4
SECRET = "hunter2-do-not-show"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("localhost/a:b", ("localhost", "a", "b", "")),
        ("localhost:5000/a/b-c/d__e:V1.2_x-3", ("localhost:5000", "a/b-c/d__e", "V1.2_x-3", "")),
        ("registry.example.org/a.b/c:latest", ("registry.example.org", "a.b/c", "latest", "")),
        (f"127.0.0.1:5000/a@{DIGEST}", ("127.0.0.1:5000", "a", "", DIGEST)),
        (f"r.io/a:tag@{DIGEST}", ("r.io", "a", "tag", DIGEST)),
        ("[::1]:5000/a:b", ("[::1]:5000", "a", "b", "")),
    ],
)
def test_a_reference_has_its_parts_and_is_written_as_it_was(text: str, parts: tuple[str, ...]) -> None:
    found = parse_reference(text)
    assert tuple(found) == parts
    assert str(found) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a:b",
        "repo/name:tag",
        "library/ubuntu:22.04",
        "r.io/:tag",
        "r.io/A:b",
        "r.io/a",
        "r.io/a:",
        "r.io/a:b:c",
        "r.io/a b:c",
        "r.io/../x:y",
        "r.io/a//b:c",
        "r.io/-a:b",
        "r.io/a@sha256:12",
        "r.io/a@md5:" + "0" * 32,
        "r.io/a:" + "t" * 129,
        "-r.io/a:b",
        "r.io:/a:b",
        "r.io:port/a:b",
        "r_x.io/a:b",
        "https://r.io/a:b",
        "r.io/" + "a" * 300 + ":b",
        "r.io/a:b\n",
        "r.io/a:b?x=y",
        "r.io/a#:b",
    ],
)
def test_what_is_no_reference_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InvalidParams):
        parse_reference(text)


@pytest.mark.parametrize("text", [f"user:{SECRET}@r.io/a:b", f"https://user:{SECRET}@r.io/a:b", f"{SECRET}@r.io/a:b"])
def test_a_password_in_a_reference_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(InvalidParams) as caught:
        parse_reference(text)
    assert SECRET not in str(caught.value)


def test_a_repository_has_neither_tag_nor_digest() -> None:
    assert tuple(parse_reference("r.io/a/b", repository_only=True)) == ("r.io", "a/b", "", "")
    for text in ("r.io/a:b", f"r.io/a@{DIGEST}"):
        with pytest.raises(InvalidParams, match="the repository alone"):
            parse_reference(text, repository_only=True)


@pytest.mark.parametrize(
    ("registry", "insecure"),
    [
        ("localhost", True), ("localhost:5000", True), ("127.0.0.1:5000", True), ("127.9.9.9", True), ("[::1]:5000", True),
        ("plain.example.org:5000", True), ("plain.example.org", False), ("registry.example.org", False), ("10.0.0.1:5000", False),
        ("localhost.example.org", False), ("128.0.0.1", False),
    ],
)  # fmt: skip
def test_only_loopback_and_what_the_settings_name_is_reached_without_tls(
    registry: str, insecure: bool, make_settings: Callable[..., Settings]
) -> None:
    assert is_insecure(registry, make_settings(insecure_registries="plain.example.org:5000, other")) is insecure


def test_docker_hub_has_its_api_under_another_name() -> None:
    assert {api_host(name) for name in ("docker.io", "index.docker.io")} == {"registry-1.docker.io"}
    assert api_host("r.io") == "r.io"


# -- logins -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Callable[[Any], Path]:
    def write(document: Any) -> Path:
        path = tmp_path / "config.json"
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return path

    return write


def packed(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.mark.parametrize(
    ("key", "registry"),
    [
        ("r.io", "r.io"), ("https://r.io", "r.io"), ("https://r.io/v2/", "r.io"), ("r.io:5000", "r.io:5000"),
        ("localhost:5000", "127.0.0.1:5000"), ("127.0.0.1:5000", "localhost:5000"), ("https://index.docker.io/v1/", "docker.io"),
    ],
)  # fmt: skip
def test_the_login_of_a_registry_is_found_as_docker_writes_it(config: Callable[[Any], Path], key: str, registry: str) -> None:
    path = config({"auths": {"other.io": packed("x", "y"), key: packed("me", SECRET + ":with colon")}})
    assert find_login(path, registry) == Login("me", SECRET + ":with colon")
    assert SECRET not in repr(find_login(path, registry))


@pytest.mark.parametrize("registry", ["r.io.evil.example", "evil.example", "r.io:5000", "xr.io"])
def test_a_login_is_for_its_registry_alone(config: Callable[[Any], Path], registry: str) -> None:
    assert find_login(config({"auths": {"r.io": packed("me", SECRET)}}), registry) is None


def test_user_and_password_may_stand_there_openly(config: Callable[[Any], Path]) -> None:
    path = config({"auths": {"r.io": {"username": "me", "password": SECRET}}})
    assert find_login(path, "r.io") == Login("me", SECRET)


def test_without_a_file_or_an_entry_there_is_no_login(config: Callable[[Any], Path], tmp_path: Path) -> None:
    assert find_login(tmp_path / "none.json", "r.io") is None
    for document in (
        {},
        {"auths": {}},
        {"auths": {"r.io": {}}},
        {"auths": None},
        {"auths": [], "credHelpers": 3, "credsStore": ""},
    ):
        assert find_login(config(document), "r.io") is None


@pytest.mark.parametrize(
    "document",
    [
        "no json " + SECRET, "[]", '"' + SECRET + '"', {"auths": {"r.io": {"auth": SECRET}}},
        {"auths": {"r.io": {"auth": base64.b64encode(SECRET.encode()).decode()}}}, {"auths": {"r.io": {"identitytoken": SECRET}}},
        {"credHelpers": {"r.io": "../" + SECRET}}, {"credHelpers": {"r.io": "not-installed-anywhere"}},
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_named_and_nothing_in_it_is(config: Callable[[Any], Path], document: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        find_login(config(document), "r.io")
    assert "config.json" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_file_that_may_not_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        find_login(tmp_path, "r.io")


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Puts a credential helper of this script on PATH and returns its name in a config."""

    def install(script: str) -> str:
        path = tmp_path / "bin" / "docker-credential-test"
        path.parent.mkdir()
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
        return "test"

    return install


def test_a_helper_is_asked_for_the_registry(config: Callable[[Any], Path], helper: Callable[[str], str]) -> None:
    name = helper('test "$1" = get && read -r R; printf \'{"ServerURL":"x","Username":"%s","Secret":"' + SECRET + '"}\' "$R"\n')
    for document in ({"credHelpers": {"r.io": name}}, {"credsStore": name, "auths": {"r.io": {}}}):
        assert find_login(config(document), "r.io") == Login("r.io", SECRET)
    assert find_login(config({"credHelpers": {"r.io": name}}), "other.io") is None
    assert find_login(config({"credsStore": name}), "docker.io") == Login("https://index.docker.io/v1/", SECRET)


def test_a_helper_that_knows_nothing_means_no_login(config: Callable[[Any], Path], helper: Callable[[str], str]) -> None:
    name = helper("echo credentials not found in native keychain; exit 1\n")
    assert find_login(config({"credsStore": name}), "r.io") is None


def living(group: int) -> list[int]:
    """Processes of a group that are not dead yet."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (f"echo {SECRET} >&2; exit 3\n", "exit code 3"),
        (f"echo {SECRET}\n", "can be read"),
        (f'echo \'{{"Username":"<token>","Secret":"{SECRET}"}}\'\n', "identity token"),
        ("exec sleep 60\n", "did not answer"),
        ("sleep 60\n", "did not answer"),
        ("trap '' TERM; sleep 60 & wait\n", "did not answer"),
        (f"exec yes {SECRET}\n", "says more than"),
        (f"yes {SECRET} | cat\n", "says more than"),
        ('echo \'{"Username":["x"],"Secret":{}}\'\n', "can be read"),
        ('printf \'{"Username":"\\\\ud800","Secret":"x"}\'\n', "can be read"),
        ("head -c 60000 /dev/zero | tr '\\0' '['\n", "can be read"),
        ("kill -9 $$\n", "exit code -9"),
    ],
)
def test_a_helper_that_fails_hangs_or_babbles_is_named_and_its_words_are_not_repeated(
    config: Callable[[Any], Path], helper: Callable[[str], str], script: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "HELPER_SECONDS", 1)
    name = helper('echo $$ > "$0.pid"\n' + script)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=reason) as caught:
        find_login(config({"credsStore": name}), "r.io")
    assert time.monotonic() - began < 5
    assert SECRET not in str(caught.value)
    (note,) = (config({}).parent / "bin").glob("*.pid")
    eventually(lambda: not living(int(note.read_text())), seconds=5, what="the end of the helper and of what it started")


def test_a_helper_that_leaves_somebody_behind_has_answered(config: Callable[[Any], Path], helper: Callable[[str], str]) -> None:
    name = helper('sleep 3 &\nprintf \'{"Username":"u","Secret":"s"}\'\n')
    began = time.monotonic()
    assert find_login(config({"credsStore": name}), "r.io") == Login("u", "s")
    assert time.monotonic() - began < 2


def test_a_pipe_in_the_place_of_the_config_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"config\.json"):
        find_login(tmp_path / "config.json", "r.io")
