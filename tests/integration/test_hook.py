"""The operator's hook: a real program or a real HTTP server, and every way in which it may be wrong."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from mothball.hook import HookFailed, ask

HOUR = 3_600_000
QUESTION = {"workspace": "o/r#1", "action": "stop", "due": 5}


def program(folder: Path, text: str) -> str:
    """A hook of our own; it lies in a folder with a space, which a command line must be able to say."""
    place = folder / "my hooks"
    place.mkdir(exist_ok=True)
    file = place / "hook.py"
    file.write_text(text)
    return f"{sys.executable} '{file}' --for mothball"


def test_a_program_gets_the_question_and_may_put_the_action_off(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    code = f'import sys; open({str(seen)!r}, "w").write(sys.stdin.read() + sys.argv[2]); print(\'{{"extend": "2h30m"}}\')'
    hook = program(tmp_path, code)
    assert ask(hook, QUESTION) == 2 * HOUR + HOUR // 2
    assert json.loads(seen.read_text().removesuffix("mothball")) == QUESTION


@pytest.mark.parametrize("answer", ["", "  \n", "{}", '{"extend": null}'])
def test_no_answer_is_no_veto(tmp_path: Path, answer: str) -> None:
    assert ask(program(tmp_path, f"print({answer!r}, end='')"), QUESTION) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("print('yes please')", "something else"),
        ("print('[]')", "something else"),
        ("print('[' * 60000)", "something else"),
        ("import os; os.write(1, bytes([0x22, 0xff, 0x22]))", "something else"),
        ("print('{\"extend\": 7200}')", "something else"),
        ("print('{\"veto\": true}')", "something else"),
        ('print(\'{"extend": "soon"}\')', "cannot be used"),
        ('print(\'{"extend": "0s"}\')', "cannot be used"),
        ('print(\'{"extend": "never"}\')', "not never"),
        ("raise SystemExit(3)", "exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "signal 9"),
        ("while True: print('y' * 1000)", "more than 65536 bytes"),
    ],
)
def test_garbage_is_told_and_is_no_veto(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(HookFailed, match=said):
        ask(program(tmp_path, text), QUESTION)


@pytest.mark.parametrize("hook", ["/nowhere/at-all", "'unbalanced", "  "])
def test_a_program_that_cannot_be_started_is_told(hook: str) -> None:
    with pytest.raises(HookFailed, match="cannot be started"):
        ask(hook, QUESTION)


def test_a_program_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = "import subprocess, time; p = subprocess.Popen(['sleep', '60'])"
    hook = program(tmp_path, f"{code}; open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(60)")
    started = time.monotonic()
    with pytest.raises(HookFailed, match="within 1 s"):
        ask(hook, QUESTION, seconds=1.0)
    assert time.monotonic() - started < 4
    pid = int(child.read_text())
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "what the hook started still runs"
        time.sleep(0.02)


def test_a_program_does_not_get_the_fleets_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTHBALL_REDIS_URL", "redis://:secret@127.0.0.1:1")
    seen = tmp_path / "environment"
    ask(program(tmp_path, f"import os; open({str(seen)!r}, 'w').write(repr(dict(os.environ)))"), QUESTION)
    assert "PATH" in seen.read_text()
    assert "secret" not in seen.read_text()


class Server(BaseHTTPRequestHandler):
    """Answers by path."""

    asked: ClassVar[list[tuple[str, bytes]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.path, body))
        if self.path == "/moved":
            self.send_response(307)
            self.send_header("Location", "/extend")
            self.end_headers()
        elif self.path == "/slow":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            for _ in range(60):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
        elif self.path == "/broken":
            self.send_response(500)
            self.end_headers()
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"extend": "1h"}' if self.path == "/extend" else b"x" * 100_000)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Server) as httpd:
        Server.asked = []
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://user:pa55@127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_a_url_is_asked_by_post(server: str) -> None:
    assert ask(f"{server}/extend", QUESTION) == HOUR
    assert [(path, json.loads(body)) for path, body in Server.asked] == [("/extend", QUESTION)]


@pytest.mark.parametrize(("path", "said"), [("/moved", "HTTP 307"), ("/broken", "HTTP 500"), ("/large", "more than 65536 bytes")])
def test_a_url_is_not_followed_and_its_garbage_is_told(server: str, path: str, said: str) -> None:
    with pytest.raises(HookFailed, match=said) as caught:
        ask(server + path, QUESTION)
    assert [each for each, _ in Server.asked] == [path], "a redirect was followed"
    assert "pa55" not in str(caught.value)


def test_a_url_that_drips_or_is_not_there_is_told_in_time(server: str) -> None:
    started = time.monotonic()
    with pytest.raises(HookFailed, match=r"within 0\.5 s"):
        ask(f"{server}/slow", QUESTION, seconds=0.5)
    assert time.monotonic() - started < 3
    with pytest.raises(HookFailed, match="cannot be reached") as caught:
        ask("http://user:pa55@127.0.0.1:1/x", QUESTION)
    assert "pa55" not in str(caught.value)
