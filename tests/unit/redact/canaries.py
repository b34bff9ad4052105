"""Made-up secrets of every built-in rule, put together at run time so that no scanner of this repository takes them for real."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import string

_ALNUM = string.ascii_letters + string.digits


def random_text(size: int, alphabet: str = _ALNUM, seed: object = 0) -> str:
    """`size` characters of `alphabet`, the same for the same seed; the first three hold a digit and both cases."""
    source = random.Random(repr((size, alphabet, seed)))
    text = "".join(source.choice(alphabet) for _ in range(size))
    return text if alphabet != _ALNUM else "7bK" + text[3:]


def _hex(size: int) -> str:
    return random_text(size, string.digits + "abcdef")


def _segment(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def jwt() -> str:
    return f"{_segment(json.dumps({'alg': 'HS256'}))}.{_segment(json.dumps({'sub': '12345'}))}.{random_text(43)}"


def private_key(kind: str = "RSA PRIVATE KEY", lines: int = 12) -> str:
    body = "\n".join(random_text(64, _ALNUM + "+/", n) for n in range(lines))
    return f"-----BEGIN {kind}-----\n{body}\n{random_text(20)}==\n-----END {kind}-----"


TOKENS: dict[str, list[str]] = {
    "aws": ["AK" + "IA" + random_text(16, string.ascii_uppercase + "234567"), "AS" + "IA" + random_text(16, "ABCDEFGH234567")],
    "gcp": ["AI" + "za" + random_text(35), "ya" + "29." + random_text(60), "GOC" + "SPX-" + random_text(28)],
    "github": [f"gh{kind}" + "_" + random_text(36) for kind in "pousr"] + ["github" + "_pat_" + random_text(82)],
    "gitlab": ["gl" + "pat-" + random_text(20), "gl" + "dt-" + random_text(20), "GR13" + "48941" + random_text(20)],
    "slack": ["xox" + "b-" + "1234567890-" + random_text(24), "xa" + "pp-1-" + random_text(30)],
    "stripe": ["sk" + "_live_" + random_text(24), "rk" + "_test_" + random_text(24), "wh" + "sec_" + random_text(32)],
    "openai": ["sk" + "-" + random_text(48), "sk" + "-proj-" + random_text(60)],
    "anthropic": ["sk" + "-ant-" + "api03-" + random_text(80)],
    "npm": ["np" + "m_" + random_text(36)],
    "pypi": ["py" + "pi-" + "AgEIcHlwaS5vcmc" + random_text(100)],
    "age": ["AGE-" + "SECRET-KEY-1" + random_text(58, "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L")],
    "jwt": [jwt()],
    "sendgrid": ["SG" + "." + random_text(22) + "." + random_text(43)],
    "huggingface": ["hf" + "_" + random_text(34)],
    "digitalocean": ["dop" + "_v1_" + _hex(64)],
    "vault": ["hv" + "s." + random_text(90)],
    "grafana": ["gl" + "sa_" + random_text(32)],
    "shopify": ["shp" + "at_" + _hex(32)],
    "docker-token": ["dckr" + "_pat_" + random_text(27)],
    "databricks": ["da" + "pi" + _hex(32)],
    "linear": ["lin" + "_api_" + random_text(40)],
    "mailgun": ["ke" + "y-" + _hex(32)],
}
"""Tokens whose shape alone tells."""

PASSWORD = "Tr0ub4" + "dor-Xq9v"
WEAK = "hunter2" + "x9"
SECRET = random_text(40, _ALNUM + "+/")
UUID = "-".join((_hex(8), _hex(4), _hex(4), _hex(4), _hex(12)))
BASIC = base64.b64encode(f"deploy:{PASSWORD}".encode()).decode()

_KEY = private_key()
_ARMOR = "-----BEGIN PGP PRIVATE KEY BLOCK-----\nVersion: GnuPG v2\n\n" + "\n".join(
    random_text(64, _ALNUM + "+/", n) for n in range(9)
)
_SSH = private_key("OPENSSH PRIVATE KEY")


def body(key: str) -> list[str]:
    """The lines of a key that must not survive."""
    return [line for line in key.splitlines() if not line.startswith("-----") and ":" not in line and len(line) > 16]


SHAPED: list[tuple[str, str, str, list[str]]] = [
    ("aws", "", f"aws_secret_access_key = {SECRET}\n", [SECRET]),
    (
        "azure",
        "",
        f"DefaultEndpointsProtocol=https;AccountName=x;Account{'Key'}={random_text(86)}==;EndpointSuffix=c\n",
        [random_text(86)],
    ),
    ("azure", "", f"https://x.blob.core.windows.net/c?sv=2020&si{'g'}={random_text(44)}%3D&se=1\n", [random_text(44)]),
    ("slack", "", "https://hooks.slack." + f"com/services/T0AAAA111/B0AAAA111/{random_text(24)}\n", [random_text(24)]),
    ("discord", "", f"https://discord.com/api/webhooks/123456789012345678/{random_text(68)}\n", [random_text(68)]),
    ("private-key", "", _KEY, body(_KEY)),
    ("private-key", "", _SSH, body(_SSH)),
    ("private-key", "", _ARMOR + "\n", body(_ARMOR)),
    ("private-key", "", '{"private_key": "' + _KEY.replace("\n", "\\n") + '\\n"}', body(_KEY)),
    ("private-key", "", 'k = ("' + _KEY.replace("\n", '\\n"\n     "') + '")', body(_KEY)),
    ("private-key", "", "\n".join(_KEY.splitlines()[:8]) + "\n", body("\n".join(_KEY.splitlines()[:8]))),
    ("private-key", "", "\n".join(_KEY.splitlines()[4:]) + "\n", body("\n".join(_KEY.splitlines()[4:]))),
    ("url", "", f"postgresql://app:{PASSWORD}@db.internal:5432/x", [PASSWORD]),
    ("url", "", f"https://{random_text(40)}@github.com/o/r.git", [random_text(40)]),
    ("url", "", f"https://{random_text(40)}:x-oauth-basic@github.com/o/r.git", [random_text(40)]),
    ("url", "", f"https://x-access-token:{SECRET.replace('/', '_')}@github.com/o/r", [SECRET.replace("/", "_")]),
    ("url", "", f"redis://:{WEAK}@127.0.0.1:6379/0", [WEAK]),
    ("url", "", f"amqp://u:{WEAK}/{WEAK}@mq//", [WEAK]),
    ("url", ".git/config", f'[remote "origin"]\n\turl = https://oauth2:{WEAK}@gitlab.com/x.git\n', [WEAK]),
    ("git header", ".git/config", f'[http "https://github.com/"]\n\textraheader = AUTHORIZATION: basic {BASIC}\n', [BASIC]),
    ("git password", ".git/config", f"[credential]\n\tusername = x\n\tpassword = {WEAK}\n", [WEAK]),
    ("git-credentials", ".git-credentials", f"https://deploy:{WEAK}@example.com\n", [WEAK]),
    ("authorization", "", f"Authorization: Bearer {random_text(32)}\r\n", [random_text(32)]),
    ("authorization", "", f"authorization: Basic {BASIC}\r\n", [BASIC]),
    ("authorization", "", f'curl -H "Authorization: token {random_text(40)}" https://x', [random_text(40)]),
    ("authorization", "", f"headers = {{'Authorization': 'Bearer {random_text(24)}'}}", [random_text(24)]),
    ("header", "", f"X-Api-Key: {random_text(32)}\n", [random_text(32)]),
    ("header", "", f"PRIVATE-TOKEN: {random_text(20)}\n", [random_text(20)]),
    ("cookie", "", f"Cookie: session={random_text(20)}; theme=dark\r\nHost: x\r\n", [random_text(20)]),
    ("cookie", "", f"Set-Cookie: sid={random_text(20)}; HttpOnly\r\n", [random_text(20)]),
    ("netrc", ".netrc", f"machine api.example.com\n  login bob\n  password {WEAK}\n", [WEAK]),
    ("netrc", "", f"machine api.example.com login bob password {WEAK}\n", [WEAK]),
    ("netrc", ".netrc", "default login anonymous password correcthorse\n", ["correcthorse"]),
    ("npmrc", ".npmrc", f"//registry.npmjs.org/:_authToken={UUID}\n", [UUID]),
    ("npmrc", ".npmrc", f"_auth={BASIC}\n//r/:_password={base64.b64encode(WEAK.encode()).decode()}\n", [BASIC]),
    ("pypirc", ".pypirc", f"[pypi]\nusername = bob\npassword = {WEAK}\n", [WEAK]),
    ("docker", ".docker/config.json", f'{{"auths": {{"https://index.docker.io/v1/": {{"auth": "{BASIC}"}}}}}}', [BASIC]),
    ("env", ".env", "DB_PASSWORD=correcthorse\nexport API_TOKEN='abc123'\n", ["correcthorse", "abc123"]),
    ("env", ".env.local", 'SECRET_KEY_BASE="with spaces & #signs"\n', ["with spaces", "signs"]),
    ("env", ".env", f"STRANGE={SECRET}\n", [SECRET]),
    ("env", ".env", "APP_PASSWORD=p@ss wo;rd'quote\n", ["wo;rd", "quote"]),
    ("password", "", f'password = "{WEAK}"\n', [WEAK]),
    ("password", "", 'password = "ab\\"' + WEAK + '"', [WEAK]),
    ("password", "", f'password = "{WEAK * 80}\'{WEAK}"', [WEAK]),
    ("password", "", f"db_password: '{WEAK}'\n", [WEAK]),
    ("password", "", f'{{"password": "{WEAK}"}}', [WEAK]),
    ("password", "", f'{{\\"password\\": \\"{WEAK}\\"}}', [WEAK]),
    ("password", "", f'"password":\n    "{WEAK}"', [WEAK]),
    ("password", "", f'password: str = "{WEAK}"\n', [WEAK]),
    ("password", "", f'final String dbPassword = "{WEAK}";', [WEAK]),
    ("password", "", f":password => '{WEAK}',", [WEAK]),
    ("password", "", f"<password>{PASSWORD}</password>", [PASSWORD]),
    ("password", "", f"define('DB_PASSWORD', '{PASSWORD}');", [PASSWORD]),
    ("password", "", f"Server=x;User Id=y;Password={PASSWORD};", [PASSWORD]),
    ("password", "", f"mysql --password={PASSWORD} -h x", [PASSWORD]),
    ("password", "", f"tool --db-password {PASSWORD} run", [PASSWORD]),
    ("password", "", f"PGPASSWORD={PASSWORD} psql", [PASSWORD]),
    ("password", "app.ini", "[db]\npassword = correcthorse\n", ["correcthorse"]),
    ("password", "config.yml", "password: correcthorse\n", ["correcthorse"]),
    ("password", "config.yml", f"password: >-\n  {PASSWORD}\n", [PASSWORD]),
    ("secret", "", f'client_secret: "{random_text(24)}"', [random_text(24)]),
    ("secret", "", f'API_KEY = "{_hex(32)}"', [_hex(32)]),
    ("secret", "", f"apiKey: '{random_text(20)}',", [random_text(20)]),
    ("secret", "", f'os.environ["SERVICE_TOKEN"] = "{random_text(20)}"', [random_text(20)]),
    ("secret", "", f"GET /x?access_token={random_text(24)}&y=1", [random_text(24)]),
    ("secret", "", f"next=%2Fx%3Faccess_token%3D{random_text(24)}", [random_text(24)]),
    ("secret", "Dockerfile", f"ENV AUTH_TOKEN {random_text(24)}\n", [random_text(24)]),
    ("secret", "", f'  - name: AUTH_TOKEN\n    value: "{random_text(24)}"\n', [random_text(24)]),
    ("secret", "", f'{{"name": "AUTH_TOKEN", "value": "{random_text(24)}"}}', [random_text(24)]),
    ("secret", "main.tfvars", 'api_token = "abcdefghij"\n', ["abcdefghij"]),
    ("secret", "", f"&quot;token&quot;: &quot;{random_text(24)}&quot;", [random_text(24)]),
]
"""``(what, name of the file, text, the parts that must be gone)``."""


def digest(text: str) -> str:
    """A short name for test ids."""
    return hashlib.sha256(text.encode()).hexdigest()[:6]
