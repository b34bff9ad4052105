"""JSON trees, environments, command lines, paths; what is learned; what never shows."""

from __future__ import annotations

import json
import pickle
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mothball.errors import ConfigError
from mothball.redact import Redactor, Rules, mask, redactor_for
from mothball.redact.key import masked
from mothball.settings import Settings
from tests.unit.redact.canaries import PASSWORD, TOKENS, WEAK, private_key, random_text

TOKEN = TOKENS["gitlab"][0]


@pytest.fixture
def redactor() -> Redactor:
    return Redactor(b"k" * 32, Rules.default())


def test_the_same_secret_has_the_same_pseudonym_under_one_key_and_another_under_another(redactor: Redactor) -> None:
    once, again = redactor.text(TOKEN), Redactor(b"k" * 32, Rules.default()).text(f"x {TOKEN}")
    assert again == f"x {once}"
    assert Redactor(b"o" * 32, Rules.default()).text(TOKEN) != once
    assert mask(TOKEN) == "[redacted:gitlab]"
    assert Redactor(b"k" * 32, Rules.default()).key_id == redactor.key_id != Redactor(b"o" * 32, Rules.default()).key_id


def test_a_document_loses_tokens_in_keys_and_values_and_whole_values_of_telling_keys(redactor: Redactor) -> None:
    tree = {
        "password": "a b", "nested": [{"apiToken": ["abc", TOKEN]}, {"name": "DB_PASSWORD", "value": "short"}], TOKEN: 1,
        "pin": "1234567",
        "passcode": 99887766, "n": 5, "x": None, "ok": True, "text": f"see {TOKEN}", "token": None,
        "secret": {"inner": WEAK, "password": WEAK},
    }  # fmt: skip
    out = redactor.document(tree)
    shown = json.dumps(out)
    for secret in ("a b", '"abc"', "short", TOKEN, "1234567", "99887766"):
        assert secret not in shown
    assert (out["n"], out["x"], out["ok"], out["token"]) == (5, None, True, None)
    assert out["secret"]["password"].startswith("[redacted:password:")
    assert redactor.document(out) == out
    assert json.loads(json.dumps(masked({"a": (1, "b")}))) == {"a": [1, "b"]}


def test_a_document_without_an_end_does_not_end_the_process(redactor: Redactor) -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    json.dumps(str(type(redactor.document(deep))))


def test_an_environment_loses_every_value_of_a_telling_name(redactor: Redactor) -> None:
    env = {
        "PATH": "/usr/bin:/bin", "DB_PASSWORD": "short", "DATABASE_URL": f"postgres://u:{WEAK}@h/d",
        "AWS_SECRET_ACCESS_KEY": "x y z",
        "HOME": "/root", "GREETING": f"hello {TOKEN}", "TOKEN": "", "SECRET_KEY": "true",
        "SSH_AUTH_SOCK": "/tmp/a.sock", "API_KEY": "a'b\"c",
    }  # fmt: skip
    out = redactor.env(env)
    for secret in ("short", WEAK, "x y z", TOKEN, "a'b"):
        assert secret not in json.dumps(out)
    assert (out["PATH"], out["HOME"], out["TOKEN"], out["SECRET_KEY"]) == ("/usr/bin:/bin", "/root", "", "true")
    assert redactor.env(out) == out


@pytest.mark.parametrize(
    ("argv", "secret"),
    [
        (["tool", "--password", "x y"], "x y"),
        (["tool", "--api-token", "-dash"], "-dash"),
        (["tool", "--token=ab c"], "ab c"),
        (["env", "DB_PASSWORD=pw;1", "run"], "pw;1"),
        (["docker", "run", "-e", "SECRET_KEY=abc"], "=abc"),
        (["mysql", "-phunter2", "db"], "hunter2"),
        (["/usr/bin/mysqldump", "-u", "root", "-p", "hunter2"], "hunter2"),
        (["curl", "-u", "bob:hunter2", "https://x"], "hunter2"),
        (["curl", "--user", "bob:hunter2"], "hunter2"),
        (["curl", "-H", f"Authorization: Bearer {random_text(20)}"], random_text(20)),
        (["git", "clone", "https://u:hunter2@github.com/o/r"], "hunter2"),
        (["sh", "-c", f"echo {TOKEN} | login"], TOKEN),
    ],
)
def test_a_command_line_loses_its_secrets(redactor: Redactor, argv: list[str], secret: str) -> None:
    out = redactor.argv(argv)
    assert secret not in " ".join(out)
    assert len(out) == len(argv)
    assert redactor.argv(out) == out


def test_a_harmless_command_line_stays(redactor: Redactor) -> None:
    argv = [
        "python",
        "-m",
        "pytest",
        "-p",
        "no:randomly",
        "-k",
        "token and not password",
        "--maxfail=1",
        "mkdir",
        "-p",
        "x",
        "--",
        "a=b",
    ]
    assert redactor.argv(argv) == argv


@pytest.mark.parametrize(
    "path",
    [
        f"src/{TOKEN}/a.py", f"{TOKEN}", f"a/{TOKEN}.txt", f"token={random_text(20)}/x", f"secret=/{random_text(24)}",
        f"x/password:/{random_text(24)}/y",
        "n" * 240 + "/" + TOKEN + "b" * 180, f"https:/u:{WEAK}@h/x",
    ],
)  # fmt: skip
def test_a_path_loses_its_secrets_and_stays_a_path(redactor: Redactor, path: str) -> None:
    raw = path.encode()
    out = redactor.name(raw)
    assert out.count(b"/") == raw.count(b"/") and b"\0" not in out
    assert all(len(part) <= 255 for part in out.split(b"/"))
    assert TOKEN.encode() not in out and random_text(24).encode() not in out and random_text(20).encode() not in out
    assert redactor.name(out) == out


