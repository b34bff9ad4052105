"""Which remotes of a repository hold what its remote-tracking refs name, once the workspace is gone.

A remote that lies in the workspace goes with it: two clones in one workspace that have fetched from each other both say that the
other one has their commits. One that lay on this host and is not there any more holds nothing; neither do refs without a remote.
"""

from __future__ import annotations

import os
import re
from typing import Final
from urllib.parse import unquote_to_bytes

_SECTION: Final = re.compile(rb'\[\s*([A-Za-z0-9.-]+)\s*(?:"((?:[^"\\]|\\.)*)")?\s*\]')
_VALUE: Final = re.compile(rb"(url|pushurl|fetch)\s*=\s*(.*)\Z", re.IGNORECASE)
_TRACKED: Final = b"refs/remotes/"


def held_prefixes(config: bytes, root: bytes, work: bytes) -> list[bytes]:
    """Where the refs stand (``refs/remotes/origin/``) of those remotes in a git `config` that stay when `root` is deleted.

    `root` is the workspace's real path, `work` the folder from which relative paths lead. What a config includes is not read.
    """
    urls: dict[bytes, list[bytes]] = {}
    fetched: dict[bytes, list[bytes]] = {}
    name: bytes | None = None
    for line in config.splitlines():
        rest = line.strip()
        if (section := _SECTION.match(rest)) is not None:
            name = section[2] if section[1].lower() == b"remote" else None
            rest = rest[section.end() :].strip()
        found = _VALUE.match(rest)
        if name is None or found is None:
            continue
        value = found[2].strip().strip(b'"')
        (fetched if found[1].lower() == b"fetch" else urls).setdefault(name, []).append(value)
    prefixes = []
    for remote, places in urls.items():
        if all(_stays(place, root, work) for place in places):
            into = [spec.partition(b":")[2].partition(b"*")[0] for spec in fetched.get(remote, [])]
            prefixes += [each for each in into if each.startswith(_TRACKED) and each != _TRACKED]
    return prefixes


def _stays(url: bytes, root: bytes, work: bytes) -> bool:
    """True for a URL of another host, and for a path outside of `root` at which something is."""
    scheme, separator, rest = url.partition(b"://")
    if separator:
        if scheme.lower() != b"file":
            return True
        url = unquote_to_bytes(b"/" + rest.partition(b"/")[2])
    elif b":" in url.partition(b"/")[0]:
        return True  # host:path, as ssh has it
    if not url or b"\0" in url:
        return False
    for suffix in (b"", b".git"):  # git tries both
        place = os.path.realpath(os.path.join(work, url.rstrip(b"/") + suffix))  # noqa: PTH118 -- bytes
        if os.path.exists(place):  # noqa: PTH110 -- bytes
            real = os.path.realpath(root)
            return place != real and not place.startswith(real.rstrip(b"/") + b"/")
    return False
