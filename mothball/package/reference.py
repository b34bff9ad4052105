"""Names of images in registries: ``REGISTRY/REPO:TAG`` or ``REGISTRY/REPO@sha256:...``, always with the registry.

Docker's default registry is not assumed: a capture that was meant for a registry at home must not go to the public one
because a host was forgotten.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final, NamedTuple

from mothball.errors import InvalidParams
from mothball.settings import Settings

_REGISTRY: Final = re.compile(r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?\Z")
_REPOSITORY: Final = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*\Z")
_TAG: Final = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}\Z")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}\Z")
_MAX_NAME: Final = 255
_FORM: Final = "REGISTRY/REPO:TAG, for example registry.example.org:5000/captures/repo-12:snap-3"
DOCKER_HUB: Final = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})


class Reference(NamedTuple):
    """One image, or with neither tag nor digest one repository."""

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    @property
    def target(self) -> str:
        """The tag or the digest, as it stands in URLs; the digest when there are both."""
        return self.digest or self.tag

    def __str__(self) -> str:
        name = f"{self.registry}/{self.repository}"
        return name + (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")


def parse_reference(text: str, *, repository_only: bool = False) -> Reference:
    """The parts of `text`; with `repository_only` it must have neither tag nor digest, else it must have one.

    Raises `InvalidParams`, whose text does not repeat `text` when it might hold a password.
    """
    if not isinstance(text, str) or "@" in text.partition("/")[0] or "://" in text:
        raise InvalidParams(f"an image is named {_FORM}; without a scheme, user or password (those stand in docker's config file)")
    registry, slash, rest = text.partition("/")
    rest, at, digest = rest.partition("@")
    repository, colon, tag = rest.partition(":")
    known = "." in registry or ":" in registry or registry == "localhost"
    if not slash or not known or not _REGISTRY.match(registry):
        raise InvalidParams(f"{text[:300]!r} does not name a registry; an image is named {_FORM}")
    if not _REPOSITORY.match(repository) or len(registry) + len(repository) >= _MAX_NAME:
        raise InvalidParams(
            f"{repository[:300]!r} is not a name of a repository: lower case letters, digits and single . _ - / between"
        )
    if (colon and not _TAG.match(tag)) or (at and not _DIGEST.match(digest)):
        raise InvalidParams(f"{text[:300]!r}: the tag or digest is not one; an image is named {_FORM}")
    if repository_only and (tag or digest):
        raise InvalidParams(f"{text[:300]!r} names an image; the repository alone is wanted: {registry}/{repository}")
    if not repository_only and not (tag or digest):
        raise InvalidParams(f"{text[:300]!r} has no tag; an image is named {_FORM}")
    return Reference(registry, repository, tag, digest)


def is_tag(text: str) -> bool:
    """True for what can be the tag of an image."""
    return bool(_TAG.match(text))


def is_insecure(registry: str, settings: Settings) -> bool:
    """True when `registry` is reached over plain HTTP: on loopback, or when the settings say so."""
    if registry in settings.insecure_registries:
        return True
    name = re.sub(r":[0-9]+\Z", "", registry).strip("[]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def api_host(registry: str) -> str:
    """Where the API of `registry` is: Docker Hub has another name for it."""
    return "registry-1.docker.io" if registry in DOCKER_HUB else registry
