"""What the image's config says of a capture beside its layers: what was left out, by which rules, and the state of git."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mothball.capture.listing import LABEL_BYTES, fitting, omission_label
from mothball.capture.types import CaptureOptions, Omission
from mothball.errors import Corrupt
from mothball.store.foreign import read_json
from mothball.store.left_out import OMISSIONS, RULES
from mothball.store.manifest import PREFIX

_PASSING = "vanished"
"""The reason of what was left out because it went away meanwhile: no two captures agree on it."""


def image_labels(git: list[dict[str, Any]], omissions: list[Omission], options: CaptureOptions) -> dict[str, str]:
    """The labels, bounded as `listing` says."""
    return {
        OMISSIONS: omission_label(omissions),
        RULES: json.dumps(
            {
                "ignore": [pattern for given in options.ignore if (pattern := _writable(given))],
                "gitignore": options.use_gitignore,
                "caches": options.exclude_caches,
                "max_file_bytes": options.file_cap,
            },
            sort_keys=True,
        ),
        PREFIX + "git": json.dumps(fitting(git, LABEL_BYTES), sort_keys=True),
    }


def same_labels(config: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """True when `config` says of what is left out what `labels` say, but for sizes and what went away meanwhile."""
    inner = config.get("config")
    known = inner.get("Labels") if isinstance(inner, Mapping) else None
    if not isinstance(known, Mapping) or known.get(RULES) != labels[RULES]:
        return False
    return known.get(OMISSIONS) == labels[OMISSIONS] or _left_out(known.get(OMISSIONS)) == _left_out(labels[OMISSIONS])


def _left_out(label: Any) -> tuple[bool, set[tuple[str, str]]] | None:
    try:
        found = read_json(label, dict[str, Any], "the list of what was left out")
        pairs = {(item["path"], item["reason"]) for item in found["listed"] if item["reason"] != _PASSING}
        return bool(found["further"]), pairs
    except (Corrupt, TypeError, KeyError):
        return None


def _writable(pattern: str) -> str:
    """`pattern` as JSON can hold it: a byte that is no UTF-8 becomes ``?``, which matches it and others.

    The record serves to leave alone what was left out, so it may match too much and never too little: a pattern that takes
    back what another one ignores is dropped rather than widened.
    """
    plain = pattern.encode("utf-8", "surrogateescape").decode("utf-8", "replace").replace("\ufffd", "?")
    return "" if plain != pattern and pattern.startswith("!") else plain
