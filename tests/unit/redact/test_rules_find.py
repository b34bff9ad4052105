"""Every built-in rule finds its canary wherever it stands, and what is no secret stays."""

from __future__ import annotations

import pytest

from mothball.redact import Redactor, Rules, mask
from tests.unit.redact.canaries import SHAPED, TOKENS, UUID, digest

PLACES = {
    "alone": "{}",
    "sentence": "the token is {}, do not tell",
    "json": '{{"x": "{}"}}',
    "escaped": '{{\\"x\\": \\"{}\\"}}',
    "url": "https://x/y?a={}&b=1",
    "query": "q%3D{}%26",
    "log": "2026-01-01T00:00:00Z level=info msg=got:{};",
    "argument": "tool --x={} -v",
    "markup": "<x>{}</x>",
    "telling": "password = {}\n",
    "telling quoted": "secret_token.value = '{}'\n",
    "prefixed": "my_token_{}=",
}


@pytest.fixture
def redactor() -> Redactor:
    return Redactor(b"k" * 32, Rules.default())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("rule", "token"), [(rule, token) for rule, tokens in TOKENS.items() for token in tokens], ids=lambda v: v[:9]
)
def test_a_token_is_found_by_its_shape_wherever_it_stands(redactor: Redactor, rule: str, token: str, place: str) -> None:
    text = PLACES[place].format(token)
    out = redactor.text(text)
    assert token not in out
    assert token[8:] not in out
    assert f"[redacted:{rule}:" in out
    assert redactor.text(out) == out
    assert token not in mask(text)


@pytest.mark.parametrize(("what", "name", "text", "gone"), SHAPED, ids=[f"{row[0]}-{digest(row[2])}" for row in SHAPED])
def test_a_secret_is_found_by_what_stands_beside_it(redactor: Redactor, what: str, name: str, text: str, gone: list[str]) -> None:
    assert all(part in text.replace('\\n"\n     "', "\n") for part in gone)
    out = redactor.data(text.encode(), name.encode()).decode()
    assert [part for part in gone if part in out] == []
    assert redactor.data(out.encode(), name.encode()).decode() == out
    assert redactor.counts.total() > 0


HARMLESS = [
    "token = get_token()",
    "password: str",
    "password: str | None = None",
    "def login(user, password, token): ...",
    "self.password = password",
    "token = self.tokens[index]",
    "const token = await auth.getToken();",
    "password = os.environ['DB_PASSWORD']",
    "apiKey: process.env.API_KEY,",
    "SECRET_KEY=${SECRET_KEY}",
    "password: {{ vault_password }}",
    "token: $TOKEN",
    "password=<your password>",
    "if token == NEWLINE:",
    "max_tokens = 4096",
    "token_type: Bearer",
    "tokens, rest = tokenize(text)",
    '"ssh2_auth_none", "ssh2_auth_password", "crypto_pwhash_str"',
    "https://registry.npmjs.org/@babel/core/-/core-7.1.tgz",
    "https://localhost:8080/@vite/client",
    "git@github.com:owner/repo.git",
    "ssh://git@github.com/owner/repo.git",
    "see https://example.com/a:b@c for the basic usage of bearer tokens",
    "-----BEGIN PRIVATE KEY----- is how a key begins",
    "sk-learn-is-a-library-for-machine-learning",
    "password_field: user-password",
    "token_url = https://example.com/oauth/token",
    "secretName: my-app-secret",
    "PASSWORD_FILE=/run/secrets/db_password",
    "eyJust.some.text",
    f"id = {UUID}",
]


@pytest.mark.parametrize("text", HARMLESS, ids=range(len(HARMLESS)))
def test_what_is_no_secret_stays(redactor: Redactor, text: str) -> None:
    assert redactor.data(text.encode(), b"module.py") == text.encode()
    assert redactor.counts.total() == 0
