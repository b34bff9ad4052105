"""Random trees with random histories: whatever way a generation comes back, it is what was on disk then."""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mothball.package.remote import pull, push
from mothball.package.tar import write_tar
from mothball.settings import Settings
from mothball.store import Store
from mothball.store.diff import diff
from mothball.store.restore import restore
from mothball.store.snapshots import add_snapshot
from mothball.store.tree import Tree
from mothball.store.verify import verify
from tests.acceptance.registry import ImageRegistry, image_registry
from tests.support import require_tool
from tests.unit.capture.harness import Facts, Yard, on_disk
from tests.unit.capture.test_histories import Gardener
from tests.unit.store.test_diff import kinds, naive

__all__ = ["image_registry"]  # a fixture

GENERATIONS = 8
EXAMPLES = int(os.environ.get("MOTHBALL_TEST_HISTORIES", "5"))


class Then(NamedTuple):
    """One generation: its snapshot, what was on disk, and which names were one file."""

    name: str
    digest: str
    facts: dict[str, Facts]
    links: set[frozenset[str]]


def linked(root: Path) -> set[frozenset[str]]:
    """The names of each file that has several."""
    groups: dict[int, set[str]] = {}
    base = os.fsencode(root)
    for folder, _, files in os.walk(base):
        for name in files:
            path = os.path.join(folder, name)
            found = os.lstat(path)
            if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
                groups.setdefault(found.st_ino, set()).add(os.fsdecode(os.path.relpath(path, base)))
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def history(yard: Yard, seed: int, edits: list[int], fresh: int, lost: bool) -> list[Then]:
    """Edit and capture, again and again; every generation becomes a snapshot. At most three layers, so that some are squashed."""
    gardener = Gardener(yard.folder(), seed)
    refs = yard.store.refs("ws")
    then = []
    squashed = 0
    for number, count in enumerate(edits):
        for _ in range(count):
            gardener.edit()
        if lost:
            shutil.rmtree(yard.store.cache / "ws", ignore_errors=True)
        result = yard.capture(full=number == fresh)
        squashed += result.squashed
        snapshot = add_snapshot(refs, fence=yard.fence, job=f"job-{yard.fence}", at_ms=1_700_000_000_000 + number)
        assert (snapshot.name, snapshot.digest) == (f"snap-{number + 1}", result.digest)
        then.append(Then(snapshot.name, result.digest, on_disk(yard.root / "ws"), linked(yard.root / "ws")))
    assert squashed
    return then


def check(root: Path, was: Then, face: str) -> None:
    """The tree at `root` is the generation, to the nanosecond and with its links."""
    assert on_disk(root) == was.facts, f"{face} of {was.name}"
    assert linked(root) == was.links, f"links of {face} of {was.name}"


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a smaller history that fails too is not worth minutes
)
@given(
    seed=st.integers(0, 2**32),
    edits=st.lists(st.integers(1, 14), min_size=GENERATIONS, max_size=GENERATIONS + 3),
    fresh=st.integers(1, GENERATIONS - 1),
    lost=st.booleans(),
)
def test_every_generation_comes_back_in_every_face_as_it_was_on_disk(
    image_registry: ImageRegistry, make_settings: Callable[..., Settings], seed: int, edits: list[int], fresh: int, lost: bool
) -> None:
    with TemporaryDirectory() as folder:
        base = Path(folder)
        roots = base / "roots"
        roots.mkdir()
        given = make_settings(
            workspace_roots=(roots,), data_dir=base / "data", frame_bytes=64 * 1024, fsync=False, max_layers=3,
            docker_config=base / "none.json",
        )  # fmt: skip
        yard = Yard(base, given)
        then = history(yard, seed, edits, fresh, lost)
        other = Store(base / "other", fsync=False)
        repository = f"{image_registry.address}/history-{seed}-{len(edits)}-{fresh}"
        for was in then:
            restored, untarred, pulled = (base / f"{face}-{was.name}" for face in ("restored", "untarred", "pulled"))
            with yard.store.tree("ws", was.name) as tree:
                restore(tree, restored)
                check(restored, was, "the restored tree")
                with (base / "out.tar").open("wb") as out:
                    own = write_tar(tree, out).sha256
            untarred.mkdir()
            subprocess.run([require_tool("tar"), "-C", str(untarred), "-xpf", str(base / "out.tar")], check=True, timeout=60)
            check(untarred, was, "the tar")
            push(yard.store, was.digest, f"{repository}:{was.name}", given)
            assert pull(other, f"{repository}:{was.name}", given).digest == was.digest
            with Tree.open(other, was.digest) as tree, (base / "out.tar").open("wb") as out:
                assert write_tar(tree, out).sha256 == own
                restore(tree, pulled)
            check(pulled, was, "what the registry gave back")
        compare_generations(yard, then, random.Random(seed))
        assert verify(yard.store, level="content").problems == []


def compare_generations(yard: Yard, then: list[Then], dice: random.Random) -> None:
    """Neighbours, and as many pairs at random, differ as two dicts of everything do, and as the disk did."""
    pairs = [(number, number + 1) for number in range(len(then) - 1)]
    pairs += [(dice.randrange(len(then)), dice.randrange(len(then))) for _ in pairs]
    for one, two in pairs:
        with yard.store.tree("ws", then[one].name) as a, yard.store.tree("ws", then[two].name) as b:
            found = kinds(diff(a, b))
            assert found == naive(a, b)
        before, after = then[one].facts, then[two].facts
        assert {path for path in {**before, **after} if before.get(path) != after.get(path)} == {*found}


def test_links_are_found_by_their_inode(tmp_path: Path) -> None:
    """The test's own eye: it must see a link that is lost."""
    (tmp_path / "a").write_text("x")
    os.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "c").write_text("x")
    assert linked(tmp_path) == {frozenset({"a", "b"})}
    shutil.copy(tmp_path / "a", tmp_path / "d")
    (tmp_path / "b").unlink()
    assert linked(tmp_path) == set()
