"""Before it writes a capture says how much it may store, and before it publishes how much it did (Q-11, Q-15)."""

from __future__ import annotations

import os
from typing import Any

import pytest

from mothball.capture.need import OVERHEAD
from mothball.errors import OverBudget
from tests.unit.capture.harness import Yard, settle

MIB = 1024**2


class Steps:
    """The checkpoints of a capture, in their order."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, name: str, progress: dict[str, Any]) -> None:
        self.seen.append((name, progress))

    def need(self) -> int:
        (found,) = [progress["need_bytes"] for name, progress in self.seen if name == "plan"]
        return int(found)


def test_q11_the_need_is_known_before_a_byte_is_written_and_is_an_upper_bound(yard: Yard) -> None:
    root = yard.folder()
    for n in range(20):
        (root / f"noise{n}").write_bytes(os.urandom(100_000))
    os.link(root / "noise0", root / "again")
    steps = Steps()
    result = yard.capture(checkpoint=steps)
    names = [name for name, _ in steps.seen]
    assert names.index("plan") < names.index("write")
    assert result.stored_bytes <= steps.need() <= 20 * 100_000 + 23 * OVERHEAD, "hard links count once"
    assert steps.seen[-1] == ("publish", {"files": 21, "bytes": 2_000_000, "stored_bytes": result.stored_bytes})


def test_q11_a_later_capture_needs_what_changed_and_an_unchanged_one_asks_for_nothing(yard: Yard) -> None:
    root = yard.folder()
    (root / "large").write_bytes(os.urandom(MIB))
    (root / "small").write_bytes(b"x")
    settle(root)
    yard.capture()
    unchanged = Steps()
    yard.capture(checkpoint=unchanged)
    assert [name for name, _ in unchanged.seen if name in {"plan", "write", "publish"}] == []
    (root / "small").write_bytes(os.urandom(5000))
    steps = Steps()
    result = yard.capture(checkpoint=steps)
    assert result.stored_bytes <= steps.need() < 10_000


def test_q11_holes_need_nothing(yard: Yard) -> None:
    root = yard.folder()
    with (root / "disk.img").open("wb") as file:
        file.write(b"begin")
        file.truncate(1024**3)
    steps = Steps()
    yard.capture(checkpoint=steps)
    assert steps.need() < MIB


@pytest.mark.parametrize("step", ["plan", "write", "publish"])
def test_q15_refused_at_any_step_the_last_good_capture_stays(yard: Yard, step: str) -> None:
    root = yard.folder()
    (root / "a").write_bytes(b"good")
    settle(root)
    good = yard.capture()
    (root / "a").write_bytes(os.urandom(50_000))

    def refuse(name: str, _: dict[str, Any]) -> None:
        if name == step:
            raise OverBudget(what="the fleet", reason="no room")

    with pytest.raises(OverBudget):
        yard.capture(checkpoint=refuse)
    assert yard.store.refs("ws").get().digest == good.digest
    assert list(yard.store.blobs.temp.iterdir()) == []
    assert yard.capture().generation == good.generation + 1
