"""Long input: however it is cut, same result, and no secret gets through between two pieces."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mothball.redact import Redactor, Rules, engine, is_text, windows
from tests.unit.redact.canaries import PASSWORD, SHAPED, TOKENS, body, private_key, random_text

CANARIES = [token for tokens in TOKENS.values() for token in tokens]
FILLER = [
    "",
    "\n",
    " ",
    "x = 1\n",
    "token = ",
    'password: "',
    '"',
    "'",
    "://",
    "@",
    "-----BEGIN ",
    "=",
    "[redacted:",
    "]",
    "\\n",
    "é",
    "\0",
]


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 4 KiB, so that a short text has many borders."""
    for module in (engine, windows):
        monkeypatch.setattr(module, "BLOCK", 4096)
        monkeypatch.setattr(module, "OVERLAP", 40 * 1024)


def redactor() -> Redactor:
    return Redactor(b"k" * 32, Rules.default())


def cut(data: bytes, places: list[int]) -> list[bytes]:
    marks = sorted({place % (len(data) + 1) for place in places})
    return [data[a:b] for a, b in zip([0, *marks], [*marks, len(data)], strict=True)]


pieces_of_text = st.one_of(
    st.sampled_from(CANARIES),
    st.sampled_from([row[2] for row in SHAPED]),
    st.sampled_from(FILLER),
    st.integers(1, 5000).map(lambda lines: "ab c\n" * lines),
    st.text(max_size=30),
)
texts = st.lists(pieces_of_text, max_size=12).map("".join)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(texts, st.lists(st.integers(0, 10**6), max_size=6), st.sampled_from([b"", b".env", b"x.yml", b".netrc"]))
def test_a_stream_is_the_same_however_it_is_cut(text: str, places: list[int], name: bytes) -> None:
    data = text.encode("utf-8", "surrogatepass")
    assert b"".join(redactor().stream(cut(data, places), name)) == b"".join(redactor().stream([data], name))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(texts, st.sampled_from(CANARIES), st.sampled_from([b"", b".env", b"x.yml"]))
def test_no_canary_survives_and_redacting_again_changes_nothing(text: str, canary: str, name: bytes) -> None:
    found = redactor()
    out = found._whole(f"{text}\n{canary}\n".encode("utf-8", "surrogatepass"), 0)
    assert canary.encode() not in out
    assert redactor()._whole(out, 0) == out


@pytest.mark.parametrize("canary", [*CANARIES, private_key(), f'password = "{PASSWORD}"'], ids=lambda text: text[:9])
def test_a_secret_across_a_border_of_windows_is_found(canary: str) -> None:
    """At every distance from the border, with and without lines to cut at."""
    secret = canary.encode()
    parts = [line.encode() for line in body(canary)] if "BEGIN" in canary else [secret]
    source = random.Random(canary)
    for line in (b"\n", b" "):
        for at in {4096, *(4096 - source.randrange(len(secret) + 8) for _ in range(6))}:
            data = (b"a" * 15 + line) * 256 + b"b" * 4096
            data = data[: at - 1] + b" " + secret + b" " + data[at:]
            out = b"".join(redactor().stream([data]))
            assert [part for part in parts if part in out] == []


def test_memory_stays_small_while_a_long_stream_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB in pieces of 64 KiB: no more than a few windows are ever held."""
    import tracemalloc

    def pieces() -> Iterator[bytes]:
        for _ in range(256):
            yield b"some line of a long log file, nothing in it\n" * 1489

    tracemalloc.start()
    try:
        size = sum(len(piece) for piece in redactor().stream(pieces()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == 256 * 1489 * 44
    assert peak < 4 * 1024**2


def test_a_key_of_16_kib_is_found_as_a_whole() -> None:
    key = private_key(lines=260)
    assert len(key) > 16 * 1024
    out = b"".join(redactor().stream([b"x\n" * 1000, key.encode(), b"\ny\n" * 1000]))
    assert [line for line in body(key) if line.encode() in out] == []
    assert out.endswith(b"]" + b"\ny\n" * 1000)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("around", ["plain", "käse é \U0001f600 ", "x" * 5000 + "\n"])
def test_utf_16_with_its_mark_is_redacted_as_text(encoding: str, around: str) -> None:
    mark = "\ufeff".encode(encoding)
    token = TOKENS["github"][0]
    data = mark + f"{around}token is {token}\r\n{around}".encode(encoding)
    assert is_text(data[:100])
    out = redactor().data(data, b"x.txt")
    assert token.encode(encoding) not in out
    text = out.decode("utf-16")
    assert text.startswith(f"{around}token is [redacted:github:") and text.endswith(f"]\r\n{around}")
    assert redactor().data(out, b"x.txt") == out
    assert b"".join(redactor().stream(cut(data, list(range(0, 400, 7))))) == out


def test_bytes_that_are_no_utf_8_survive_untouched() -> None:
    data = bytes(range(1, 256)) * 3 + b"\xff\xfe\xc3"
    assert redactor().data(data) is data
    token = TOKENS["npm"][0].encode()
    out = redactor().data(data + token + data)
    assert out.startswith(data) and out.endswith(data) and token not in out


def test_hostile_text_takes_linear_time() -> None:
    """Keywords without end, each of which could begin a long match: four times as much takes four times as long."""
    import time

    patterns = (
        *(
            "password=",
            "eyJ",
            "-----BEGIN RSA PRIVATE KEY-----",
            "://a:",
            "tokentoken",
            '"secret":"',
            "login a ",
            "--token ",
            "sk-",
        ),
        *("Cookie: a=", "bearer aaaaaaaa", "[redacted:", "token: a", "-----END RSA PRIVATE KEY-----", "AKIA", "=\\", 'token=":'),
    )
    for pattern in patterns:
        took = []
        for size in (64 * 1024, 256 * 1024):
            data = (pattern.encode() * (size // len(pattern) + 1))[:size]
            started = time.process_time()
            redactor()._scanner.spans(data)
            took.append(time.process_time() - started)
        assert took[1] < 12 * took[0] + 0.2, f"{pattern!r} took {took}"
        assert took[1] < 4, f"{pattern!r} took {took}"


def test_random_text_of_a_long_line_has_no_border_trouble() -> None:
    data = random_text(60_000).encode()
    assert b"".join(redactor().stream(cut(data, [1, 4095, 4096, 4097, 50_000]))) == b"".join(redactor().stream([data]))
