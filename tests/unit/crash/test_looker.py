"""Looks in a process of its own: the same answers as here, whatever becomes of the process, and nothing is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import psutil
import pytest

from mothball.crash.looker import Looker
from mothball.errors import Corrupt


def places(start: int, count: int) -> list[tuple[int, int]]:
    return [(start + n, start + 2 * n) for n in range(count)]


def whom(_: int) -> int:
    return os.getpid()


def damaged(_: int) -> None:
    raise Corrupt(what="a frame", reason="it is damaged")


def slow(number: int) -> int:
    time.sleep(0.05)
    return number


_MEETING = threading.Barrier(2, timeout=20)


def meet(_: int) -> bool:
    return _MEETING.wait() in (0, 1)


LOOKS = (places, whom, damaged, lambda data: [data.decode(), len(data)])


def test_a_process_answers_as_a_look_here_does() -> None:
    with Looker(LOOKS, (), threads=2) as looker:
        assert [tuple(each) for each in looker.ask(0, 7, 3000)] == places(7, 3000)
        assert looker.ask(0, 1, 0) == []
        assert looker.ask(3, b"x" * 3_000_000) == ["x" * 3_000_000, 3_000_000]
        assert {looker.ask(1, 0) for _ in range(4)} == {looker.pid}
        assert looker.pid not in (None, os.getpid())


def test_an_error_of_a_look_is_met_here() -> None:
    with Looker(LOOKS, (), threads=1) as looker:
        with pytest.raises(Corrupt, match="it is damaged"):
            looker.ask(2, 0)
        assert looker.ask(1, 0) == looker.pid


def test_without_a_process_the_work_is_done_here() -> None:
    with Looker(LOOKS, (), threads=0) as looker:
        assert looker.ask(1, 0) == os.getpid()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_process_that_is_killed_is_replaced_by_work_done_here(threads: int) -> None:
    with Looker(LOOKS, (), threads) as looker:
        assert looker.pid is not None
        os.kill(looker.pid, signal.SIGKILL)
        assert [tuple(each) for each in looker.ask(0, 7, 3)] == places(7, 3)
        assert looker.ask(1, 0) == os.getpid()


def test_a_process_that_is_killed_while_many_wait_for_it_answers_nobody_and_everybody_is_answered() -> None:
    with Looker((slow, whom), (), threads=2) as looker, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(looker.ask, 0, number) for number in range(16)]
        assert looker.pid is not None
        os.kill(looker.pid, signal.SIGKILL)
        assert [each.result() for each in asked] == list(range(16))
        assert looker.ask(1, 0) == os.getpid()


def test_the_threads_of_the_process_answer_side_by_side() -> None:
    with Looker((meet,), (), threads=2) as looker, ThreadPoolExecutor(2) as pool:
        # Each waits for the other: one after the other they would never meet.
        assert [each.result() for each in [pool.submit(looker.ask, 0, 0) for _ in range(2)]] == [True, True]


def test_no_process_is_left_behind() -> None:
    with Looker(LOOKS, (), threads=2) as looker:
        pid = looker.pid
        assert pid is not None
        assert psutil.pid_exists(pid)
    assert not psutil.pid_exists(pid)


def test_threads_that_ask_at_once_get_each_its_own_answer() -> None:
    with Looker(LOOKS, (), threads=2) as looker, ThreadPoolExecutor(8) as pool:
        asked = [(number, pool.submit(looker.ask, 0, number, 50)) for number in range(200)]
        for number, answer in asked:
            assert [tuple(each) for each in answer.result()] == places(number, 50)


def test_what_has_a_lower_number_is_answered_first() -> None:
    order: list[int] = []

    with Looker((slow, slow), (), threads=1) as looker, ThreadPoolExecutor(12) as pool:

        def ask(look: int) -> None:
            looker.ask(look, 0)
            order.append(look)

        first = pool.submit(ask, 1)
        time.sleep(0.01)
        for part in [first, *(pool.submit(ask, 1) for _ in range(4)), *(pool.submit(ask, 0) for _ in range(4))]:
            part.result()
    assert order.index(0) <= 2
    assert order[-2:] == [1, 1]


def test_the_process_holds_no_other_files_open(tmp_path: Path) -> None:
    with tempfile.TemporaryFile(dir=tmp_path) as wanted, (tmp_path / "other").open("wb") as other:
        files: list[BinaryIO] = [wanted]  # type: ignore[list-item]  # what tempfile gives is one by its methods
        with Looker((lambda: os.fstat(wanted.fileno()).st_size,), [each.fileno() for each in files], threads=1) as looker:
            wanted.write(b"x" * 10)
            wanted.flush()
            assert looker.ask(0) == 10
            held = {os.path.realpath(f"/proc/{looker.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{looker.pid}/fd")}
        assert str(tmp_path / "other") not in held
        assert len(held) == 2, (held, other.name)


def test_the_process_goes_when_the_one_it_works_for_is_killed() -> None:
    program = (
        "import time; from mothball.crash.looker import Looker\n"
        "looker = Looker((abs,), (), threads=2); looker.ask(0, 1)\n"
        "print(looker.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        pid = int(worker.stdout.readline())
        worker.kill()
        worker.wait()
        until = time.monotonic() + 10
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until
            time.sleep(0.02)
