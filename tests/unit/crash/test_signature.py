"""Signatures: the same failure of another day, machine or run is the same, another failure is another one."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mothball.crash.frames import frames_of
from mothball.crash.signature import signature

PYTHON = """\
2026-11-21 21:45:09,123 starting job 3f2504e0-4f89-11d3-9a0c-0305e82c3301
Traceback (most recent call last):
  File "/srv/a/app/main.py", line 31, in <module>
    main()
  File "/srv/a/app/work.py", line 7, in main
    return load(path)
           ^^^^^^^^^^
  File "/usr/lib/python3.11/json/decoder.py", line 355, in raw_decode
    raise JSONDecodeError("Expecting value", s, err.value) from None
json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0) in /srv/a/app/data/config.json
"""
LATER = {
    "/srv/a": "/srv/workspaces/9",
    "2026-11-21 21:45:09,123": "2027-01-02T03:04:05Z",
    "line 7": "line 19",
    "3f2504e0": "00000000",
    "column 1 (char 0)": "column 88 (char 87)",
}
NODE = """\
/app/server.js:12
    throw new TypeError(`bad ${x}`)
    ^

TypeError: bad 17
    at handle (/app/server.js:12:11)
    at async Promise.all (index 0)
    at Server.<anonymous> (/app/node_modules/express/lib/router.js:281:22)
    at node:internal/process/task_queues:95:5
    at /app/anonymous.js:3:9

Node.js v20.1.0
"""
JAVA = """\
Exception in thread "main" java.lang.RuntimeException: failed at 0x7f21
\tat com.acme.App.run(App.java:31)
\tat com.acme.App.main(App.java:12)
Caused by: java.io.IOException: no such file
\tat com.acme.Disk.open(Disk.java:99)
\tat java.base/java.nio.Files.read(Files.java:100)
\t... 2 more
"""
GO = """\
panic: runtime error: index out of range [5] with length 3

goroutine 1 [running]:
panic({0x45a0a0?, 0xc0000140a8?})
\t/usr/local/go/src/runtime/panic.go:884 +0x213
main.pick(...)
\t/srv/a/app/main.go:8
github.com/acme/app/server.(*Handler).Serve(0xc000012345, {0x1, 0x2})
\t/srv/a/app/server/handler.go:21 +0x1d
main.main()
\t/srv/a/app/main.go:14 +0x1d

goroutine 7 [select]:
other.loop()
\t/srv/a/other.go:3 +0x1
exit status 2
"""
RUST = """\
thread 'main' panicked at src/main.rs:4:5:
index out of bounds: the len is 3 but the index is 99
stack backtrace:
   0: rust_begin_unwind
             at /rustc/a28077b28a02b92985b3a3faecf92813155f1ea1/library/std/src/panicking.rs:597:5
   1: core::panicking::panic_fmt
             at /rustc/a28077b28a02b92985b3a3faecf92813155f1ea1/library/core/src/panicking.rs:72:14
   2: app::pick::h0123456789abcdef
             at ./src/main.rs:4:5
   3: app::main
             at ./src/main.rs:9:13
note: Some details are omitted, run with `RUST_BACKTRACE=full`
"""
ASAN = """\
=================================================================
==4242==ERROR: AddressSanitizer: heap-use-after-free on address 0x602000000010 at pc 0x0000004c3 bp 0x7ffd sp 0x7ffe
READ of size 4 at 0x602000000010 thread T0
    #0 0x4c3a21 in use_it /srv/a/app/src/use.c:12:3
    #1 0x4c3b00 in main /srv/a/app/src/main.c:40:10
    #2 0x7f11 in __libc_start_main (/lib/x86_64-linux-gnu/libc.so.6+0x23d09)

0x602000000010 is located 0 bytes inside of 4-byte region
freed by thread T0 here:
    #0 0x493d4d in free (/srv/a/app/a.out+0x493d4d)
    #1 0x4c39ef in drop_it /srv/a/app/src/drop.c:5:3
