"""The last look at a package: what was looked at while it was written, and what has to be looked at again."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from functools import partial
from typing import BinaryIO, cast

import pytest

from mothball.crash import scanning
from mothball.crash.scanning import Ahead, look_at_window, scan_package
from mothball.redact.engine import Redactor
from mothball.redact.rules import Rules
from tests.unit.crash.packing import TOKEN

WINDOW, OVERLAP = 64 * 1024, 16 * 1024
LATE = b"Zx81-qwVerty-77ab-Lm0p"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "_WINDOW", WINDOW)
    monkeypatch.setattr(scanning, "_OVERLAP", OVERLAP)


def package(size: int, *secrets: tuple[int, bytes]) -> bytearray:
    source = random.Random(size)
    data = bytearray(b" ".join(b"%08d" % source.randrange(10**8) for _ in range(size // 9)).ljust(size))
    for place, secret in secrets:
        data[place : place + len(secret)] = secret
    return data


def redactor() -> Redactor:
    return Redactor(b"k" * 32, Rules.default())


def test_what_was_looked_at_while_it_was_written_is_not_looked_at_again_and_nothing_is_missed() -> None:
    places = [10, WINDOW - 8, WINDOW + 100, 3 * WINDOW - len(TOKEN) + 1, 5 * WINDOW, 10 * WINDOW - 50]
    data = package(10 * WINDOW, *((place, TOKEN) for place in places))
    with tempfile.TemporaryFile() as file:
        found = redactor()
        looked: list[int] = []

        def look(start: int) -> list[tuple[int, int]]:
            looked.append(start)
            return look_at_window(file.fileno(), start, found, known)

        known = found.known_values()
        ahead = Ahead(known, look)
        for at in range(0, len(data), 10_000):
            file.write(data[at : at + 10_000])
            file.flush()
            ahead.written(at + len(data[at : at + 10_000]))
        finish(ahead)
        assert looked == [number * WINDOW for number in range(1, 9)]
        with_it = scan_package(file.fileno(), (), 0, found, lambda **_: None, ahead)
        without = scan_package(file.fileno(), (), 0, redactor(), lambda **_: None)
    assert [finding.offset for finding in with_it] == places
    assert with_it == without


def test_a_value_that_became_known_later_is_found_in_what_was_looked_at_before() -> None:
    data = package(6 * WINDOW, (3 * WINDOW - 5, LATE))
    with written(data) as file:
        found, ahead = followed(file, len(data))
        finish(ahead)
        assert scan_package(file.fileno(), (), 0, found, lambda **_: None, ahead) == []
        found.learn(b".env", b"DB_PASSWORD=" + LATE + b"\n")
        found.known_values()
        assert [each.offset for each in scan_package(file.fileno(), (), 0, found, lambda **_: None, ahead)] == [3 * WINDOW - 5]


@pytest.mark.parametrize(
    "where", [lambda start: start, lambda start: start + WINDOW // 2, lambda start: start + WINDOW + OVERLAP - 60]
)
def test_what_was_written_anew_is_looked_at_again(where: Callable[[int], int]) -> None:
    data, place = package(8 * WINDOW), where(4 * WINDOW)
    with written(data) as file:
        found, ahead = followed(file, len(data))
        wait(ahead._parts.values())
        os.pwrite(file.fileno(), TOKEN, place)
        ahead.changed(place)
        ahead.close()
        assert 4 * WINDOW not in ahead.seen()
        assert [each.offset for each in scan_package(file.fileno(), (), 0, found, lambda **_: None, ahead)] == [place]


def test_a_look_that_failed_is_done_again() -> None:
    def broken(_: int) -> list[tuple[int, int]]:
        raise OSError

    with tempfile.TemporaryFile() as file:
        file.write(package(6 * WINDOW, (3 * WINDOW, TOKEN)))
        file.flush()
        found = redactor()
        ahead = Ahead(found.known_values(), broken)
        ahead.written(6 * WINDOW)
        ahead.close()
        assert ahead.seen() == {}
        assert [each.offset for each in scan_package(file.fileno(), (), 0, found, lambda **_: None, ahead)] == [3 * WINDOW]


@contextmanager
def written(data: bytes) -> Iterator[BinaryIO]:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        yield cast("BinaryIO", file)


def followed(file: BinaryIO, size: int) -> tuple[Redactor, Ahead]:
    """Somebody who knows nothing yet, and what looks for him at a file that is written to its end."""
    found = redactor()
    ahead = Ahead(found.known_values(), partial(_look, file.fileno(), found))
    ahead.written(size)
    return found, ahead


def finish(ahead: Ahead) -> None:
    wait(ahead._parts.values())
    ahead.close()


def _look(fd: int, found: Redactor, start: int) -> list[tuple[int, int]]:
    return look_at_window(fd, start, found, found.known_values())
