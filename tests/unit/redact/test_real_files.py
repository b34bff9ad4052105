"""Files as real projects have them: nothing secret survives in one, and what everybody's source trees are made of stays."""

from __future__ import annotations

import pytest

from mothball.redact import Redactor, Rescan, Rules
from mothball.redact.dotenv import is_plain
from mothball.redact.known import Known
from tests.unit.redact.real_files import FILES, P, S, W

CODECS = {
    "utf-8": ("utf-8", b""),
    "latin1": ("latin-1", b""),
    "utf16": ("utf-16-le", b"\xff\xfe"),
    "utf16be": ("utf-16-be", b"\xfe\xff"),
}


def encoded(text: str, encoding: str) -> bytes:
    codec, mark = CODECS[encoding]
    return mark + text.encode(codec)


def decoded(data: bytes, encoding: str) -> str:
    codec, mark = CODECS[encoding]
    return data[len(mark) :].decode(codec)


@pytest.fixture
def redactor() -> Redactor:
    return Redactor(b"k" * 32, Rules.default())


@pytest.mark.parametrize(("what", "path", "encoding", "text", "gone"), FILES, ids=[row[0] for row in FILES])
def test_no_secret_of_a_real_file_survives_though_nothing_else_is_known(
    redactor: Redactor, what: str, path: str, encoding: str, text: str, gone: list[str]
) -> None:
    assert all(part in text for part in gone if "\n" not in part and '"' not in part)
    out = redactor.data(encoded(text, encoding), path.encode())
    assert [part for part in gone if part in decoded(out, encoding)] == []
    assert redactor.data(out, path.encode()) == out
    assert b"".join(redactor.stream((encoded(text, encoding),), path.encode())) == out
    rescan = Rescan(redactor, Known(()))
    rescan.feed(out)
    assert rescan.finish() == []


@pytest.mark.parametrize(
    "line",
    [
        "A=", "A=true", "A=FALSE", "A=0", "A=8080", "A=12345", "A=5m", "A=production", "A=localhost", "A=UTF-8", "A=${B}", "A=$B",
        "A=https://api.example.com/v1/users", "A=http://localhost:3000", "A=db.internal:5432", "A=127.0.0.1", "A=example.com",
        "A=/var/lib/app/data", "A=./storage", "A=debug  # more", "export A='info'", "A: warn", "PASSWORD_FILE=/run/secrets/x",
    ],
)  # fmt: skip
def test_what_is_plainly_no_secret_stays_in_an_env_file(redactor: Redactor, line: str) -> None:
    assert redactor.data(f"{line}\n".encode(), b"a/.env") == f"{line}\n".encode()


@pytest.mark.parametrize(
    "line",
    [
        "A=bluemonkey", "A=123456", "A=a b", "A=me@example.com", f"A=https://hooks.example.com/{S}", f"A=https://x.example/a?k={P}",
        "A=x7$k", "A=/7bKMhahNRdJi6FAgFmsrkDJ3eIoSj0", "DB_PASSWORD=monkey", "#A=bluemonkey", "A=x1y2z3a4.example.com",
        "A=My Application", 'A="two\nlines of it"', "PASSWORD=123456",
    ],
)  # fmt: skip
def test_every_other_value_of_an_env_file_is_redacted_whatever_its_name(redactor: Redactor, line: str) -> None:
    out = redactor.data(f"{line}\nB=1\n".encode(), b".env.staging").decode()
    assert line.partition("=")[2].strip('"') not in out
    assert out.endswith("]\nB=1\n") or out.endswith(']"\nB=1\n')


def test_only_values_of_an_env_file_that_look_made_or_have_a_telling_name_are_hunted_in_other_files(redactor: Redactor) -> None:
    redactor.learn(b".env", f"APP_NAME=bluemonkey shop\nTHING={S}\nDB_PASSWORD=x9-{W}\n".encode())
    out = redactor.data(f"the bluemonkey shop has {S} and x9-{W}\n".encode(), b"notes.md").decode()
    assert out.startswith("the bluemonkey shop has [redacted:known:")
    assert S not in out
    assert W not in out
    redactor.data(b"APP_NAME=bluemonkey shop\n", b".env")
    redactor.remember()
    assert redactor.data(b"the bluemonkey shop\n", b"notes.md") == b"the bluemonkey shop\n"