"""
GDB = """\
Program received signal SIGSEGV, Segmentation fault.
#0  __GI_raise (sig=sig@entry=6) at ../sysdeps/unix/sysv/linux/raise.c:50
#1  0x00007ffff7e1a859 in abort () at abort.c:79
#2  0x0000555555555131 in parse (text=0x0) at src/parse.c:9
#3  0x0000555555555155 in main () at src/main.c:17
"""


@pytest.mark.parametrize(
    ("text", "frames", "title"),
    [
        (PYTHON, ("raw_decode@decoder.py", "main@work.py", "<module>@main.py"), "json.decoder.JSONDecodeError: Expecting value"),
        (NODE, ("handle@server.js", "Server.<anonymous>@router.js", "<anonymous>@anonymous.js"), "TypeError: bad 17"),
        (JAVA, ("com.acme.Disk.open@Disk.java", "java.nio.Files.read@Files.java"), 'Exception in thread "main"'),
        (
            GO,
            ("main.pick@main.go", "github.com/acme/app/server.(*Handler).Serve@handler.go", "main.main@main.go"),
            "panic: runtime error: index out of range",
        ),
        (RUST, ("app::pick@main.rs", "app::main@main.rs"), "thread 'main' panicked at src/main.rs:4:5:"),
        (ASAN, ("use_it@use.c", "main@main.c"), "==4242==ERROR: AddressSanitizer: heap-use-after-free"),
        (GDB, ("parse@parse.c", "main@main.c"), "Program received signal SIGSEGV"),
    ],
    ids=["python", "node", "java", "go", "rust", "asan", "gdb"],
)  # fmt: skip
def test_traces_of_seven_kinds_have_their_innermost_frames_and_their_line(text: str, frames: tuple[str, ...], title: str) -> None:
    found = signature(text)
    assert found.frames == frames
    assert found.title.startswith(title)


def test_the_same_failure_elsewhere_and_later_is_the_same_one() -> None:
    later = PYTHON
    for one, other in LATER.items():
        assert one in later
        later = later.replace(one, other)
    assert signature(later).hex16 == signature(PYTHON).hex16
    moved = RUST.replace(":4:5", ":40:7").replace("./src", "/builds/77/src").replace("h0123456789abcdef", "hfedcba9876543210")
    assert signature(moved.replace("is 99", "is 3")).hex16 == signature(RUST).hex16
    assert signature(GDB.replace("0x0000555555555131", "0x00007fff00000000")).hex16 == signature(GDB).hex16


def test_colours_and_controls_make_no_difference() -> None:
    assert signature(PYTHON.replace("json.decoder", "\x1b[1m\x1b[35mjson.decoder")).hex16 == signature(PYTHON).hex16


def test_another_failure_is_another_one() -> None:
    texts = [
        PYTHON,
        NODE,
        JAVA,
        GO,
        RUST,
        ASAN,
        GDB,
        PYTHON.replace("Expecting value", "Extra data"),
        PYTHON.replace("in main", "in other"),
    ]
    assert len({signature(text).hex16 for text in texts}) == len(texts)


def test_the_way_it_ended_tells_failures_apart() -> None:
    exits = [{"code": 1}, {"code": 2}, {"signal": 9}, {"signal": 9, "oom_killed": True}, {}]
    assert len({signature("make: *** [all] Error 1", {"exit": each}).hex16 for each in exits}) == len(exits)


def test_a_failure_without_text_is_named_by_its_end() -> None:
    assert signature("", {"exit": {"code": 3}}).title == "exit code 3"
    assert signature("", {"exit": {"signal": 9, "signal_name": "SIGKILL"}}).title == "killed by SIGKILL"
    assert signature("", {"exit": {"oom_killed": True}}).title == "killed for want of memory"
    assert signature("", {"exit": {"error": "not known"}}).title == "no error text was given"


def test_what_make_says_is_not_what_went_wrong() -> None:
    one = signature("cc: fatal error: no input files\nmake: *** [Makefile:2: all] Error 1\n")
    two = signature("ld: cannot find -lfoo\nmake: *** [Makefile:2: all] Error 1\n")
    assert one.title == "cc: fatal error: no input files"
    assert one.hex16 != two.hex16


def test_the_pseudonym_of_a_secret_does_not_count() -> None:
    one, two = (
        signature(f"LoginError: [redacted:github-token:{digits}] was refused") for digits in ("0123456789ab", "ba9876543210")
    )
    assert one.hex16 == two.hex16


def test_folders_of_the_moment_do_not_count_and_names_of_files_do() -> None:
    assert signature("OSError: /tmp/tmpab_x9/a: gone").hex16 == signature("OSError: /tmp/tmpqq_z1/b: gone").hex16
    assert signature("OSError: /srv/1/config.json: gone").hex16 == signature("OSError: /opt/x/config.json: gone").hex16
    assert signature("OSError: /srv/1/config.json: gone").hex16 != signature("OSError: /srv/1/other.json: gone").hex16


PIECES = [
    "/a", "at ", "    at a (", '  File "', "0x", "#0 ", "    at " + "a." * 400 + "(\n", "a/" * 900 + "\n\tx\n", "[", "\n", "\x1b[",
    "::1", "error ", "a-", "1:", "Caused by: ", "\u202e", "thread '", "panic: x\n",
]  # fmt: skip
HOSTILE = [piece * (10_000_000 // len(piece)) for piece in PIECES]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_ten_hostile_megabytes_take_a_moment(text: str) -> None:
    started = time.monotonic()
    assert len(signature(text).hex16) == 16
    assert time.monotonic() - started < 5


@settings(max_examples=200)
@given(
    st.lists(
        st.sampled_from([*PYTHON.split("\n"), *GO.split("\n"), *GDB.split("\n"), *RUST.split("\n"), "\x1b[", "\udcff"]) | st.text()
    )
)
def test_any_text_has_a_signature_that_is_always_the_same(lines: list[str]) -> None:
    text = "\n".join(lines)
    found = signature(text)
    assert found == signature(text)
    assert len(frames_of(text)) <= 5
    assert not set(found.title) & set("\n\x1b\x00")
