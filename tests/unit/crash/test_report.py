"""The document: what the schema says, without secrets, the same bytes for the same failure."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, ValidationError

from mothball.crash.evidence import Given, collect
from mothball.crash.facts import Binary, LeftOut, PackageFacts
from mothball.crash.names import is_report_id
from mothball.crash.report import Captured, build, encode, finish, redact_evidence, with_package
from mothball.crash.signature import signature
from mothball.redact.engine import Redactor
from mothball.redact.rules import Rules
from mothball.settings import Settings

SCHEMA = json.loads((Path(__file__).resolve().parents[3] / "docs" / "crash-report.schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)
AT = 1_732_225_509_999
TOKEN = "ghp_" + "A1b2C3d4E5" * 3 + "f6G7h8"
PASSWORD = "Tr0ub4dor&3-zebra-lamp"
WORKSPACE = {
    "id": "owner/repo#7",
    "repo": "owner/repo",
    "number": 7,
    "title": "fix it",
    "host": "box",
    "path": "/srv/w/7",
    "mode": "ephemeral",
    "agent_id": None,
    "agent_name": "agent-1",
    "intent": None,
    "changeset_id": None,
    "base_commit": "0" * 40,
    "state": "active",
    "created_at": AT - 1000,
    "last_active": AT - 10,
    "runtime": {},
}


def redactor(key: bytes = b"k" * 32) -> Redactor:
    return Redactor(key, Rules.default())


def clear(given: Given | None = None, *, evidence: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A clear document; `evidence` on top of what an idle host says, `workspace` on top of `WORKSPACE`."""
    said = given if given is not None else Given(error="ValueError: x", exit_code=1)
    facts: dict[str, Any] = {
        "exit": {
            "code": said.exit_code,
            "signal": None,
            "signal_name": None,
            "code_means": None,
            "core_dumped": None,
            "oom_killed": None,
            "oom_evidence": "",
        },
        "cgroup": None,
        "log": None,
        "processes": {"count": 0, "listed": []},
        "runtime": {"error": "none"},
        "environment": {"source": "none", "variables": {}, "left_out": 0},
        "host": {"error": "nobody asked"},
    }
    facts |= evidence or {}
    workspace = SimpleNamespace(**{**WORKSPACE, **fields.pop("workspace", {})})
    captured = Captured(digest="sha256:" + "a" * 64, generation=3, source="fresh", files=2, bytes=20, changed=True)
    made = signature(said.error, facts)
    return build(given=said, workspace=workspace, evidence=facts, signature=made, at=AT, **{"capture": captured, **fields})


def test_a_report_of_real_evidence_is_what_the_schema_says(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "run.log").write_text("failed\n")
    conf = Settings(host="box", data_dir=tmp_path / "data", workspace_roots=(tmp_path,))
    given = Given(
        error="x\n", signal=9, command=("make", "test"), log="run.log", env={"PATH": "/bin"}, cgroup={"oom_kills": 1, "own": True}
    )
    workspace = SimpleNamespace(**{**WORKSPACE, "path": str(tmp_path / "w")})
    found = collect(given, workspace=workspace, settings=conf, driver=None, root=tmp_path / "w")
    report = finish(clear(given, evidence=found), redactor())
    VALIDATOR.validate(report)
    assert report["evidence"]["exit"]["oom_killed"] is True
    assert report["evidence"]["log"]["text"] == "failed\n"
    assert report["host"]["name"] == "box"


def test_the_schema_is_one_and_notices_what_is_wrong() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    report = finish(clear(), redactor())
    VALIDATOR.validate(report)
    for path, wrong in [
        (("id",), "../x"),
        (("error", "signature"), "x"),
        (("capture", "digest"), "md5:0"),
        (("evidence",), {}),
        (("more",), 1),
    ]:
        broken = copy.deepcopy(report)
        place = broken
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = wrong
        with pytest.raises(ValidationError):
            VALIDATOR.validate(broken)


def test_b56_error_title_id_and_time_are_in_the_report() -> None:
    report = finish(clear(Given(error="Traceback\nValueError: x\n", title="tests fail", exit_code=3)), redactor())
    assert report["error"]["title"] == "tests fail"
    assert report["error"]["text"] == "Traceback\nValueError: x\n"
    assert report["time"] == "2024-11-21T21:45:09.999Z"
    assert is_report_id(report["id"])
    assert "-issue-7-20241121-214509Z-" in report["id"]


def test_the_digest_in_the_id_is_that_of_the_report_without_id_and_package() -> None:
    report = finish(clear(), redactor())
    bare = {name: value for name, value in report.items() if name not in {"id", "package"}}
    assert report["id"].endswith("-" + hashlib.sha256(encode(bare)).hexdigest()[:8])