def test_a_program_called_like_an_env_file_is_judged_as_code(redactor: Redactor) -> None:
    text = b"export interface Env {\n  name: string;\n  kind: Thing;\n}\n"
    assert redactor.data(text, b"src/.env.ts") == text


def test_a_word_is_plain_whatever_its_case() -> None:
    assert is_plain(b"LEVEL", b"Debug")
    assert not is_plain(b"LEVEL", b"debugger-x")


HARMLESS = [
    ("lexer.js", "AZAAAAAgAAABIAAAACAAAAAQAAAAIAAACBzAAA"),
    ("wasm.js", "AEUNACABIAEoAhggAHI2AhgLIANB+IMLKAIAKAKIASIAIAFBASAAKAIAEAAA"),
    ("netrc.py", "login = account = password = None\n"),
    ("utils.py", "# Return with login / password\n                login_i = 0 if a else 1\n"),
    ("a.js", "getSetCookie: ()=>isHidden(name)?1:2,\n"),
    ("a.md", "the response has a `Set-Cookie: theme=dark; path=/home` header"),
    ("a.js.map", '["decrypt","getActionEncryptionKey","generateEncryptionKeyBase64","encryptionKey","stringToUint8Array"]'),
    ("a.js", "encryptionKey: 'process.env.NEXT_SERVER_ACTIONS_ENCRYPTION_KEY',"),
    ("p.min.js", "N.isTokenType=N.hasExtendingTokensTypesMapProperty1=N.hasExtending=void 0;"),
    ("a.md", "[Unicode tokens]: https://www.unicode.org/reports/tr35/tr35-dates.html#Date_Field_3"),
    ("client.py", "redis://[[username]:[password]]@localhost:6379/0\n"),
    ("npm.html", "git+ssh://[&lt;user&gt;[:&lt;password&gt;]@]&lt;host&gt;"),
    ("test.js", "'http://user:pass@mt0.google.com/vt' 'http://user:password@[::1]/'"),
    ("a.yml", "secrets:\n  - name: registry\n  - other\n"),
    ("a.json", '{"tokens": ["string", "number", "identifier"], "passwordRules": ["minlength"]}'),
    ("a.json", '{"kind": "Secret", "metadata": {"name": "x1y2"}}'),
    ("a.ts", "interface A { password?: string; token?: string | null }"),
    ("a.csv", "id,name,tokens_count\n1,bob,1234567\n"),
    ("nginx.conf", "ssl_certificate_key /etc/nginx/key.pem;\nauth_basic off;\n"),
    ("sshd.conf", "PasswordAuthentication no\nAuthorizedKeysFile .ssh/authorized_keys\n"),
    ("strings.xml", '<string name="password_hint">Your password</string>'),
    ("app.config", '<assemblyIdentity name="x" publicKeyToken="b77a5c561934e089"/>'),
    ("run.sh", "sort -u a b; diff -u a b; docker run -u 1000:1000 x; git push -u origin main; mysql -u root -p app"),
    ("run.sh", 'PASSWORD="${DB_PASSWORD:?must be set}"; X="${TOKEN:-}"\n'),
    ("a.js", "const key = `${user.token}-${this.password}`;"),
    ("x.log", "PASS: test_one2three\npassword: ******\ntokens: 1234567 in 12.5s\ntoken=/var/run/a1b2\n"),
    ("dump.sql", "INSERT INTO t (id, name) VALUES (1, 'bluemonkey7');\n"),
]


@pytest.mark.parametrize(("path", "text"), HARMLESS, ids=[f"{n}-{row[0]}" for n, row in enumerate(HARMLESS)])
def test_source_code_and_documents_are_left_as_they_are(redactor: Redactor, path: str, text: str) -> None:
    assert redactor.data(text.encode(), path.encode()).decode() == text
