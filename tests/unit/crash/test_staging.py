"""Members on their way into a package: looked at together, written in order, redacted where a look touched them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from mothball.crash import staging
from mothball.crash.looker import Looker
from mothball.crash.members import Member
from mothball.crash.outfile import OutFile
from mothball.crash.staging import Desk, Looked, Looks, Stage, Touched, look_at_members, redact_members
from mothball.errors import Corrupt
from mothball.redact.engine import Redactor
from mothball.redact.rules import Rules
from tests.unit.crash.packing import TOKEN


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "SEGMENT", 8 * 1024)
    monkeypatch.setattr(staging, "_RING", 64 * 1024)


def text(name: bytes, data: bytes, *, apart: bool = False, binary: bool = False) -> Member:
    return Member(b"H" * 512, name, data, (True, name), name, lambda size: b"%d" % size, binary, apart)


class Written:
    """What a stage gave to be written, and the file that it went to."""

    def __init__(self, out: OutFile) -> None:
        self._out = out
        self.members: list[Member] = []
        self.touched: dict[bytes, Any] = {}

    def settle(self, members: list[Member], touched: Touched) -> None:
        for number, member in enumerate(members):
            self._out.write(member.header, member.data)
            self.members.append(member)
            if number in touched:
                self.touched[member.names] = touched[number]


@contextmanager
def stage(look: Callable[..., Any] | None = None, threads: int = 2) -> Iterator[tuple[Stage, Written, Looked]]:
    redactor = Redactor(b"k" * 32, Rules.default())
    looked = Looked(redactor.known_values())
    with ExitStack() as stack:
        desk = stack.enter_context(Desk())
        file = cast("BinaryIO", stack.enter_context(tempfile.TemporaryFile()))
        seen = look or partial(look_at_members, desk, redactor, looked.known)
        looker = stack.enter_context(Looker((partial(redact_members, desk, redactor), seen), (), threads))
        out = stack.enter_context(OutFile(file, 0, sync=False))
        written = Written(out)
        looks = Looks(desk, lambda *_: False, partial(looker.ask, 0), lambda *_: [], partial(looker.ask, 1), looked)
        yield stack.enter_context(Stage(out, redactor, written.settle, looks)), written, looked


def test_members_are_written_in_order_however_many_and_large_they_are() -> None:
    sizes = [n * 37 % 5000 for n in range(120)] + [20_000, 9000, 30_000, 0, 1]
    with stage() as (at, written, looked):
        for number, size in enumerate(sizes):
            at.put(text(b"%d" % number, b"x" * size))
        at.flush()
    assert [int(member.names) for member in written.members] == list(range(len(sizes)))
    assert (written.touched, looked.touched) == ({}, [])
    assert looked.stretches == [(0, sum(512 + size for size in sizes))]


def test_a_text_with_a_secret_comes_back_redacted_with_what_was_found_and_its_neighbours_are_not_touched() -> None:
    with stage() as (at, written, _):
        for number in range(50):
            at.put(text(b"%d" % number, b"token = '" + TOKEN + b"'" if number in (3, 17, 49) else b"plain " * 100))
        at.flush()
    assert sorted(written.touched, key=int) == [b"3", b"17", b"49"]
    for redacted in written.touched.values():
        assert TOKEN not in redacted.data
        assert b"[redacted:github" in redacted.data
        assert (redacted.counts, redacted.values) == ({"github": 1}, [TOKEN])


def test_what_is_judged_by_itself_is_redacted_whatever_a_look_says_and_a_binary_never_is() -> None:
    with stage() as (at, written, _):
        at.put(text(b".env", b"PORT=1\nPASSWORD=hunter2x\n", apart=True))
        at.put(text(b"clean.json", b"{}", apart=True))
        at.put(text(b"program", b"\0" + TOKEN, apart=True, binary=True))
        at.put(text(b"other", b"\0\1\2", apart=True, binary=True))
        at.put(text(b"again.env", b'SECRET=hunter2x\nKEY=""\n', apart=True))
        at.flush()
    assert b"hunter2x" not in written.touched[b".env"].data
    assert b"hunter2x" not in written.touched[b"again.env"].data
    assert written.touched[b"clean.json"] == (None, {}, [])
    assert written.touched[b"program"] is None
    assert b"other" not in written.touched


def test_a_name_that_looks_like_a_secret_is_touched() -> None:
    with stage() as (at, written, _):
        at.put(Member(b"H" * 512, TOKEN + b"\0", b"", None, b"", lambda _: b"", binary=False, apart=False))
        at.put(text(b"plain", b"plain"))
        at.flush()
    assert written.touched == {TOKEN + b"\0": None}


def test_a_secret_over_two_members_is_none() -> None:
    with stage() as (at, written, _):
        at.put(text(b"one", b"say " + TOKEN[:20]))
        at.put(text(TOKEN[20:], b"rest"))
        at.flush()
    assert written.touched == {}


@pytest.mark.parametrize("threads", [0, 1])
def test_a_look_that_fails_ends_the_work(threads: int) -> None:
    def broken(*_: int) -> None:
        raise Corrupt(what="a look", reason="it is broken")

    with stage(broken, threads) as (at, written, _):
        at.put(text(b"a", b"x"))
        with pytest.raises(Corrupt, match="it is broken"):
            at.flush()
    assert written.members == []


def test_without_looks_every_text_is_redacted_at_once(tmp_path: Path) -> None:
    redactor = Redactor(b"k" * 32, Rules.default())
    with (tmp_path / "out").open("w+b") as file, OutFile(file, 0, sync=False) as out:
        written = Written(out)
        with Stage(out, redactor, written.settle, None) as at:
            at.put(text(b"a", TOKEN))
            at.put(text(b"b", b"plain"))
            at.put(text(b"c", b"\0" + TOKEN, binary=True, apart=True))
            assert [member.names for member in written.members] == [b"a", b"b", b"c"]
        assert TOKEN not in written.touched[b"a"].data
        assert written.touched[b"b"].data is None
        assert written.touched[b"c"] is None
        assert redactor.counts == {}


def test_what_lies_on_the_desk_is_what_a_fork_reads_there() -> None:
    with Desk() as desk, Looker((desk.get,), (), 1) as looker:
        desk.put(1000, b"from here")
        assert looker.ask(0, 1000, 9) == b"from here"
        with pytest.raises((ValueError, IndexError)):
            desk.put(staging._RING - 2, b"too long")
