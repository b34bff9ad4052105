"""The process that does Mothball's work in the benchmark: ``python -m benchmarks.child ACTION JSON``; answers with JSON.

Only what a worker's pool process would do: settings, `capture_workspace`, reading from the store.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from mothball.capture import CaptureRequest, capture_workspace
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.diff import diff
from mothball.store.restore import restore
from mothball.store.tree import Tree
from mothball.store.verify import verify


def settings_of(given: dict[str, Any]) -> Settings:
    """Defaults, but for the places."""
    return Settings.load(
        data_dir=Path(given["data_dir"]),
        workspace_roots=(Path(given["root"]),),
        host="bench",
        redis_url=given.get("redis_url", "redis://127.0.0.1:1"),
    )


def capture(given: dict[str, Any]) -> dict[str, Any]:
    """One capture; ``seconds`` is the wall time of the call, without the start of Python."""
    settings = settings_of(given)
    request = CaptureRequest(
        workspace=given["workspace"], path=given["path"], host="bench", job=f"job-{given['fence']}", fence=given["fence"],
        repo=given.get("repo"), parent_candidate=given.get("parent"),
    )  # fmt: skip
    begin = time.perf_counter()
    result = capture_workspace(request, settings, checkpoint=lambda _name, _data: None)
    return {"seconds": time.perf_counter() - begin, "result": result.to_dict()}


def read(given: dict[str, Any]) -> dict[str, Any]:
    """Read `count` files one by one, each from a capture opened anew; milliseconds each."""
    store = Store(settings_of(given).store_dir)
    digest = store.refs(given["workspace"]).get("latest").digest
    with Tree.open(store, digest) as tree:
        files = [entry for entry in tree.walk() if entry.type == "file" and entry.size < 1024**2]
    times = []
    for entry in random.Random(given["seed"]).sample(files, min(given["count"], len(files))):
        begin = time.perf_counter()
        with Tree.open(store, digest) as tree:
            data = tree.read(entry.path)
        times.append((time.perf_counter() - begin) * 1000)
        if len(data) != entry.size or data != (Path(given["path"]) / entry.path).read_bytes():
            raise SystemExit(f"{entry.path} reads back differently")
    return {"ms": times}


def restore_latest(given: dict[str, Any]) -> dict[str, Any]:
    """One restore of the latest capture to a new folder; ``seconds`` as in `capture`."""
    store = Store(settings_of(given).store_dir)
    begin = time.perf_counter()
    with Tree.open(store, store.refs(given["workspace"]).get("latest").digest) as tree:
        result = restore(tree, Path(given["to"]))
    return {"seconds": time.perf_counter() - begin, "files": result.files}


def diff_latest(given: dict[str, Any]) -> dict[str, Any]:
    """The latest capture compared with `before`, both opened anew; milliseconds each."""
    store = Store(settings_of(given).store_dir)
    latest = store.refs(given["workspace"]).get("latest").digest
    times, count = [], 0
    for _ in range(given["rounds"]):
        begin = time.perf_counter()
        with Tree.open(store, given["before"]) as old, Tree.open(store, latest) as new:
            count = sum(1 for _ in diff(old, new))
        times.append((time.perf_counter() - begin) * 1000)
    return {"ms": times, "changes": count}


def verify_deep(given: dict[str, Any]) -> dict[str, Any]:
    """Every blob of the store hashed again."""
    store = Store(settings_of(given).store_dir)
    begin = time.perf_counter()
    report = verify(store, level="deep")
    if report.problems:
        raise SystemExit(f"damaged: {report.problems[0].reason}")
    return {"seconds": time.perf_counter() - begin, "bytes": report.bytes}


ACTIONS = {"capture": capture, "read": read, "restore": restore_latest, "diff": diff_latest, "verify": verify_deep}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(ACTIONS[sys.argv[1]](json.loads(sys.argv[2]))))
