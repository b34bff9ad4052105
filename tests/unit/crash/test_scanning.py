"""The last look at a package: what was looked at while it was packed, and what has to be looked at again."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

import pytest

from mothball.crash import scanning
from mothball.crash.members import Packed
from mothball.crash.scanning import scan_package
from mothball.crash.staging import Looked
from mothball.redact.engine import Redactor
from mothball.redact.known import Known
from mothball.redact.rules import Rules
from mothball.store.tarhead import header
from tests.unit.crash.packing import TOKEN

WINDOW, OVERLAP = 64 * 1024, 16 * 1024
LATE = b"Zx81-qwVerty-77ab-Lm0p"
SIZE = 32 * 1024
FILES = 10


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "_WINDOW", WINDOW)
    monkeypatch.setattr(scanning, "_OVERLAP", OVERLAP)


@contextmanager
def package(*secrets: tuple[int, int, bytes], binary: bool = False) -> Iterator[tuple[BinaryIO, list[Packed]]]:
    """A package of ten files of 32 KiB and what is said of them; (number of the file, place in it, what stands there)."""
    source, packed, place = random.Random(1), [], 0
    with tempfile.TemporaryFile() as file:
        for number in range(FILES):
            data = bytearray(b" ".join(b"%08d" % source.randrange(10**8) for _ in range(SIZE // 9)).ljust(SIZE - 100))
            if binary:
                data[0] = 0
            for of, at, secret in secrets:
                if of == number:
                    data[at : at + len(secret)] = secret
            head = header(b"rootfs/workspace/file-%d" % number, b"0", 0o644, 0, 0, len(data), 0)
            file.write(head + data.ljust(SIZE, b"\0"))
            packed.append(Packed(place, place + len(head), len(data), binary, binary, None))
            place += len(head) + SIZE
        file.flush()
        yield cast("BinaryIO", file), packed


def redactor() -> Redactor:
    return Redactor(b"k" * 32, Rules.default())


def found(file: BinaryIO, packed: list[Packed], who: Redactor, looked: Looked | None) -> list[int]:
    """The numbers of the files in which something is found; what does not lie in the content of one is -1."""
    return [
        next((number for number, each in enumerate(packed) if each.content <= finding.offset < each.content + each.size), -1)
        for finding in scan_package(file.fileno(), packed, 0, who, lambda **_: None, looked)
    ]


def looked_at(packed: list[Packed], *numbers: int, who: Redactor | None = None) -> Looked:
    """Somebody looked at these files, headers and all, and found nothing."""
    looked = Looked(Known(()) if who is None else who.known_values())
    for number in numbers:
        looked.add(packed[number].start, packed[number].content + SIZE)
    return looked


def test_all_is_looked_at_when_nobody_did() -> None:
    with package((0, 5, TOKEN), (3, SIZE - 200, TOKEN), (9, 100, TOKEN)) as (file, packed):
        assert found(file, packed, redactor(), None) == [0, 3, 9]


def test_what_was_looked_at_is_not_looked_at_again_and_all_the_rest_is() -> None:
    # The secrets in what was looked at show that nobody looks there again; a packer would have said that they stand there.
    with package(*((number, 100, TOKEN) for number in range(FILES))) as (file, packed):
        assert found(file, packed, redactor(), looked_at(packed, 1, 2, 3, 6, 8)) == [0, 4, 5, 7, 9]
        assert found(file, packed, redactor(), looked_at(packed)) == list(range(FILES))


def test_what_a_look_touched_is_read_by_itself() -> None:
    with package((4, 100, TOKEN), (7, 100, TOKEN)) as (file, packed):
        looked = looked_at(packed, *range(FILES))
        looked.touched += [packed[4].start, packed[5].start]
        assert found(file, packed, redactor(), looked) == [4]


def test_a_value_that_became_known_later_is_found_in_what_was_looked_at_before() -> None:
    for at in (0, 100, SIZE - 100 - len(LATE)):
        with package((2, at, LATE), (8, at, LATE)) as (file, packed):
            who = redactor()
            looked = looked_at(packed, *range(FILES), who=who)
            assert found(file, packed, who, looked) == []
            who.learn(b".env", b"DB_PASSWORD=" + LATE + b"\n")
            who.known_values()
            assert found(file, packed, who, looked) == [2, 8]


def test_a_binary_file_that_was_looked_into_by_itself_is_not_read_again_and_another_one_is() -> None:
    with package((3, 100, TOKEN), (4, 100, TOKEN), binary=True) as (file, packed):
        looked = looked_at(packed, *range(FILES))
        assert found(file, packed, redactor(), looked) == [3, 4]
        looked.inside.add(packed[3].content)
        assert found(file, packed, redactor(), looked) == [4]


@pytest.mark.parametrize(
    ("stretches", "gaps"),
    [
        ([], [(0, 100)]),
        ([(0, 100)], []),
        ([(0, 40), (40, 100)], []),
        ([(10, 40), (60, 90)], [(0, 10), (40, 60), (90, 100)]),
        ([(10, 10), (10, 20), (20, 20)], [(0, 10), (20, 100)]),
    ],
)
def test_what_nobody_looked_at_is_what_lies_between(stretches: list[tuple[int, int]], gaps: list[tuple[int, int]]) -> None:
    looked = Looked(Known(()))
    for stretch in stretches:
        looked.add(*stretch)
    assert looked.gaps(100) == gaps