def test_the_same_failure_gives_the_same_bytes_and_another_one_others() -> None:
    assert encode(finish(clear(), redactor())) == encode(finish(clear(), redactor()))
    other = finish(clear(Given(error="ValueError: y", exit_code=1)), redactor())
    assert other["id"] != finish(clear(), redactor())["id"]


def test_a_finished_report_finished_again_is_the_same() -> None:
    once = finish(clear(Given(error=f"token {TOKEN}", exit_code=1)), redactor())
    assert encode(finish(once, redactor())) == encode(once)


CANARIES: dict[str, dict[str, Any]] = {
    "error": {"given": Given(error=f"push to https://x:{TOKEN}@example.org failed")},
    "title": {"given": Given(title=f"login with {TOKEN}")},
    "command option": {"given": Given(command=("deploy", "--password", PASSWORD))},
    "command word": {"given": Given(command=("env", f"API_TOKEN={TOKEN}"))},
    "log": {
        "evidence": {
            "log": {
                "path": "/w/a",
                "bytes": 9,
                "tail_bytes": 9,
                "truncated": False,
                "modified": 1,
                "text": f"export GITHUB_TOKEN={TOKEN}\n",
            }
        }
    },
    "environment": {"evidence": {"environment": {"source": "given", "variables": {"GO_PASSWORD": PASSWORD}, "left_out": 0}}},
    "processes": {
        "evidence": {
            "processes": {
                "count": 1,
                "listed": [
                    {
                        "pid": 1,
                        "ppid": 0,
                        "depth": 0,
                        "name": "x",
                        "state": "S",
                        "argv": ["x", f"--token={TOKEN}"],
                        "cpu_seconds": 0.0,
                        "rss_bytes": 1,
                        "threads": 1,
                    }
                ],
            }
        }
    },
    "runtime": {
        "evidence": {
            "runtime": {
                "driver": "command",
                "alive": False,
                "sure": True,
                "reason": f"key {TOKEN}",
                "facts": {"password": PASSWORD},
            }
        }
    },
    "cgroup": {"evidence": {"cgroup": {"version": 2, "path": f"/{TOKEN}"}}},
    "workspace": {"workspace": {"title": f"use {TOKEN}"}},
    "repo": {"workspace": {"repo": f"owner/{TOKEN}"}},
    "git": {"git": [{"path": "", "remotes": {"origin": f"https://{TOKEN}@github.com/a/b"}}]},
    "since": {
        "since": {
            "ref": "snap-1",
            "digest": "sha256:" + "b" * 64,
            "totals": {"added": 1},
            "patch": f"+{TOKEN}\n",
            "cut": [],
            "error": None,
            "changes": [{"path": f"keys/{TOKEN}", "kind": "added", "before": None, "after": 1}],
        }
    },
    "omissions": {"omissions": [{"path": f"big/{TOKEN}", "reason": "too_large", "size": 1}], "omitted": {"too_large": 1}},
}


@pytest.mark.parametrize("where", CANARIES)
def test_no_canary_is_left_wherever_it_was(where: str) -> None:
    report = finish(clear(**CANARIES[where]), redactor())
    data = encode(report).decode()
    assert TOKEN not in data
    assert PASSWORD not in data
    assert TOKEN not in report["id"]
    assert report["redactions"]["total"] >= 1
    assert sum(report["redactions"]["counts"].values()) == report["redactions"]["total"]
    VALIDATOR.validate(report)


def test_what_one_part_gives_away_by_its_name_is_found_in_the_others() -> None:
    given = Given(error=f"cannot log in with {PASSWORD} as root", command=("db", "--password", PASSWORD))
    report = finish(clear(given), redactor())
    assert PASSWORD not in encode(report).decode()
    pseudonym = report["evidence"]["command"][2]
    assert pseudonym.startswith("[redacted:")
    assert pseudonym.rpartition(":")[2] in report["error"]["text"]


def test_a_draft_of_evidence_holds_no_secret_and_counts_the_same_later() -> None:
    evidence = {**CANARIES["environment"]["evidence"], **CANARIES["log"]["evidence"], **CANARIES["processes"]["evidence"]}
    draft = redact_evidence(evidence, redactor())
    assert TOKEN not in json.dumps(draft)
    assert PASSWORD not in json.dumps(draft)
    at_once, later = finish(clear(evidence=evidence), redactor()), finish(clear(evidence=draft), redactor())
    assert at_once["redactions"] == later["redactions"]
    assert at_once["id"] == later["id"]


