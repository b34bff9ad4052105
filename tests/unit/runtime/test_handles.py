"""What a handle may say: it comes out of the registry, so it is anybody's text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mothball.errors import InvalidParams
from mothball.runtime import DRIVERS, check
from mothball.runtime.answers import dig, plain, text, whole
from mothball.runtime.handles import health_url

BOOT = "bb598f77-a022-4288-a869-5875c0816f93"
GOOD: list[dict[str, Any]] = [
    {"driver": "none"},
    {"driver": "process", "pid": 4711, "start_time": 0},
    {"driver": "process", "pid": 2, "start_time": 8812345, "boot_id": BOOT, "pid_ns": "pid:[4026531836]"},
    {"driver": "process", "pid": 4711, "start_time": 1, "health_url": "http://127.0.0.1:8080/healthz"},
    {"driver": "runc", "container": "agent-1"},
    {"driver": "runc", "container": "a+b_c.d", "root": "/run/containerd/runc/k8s.io"},
    {"driver": "systemd", "unit": "agent@7.service"},
    {"driver": "systemd", "unit": "run-r1.scope", "health_url": "https://[::1]/"},
    {"driver": "command", "name": "vm", "vm_id": "i-1", "zone": 3, "spot": True, "note": None},
    {"driver": "docker", "container": "0f" * 32},
    {"driver": "podman", "container": "agent_1.x"},
]


@pytest.mark.parametrize("handle", GOOD, ids=str)
def test_a_handle_that_names_its_runtime_is_kept_as_it_is(handle: dict[str, Any]) -> None:
    # A field that says nothing is left out, except for an operator's driver: to it null may say something.
    assert check(handle) == handle


def test_every_driver_has_a_good_handle_among_these() -> None:
    assert {each["driver"] for each in GOOD} == set(DRIVERS)


@pytest.mark.parametrize("nothing", [None, {}])
def test_no_runtime_is_no_runtime(nothing: Any) -> None:
    assert check(nothing) == {}


@pytest.mark.parametrize(
    ("handle", "said"),
    [
        ([], "must be an object"),
        ("process", "must be an object"),
        ({1: 2}, "must be an object"),
        ({"pid": 4711}, "runtime.driver"),
        ({"driver": "kvm"}, "use one of none, process"),
        ({"driver": ["process"]}, "use one of"),
        ({"driver": "none", "pid": 1}, "unknown field 'pid'"),
        ({"driver": "process", "pid": 4711}, "needs start_time; `handle_of_pid` or `mothball register --pid`"),
        ({"driver": "process", "pid": None, "start_time": 1}, "needs pid"),
        ({"driver": "process", "pid": 1, "start_time": 1}, "from 2 to"),
        ({"driver": "process", "pid": 0, "start_time": 1}, "from 2 to"),
        ({"driver": "process", "pid": -4711, "start_time": 1}, "from 2 to"),
        ({"driver": "process", "pid": True, "start_time": 1}, "runtime.pid"),
        ({"driver": "process", "pid": "4711", "start_time": 1}, "runtime.pid"),
        ({"driver": "process", "pid": 4711.0, "start_time": 1}, "runtime.pid"),
        ({"driver": "process", "pid": 2**40, "start_time": 1}, "runtime.pid"),
        ({"driver": "process", "pid": 4711, "start_time": -1}, "runtime.start_time"),
        ({"driver": "process", "pid": 4711, "start_time": 1, "boot_id": "x"}, "runtime.boot_id"),
        ({"driver": "process", "pid": 4711, "start_time": 1, "pid_ns": "net:[1]"}, "runtime.pid_ns"),
        ({"driver": "process", "pid": 4711, "start_time": 1, "signal": 9}, "unknown field 'signal'"),
        ({"driver": "runc"}, "needs container"),
        ({"driver": "runc", "container": "a", "root": "run"}, "runtime.root"),
        ({"driver": "runc", "container": "a", "root": "/run/../etc"}, "runtime.root"),
        ({"driver": "runc", "container": "a", "root": "//run"}, "runtime.root"),
        ({"driver": "runc", "container": "a", "root": "/run/"}, "runtime.root"),
        ({"driver": "runc", "container": "a", "root": "/run\n"}, "runtime.root"),
        ({"driver": "runc", "container": "a\n"}, "runtime.container"),
        ({"driver": "systemd", "unit": "a.service\n"}, "runtime.unit"),
        ({"driver": "docker", "container": "a/../b"}, "runtime.container"),
        ({"driver": "command"}, "needs name"),
        ({"driver": "command", "name": "vm", "Bad": 1}, "no field's name"),
        ({"driver": "command", "name": "vm", "list": [1]}, "runtime.list"),
        ({"driver": "command", "name": "vm", "text": "a\0"}, "runtime.text"),
        ({"driver": "command", "name": "vm", "text": "x" * 1025}, "runtime.text"),
        ({"driver": "command", "name": "vm", "text": "\ud800"}, "runtime.text"),
        ({"driver": "runc", "container": "\ud800"}, "runtime.container"),
        ({"driver": "runc", "container": "a", "root": "/\udc80"}, "runtime.root"),
        ({"driver": "kv\ud800"}, "use one of"),
        ({"driver": "command", "name": "vm", "number": 1.5}, "runtime.number"),
        ({"driver": "command", "name": "vm", "number": 2**70}, "runtime.number"),
        ({"driver": "command", "name": "vm", **{f"f{n}": n for n in range(40)}}, "at most 32"),
        ({"driver": "command", "name": "vm", "health_url": "http://127.0.0.1/"}, "sees the workspace's own ports"),
        ({"driver": "none", "health_url": "http://127.0.0.1/"}, "sees the workspace's own ports"),
    ],
    ids=str,
)
def test_a_handle_that_does_not_is_refused_with_the_field(handle: Any, said: str) -> None:
    with pytest.raises(InvalidParams) as caught:
        check(handle)
    assert said in caught.value.message
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8080/healthz?full=1",
        "https://[::1]:8443/",
        "http://localhost/",
        "http://10.0.0.2:80/x",
    ],
)
def test_a_health_url_on_an_address_is_taken(url: str) -> None:
    assert health_url(url) == url


@pytest.mark.parametrize(
    "url",
    [
        "", "ftp://127.0.0.1/", "file:///etc/passwd", "http://", "http:///x", "//127.0.0.1/", "127.0.0.1:80", 7, None,
        "http://example.org/", "http://localhost.example.org/", "http://127.1/", "http://2130706433/", "http://0x7f.0.0.1/",
        "http://0.0.0.0/", "http://[::]/", "http://224.0.0.1/", "http://[fe80::1%25eth0]/", "http://127.0.0.1:0/",
        "http://127.0.0.1:99999/", "http://127.0.0.1:http/", "http://user@127.0.0.1/", "http://127.0.0.1@example.org/",
        "http://127.0.0.1#@example.org/", "http://127.0.0.1\\@example.org/", "http://127.0.0.1/a b", "http://127.0.0.1/\r\nHost: x",
        "http://127.0.0.1/\u00e9", "http://127.0.0.1/" + "x" * 1024, "http://[::1/",
    ],
)  # fmt: skip
def test_a_health_url_that_could_lead_elsewhere_is_refused(url: Any) -> None:
    with pytest.raises(InvalidParams, match=r"runtime\.health_url"):
        health_url(url)


values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers(), max_size=2))
handles = st.dictionaries(
    st.sampled_from(["pid", "start_time", "boot_id", "container", "root", "unit", "name", "health_url"]) | st.text(max_size=5),
    values | st.from_regex(r"[-\w./:@ ]{0,12}\.?(service)?") | st.integers(1, 5000),
    max_size=5,
)  # fmt: skip


@given(handles, st.sampled_from(DRIVERS) | st.text(max_size=8))
def test_whatever_a_handle_holds_it_is_refused_or_safe_as_an_argument(handle: dict[str, Any], driver: str) -> None:
    try:
        found = check({**handle, "driver": driver})
    except InvalidParams:
        return
    assert found["driver"] in DRIVERS
    for name in ("container", "unit", "name"):
        value = found.get(name, "a")
        if driver != "command" or name == "name":
            assert value
            assert not value.startswith(("-", ".", "/"))
            assert value.isascii()
            assert not set(value) & set(" /\n\r\t\0'\"?#%;|&$`*")
    assert found.get("pid", 2) >= 2
    assert check(found) == found


def test_answers_of_strangers_are_read_with_care() -> None:
    assert dig({"a": {"b": 3}}, "a", "b") == 3
    assert [dig(each, "a", "b") for each in (None, [], {"a": 1}, {"a": {"b": "3"}}, {"a": {"b": True}})] == [0] * 5
    assert (text("x" * 5000), text(7), text("a\ud800b")) == ("x" * 1000, "", "a?b")
    assert [whole(each) for each in (3, -1, True, 2**64, "3", None)] == [3, 0, 0, 0, 0, 0]
    assert plain({"a": 1, "b": [1], "c": "x" * 5000, "d": float("nan"), "e": None}) == {"a": 1, "c": "x" * 1000, "e": None}
    assert len(plain({str(n): n for n in range(100)})) == 50
    assert plain([1]) == {}