@given(st.binary(max_size=200).filter(lambda raw: b"\0" not in raw))
def test_any_path_stays_one_with_as_many_components(path: bytes) -> None:
    found = Redactor(None, Rules.default())
    out = found.name(path)
    assert out.count(b"/") == path.count(b"/") and b"\0" not in out
    assert found.name(out) == out


@given(st.text())
def test_any_text_is_redacted_without_an_error_and_twice_is_once(text: str) -> None:
    once = mask(text)
    assert mask(once) == once


def test_what_a_credential_file_holds_is_found_in_every_other_file(redactor: Redactor) -> None:
    redactor.learn(b"home/.netrc", f"machine h login l password {PASSWORD}\n".encode())
    redactor.learn(b".env", f"DB_PASS={WEAK}\nSTRANGE=9f86d081884c7d659a2f\nSHORT=abc\n".encode())
    assert redactor.counts.total() == 0
    out = redactor.text(f"connect({PASSWORD!r}, {WEAK!r}, '9f86d081884c7d659a2f')")
    assert out.count("[redacted:known:") == 3
    assert redactor.remember() is False


def test_common_words_of_credential_files_are_not_hunted(redactor: Redactor) -> None:
    redactor.learn(b".env", b"DB_PASSWORD=postgres\nSECRET_MODE=production\nTOKEN=password\n")
    assert redactor.text("the postgres production password page") == "the postgres production password page"


def test_values_are_never_shown_and_never_pickled(redactor: Redactor) -> None:
    redactor.text(TOKEN)
    assert TOKEN.encode() in redactor.values
    assert TOKEN not in repr(redactor) + str(redactor)
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(redactor)


def test_counts_say_how_often_each_rule_fired_also_from_threads(redactor: Redactor) -> None:
    text = f"{TOKEN} {TOKENS['npm'][0]}\n".encode() * 20
    threads = [threading.Thread(target=lambda: [redactor.data(text) for _ in range(25)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert redactor.counts == {"gitlab": 2000, "npm": 2000}


# --- an operator's own rules ------------------------------------------------------------------------------------------------------


def rules(tmp_path: Path, text: str) -> Rules:
    path = tmp_path / "rules.toml"
    path.write_text(text)
    return Rules.load(str(path))


def test_own_rules_find_and_allowed_values_stay(tmp_path: Path) -> None:
    loaded = rules(
        tmp_path,
        '[[rule]]\nname = "acme"\npattern = \'acme-([0-9]{6})\'\ngroup = 1\nkeywords = ["acme-"]\n'
        f'[[rule]]\nname = "ticket"\npattern = "(?P<id>T-[0-9]+)!"\ngroup = "id"\n[allow]\nvalues = ["{TOKEN}"]\n',
    )
    found = Redactor(b"k" * 32, loaded)
    out = found.text(f"acme-123456 T-99! {TOKEN} {TOKENS['npm'][0]}")
    assert out.startswith("acme-[redacted:acme:") and "[redacted:ticket:" in out and TOKEN in out and "[redacted:npm:" in out
    assert found.text(out) == out
    assert found.env({"TOKEN": TOKEN}) == {"TOKEN": TOKEN}
    assert "acme" in loaded.names and loaded.digest != Rules.default().digest


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rule = 3", "written as"),
        ("[[rule]]\nname = 'a'\npattern = '('", "rule 'a': pattern is no RE2 pattern"),
        ("[[rule]]\nname = 'a'\npattern = '(?=x)'", "rule 'a': pattern is no RE2 pattern"),
        ("[[rule]]\nname = 'a'\npattern = 'x*'", "matches the empty text"),
        ("[[rule]]\nname = 'a'\npattern = 'x'\ngroup = 1", "no group 1"),
        ("[[rule]]\nname = 'a'\npattern = 'x'\ngroup = 'n'", "no group named"),
        ("[[rule]]\nname = 'A b'\npattern = 'x'", "lower-case letters"),
        ("[[rule]]\npattern = 'x'", "rule 1: name has"),
        ("[[rule]]\nname = 'aws'\npattern = 'x'", "the name is taken"),
        ("[[rule]]\nname = 'a'\npattern = 'x'\nkeyword = 'x'", "unknown field keyword"),
        ("[[rule]]\nname = 'a'\npattern = 'x'\nkeywords = [1]", "list of texts"),
        ("[allow]\nvalue = ['x']", "one field"),
        ("[allow]\nvalues = ['']", "not empty"),
        ("[rules]\n", "unknown section rules"),
        ("= ", "is no TOML"),
    ],
)
def test_a_mistake_in_a_rules_file_names_file_rule_and_reason(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        rules(tmp_path, text)
    assert "rules.toml" in caught.value.message


def test_a_rules_file_that_is_not_there_is_an_error_and_not_silently_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        redactor_for(Settings.model_construct(redaction_rules=str(tmp_path / "none.toml")), None)


def test_the_key_of_the_settings_goes_before_that_of_the_fleet() -> None:
    class Fleet:
        def redaction_key(self) -> bytes:
            return b"f" * 32

    own = Settings(redaction_key="o" * 16)
    assert redactor_for(own, Fleet()).key_id == Redactor(b"o" * 16, Rules.default()).key_id
    assert redactor_for(Settings(), Fleet()).key_id == Redactor(b"f" * 32, Rules.default()).key_id
    assert redactor_for(Settings(), None).key_id is None


def test_private_keys_in_error_texts_are_gone_in_logs() -> None:
    assert "MII" not in mask(f"cannot parse {private_key()}") and "[redacted:private-key]" in mask(f"cannot parse {private_key()}")