def test_the_key_of_the_pseudonyms_is_named_and_another_key_gives_others() -> None:
    one, two = (finish(clear(Given(error=TOKEN)), redactor(key)) for key in (b"k" * 32, b"l" * 32))
    assert one["redactions"]["key_id"] != two["redactions"]["key_id"]
    assert one["error"]["text"] != two["error"]["text"]
    assert one["error"]["signature"] == two["error"]["signature"]


def test_harmless_values_stay_readable() -> None:
    report = finish(clear(workspace={"base_commit": "0123456789abcdef0123456789abcdef01234567"}), redactor())
    assert report["workspace"]["base_commit"] == "0123456789abcdef0123456789abcdef01234567"
    assert report["capture"]["digest"] == "sha256:" + "a" * 64
    assert report["redactions"]["total"] == 0


def facts(**fields: Any) -> PackageFacts:
    return PackageFacts(
        **{
            "files": 2,
            "bytes": 20,
            "binaries": [Binary("bin/x", 3)],
            "left_out": [LeftOut("k", "secret_in_binary", 3, ["aws"])],
            **fields,
        }
    )


def test_a_package_adds_its_facts_and_keeps_the_id() -> None:
    report = finish(clear(), redactor())
    packaged = with_package(report, facts(), redactor())
    VALIDATOR.validate(packaged)
    assert packaged["id"] == report["id"]
    assert packaged["package"]["files"] == 2
    assert {**packaged, "package": None} == report


def test_what_a_file_of_the_package_gave_away_goes_from_the_report_too() -> None:
    shared = redactor()
    report = finish(clear(Given(error=f"refused: {PASSWORD}")), shared)
    assert PASSWORD in report["error"]["text"]
    shared.learn(b".netrc", f"machine h login u password {PASSWORD}\n".encode())
    packaged = with_package(report, facts(), shared)
    assert PASSWORD not in encode(packaged).decode()
    assert packaged["redactions"]["total"] == 2  # the text, and the title made of it
    assert packaged["id"] == report["id"]


def test_names_in_the_facts_of_a_package_are_clean() -> None:
    packaged = with_package(finish(clear(), redactor()), facts(left_out=[LeftOut("a\x1b[2J\udcff", "binary", 1)]), redactor())
    assert packaged["package"]["left_out"][0]["path"] == "a<ESC[2J><0xff>"


def test_ten_megabytes_of_error_keep_both_ends() -> None:
    text = "first line\n" + "x" * 79 + "\n" * 1 + ("y" * 79 + "\n") * 130_000 + "last line\n"
    report = finish(clear(Given(error=text)), redactor())
    VALIDATOR.validate(report)
    assert report["error"]["truncated"]
    assert report["error"]["bytes"] == len(text)
    assert report["error"]["text"].startswith("first line\n")
    assert report["error"]["text"].endswith("last line\n")
    assert len(encode(report)) < 100_000
    clipped = finish(clear(Given(error=report["error"]["text"], error_bytes=len(text))), redactor())
    assert clipped["error"] == report["error"]


def test_a_title_is_cut_after_it_was_redacted() -> None:
    for before in range(150, 200):
        report = finish(clear(Given(error=f"ValueError: {'x' * before} {TOKEN}", title=f"{'y' * before} {TOKEN}")), redactor())
        assert "ghp_" not in encode(report).decode()
        assert len(report["error"]["title"]) <= 200
        untitled = finish(clear(Given(error=f"ValueError: {'x' * before} {TOKEN}")), redactor())
        assert "ghp_" not in encode(untitled).decode()


def test_a_title_with_dots_names_no_file() -> None:
    report = finish(clear(Given(title="../../etc/passwd\n\x1b[2J")), redactor())
    assert report["error"]["title"] == "../../etc/passwd <ESC[2J>"
    assert "passwd" not in report["id"]


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(
    text=st.text(st.characters(codec=None, categories=None)),
    words=st.lists(st.text(st.characters(codec=None, categories=None)), max_size=4),
    env=st.dictionaries(st.text(max_size=8), st.text(st.characters(codec=None, categories=None), max_size=20), max_size=4),
)
def test_whatever_is_said_the_report_is_valid_clean_json(text: str, words: list[str], env: dict[str, str]) -> None:
    evidence = {"environment": {"source": "given", "variables": env, "left_out": 0}}
    given = Given(error=text, title=text, command=tuple(words))
    report = finish(clear(given, evidence=evidence, workspace={"title": text}), redactor())
    data = encode(report)
    assert data == encode(finish(clear(given, evidence=evidence, workspace={"title": text}), redactor()))
    assert json.loads(data) == report
    VALIDATOR.validate(report)
    assert not {chr(number) for number in range(0x20)} & set(data.decode().rstrip("\n"))
