"""Made-up secrets of every built-in rule, others for every place where they are planted, and the search for them in anything.

A canary that is found somewhere says by its label which rule missed it and where it was planted. They are put together at run time,
so that no scanner of this repository takes them for real.
"""

from __future__ import annotations

import base64
import json
import random
import string
from collections.abc import Iterable
from typing import NamedTuple

_ALNUM = string.ascii_letters + string.digits
_HEX = string.digits + "abcdef"
_LEAST = 8
_LONGEST_NAME = 200


class Canary(NamedTuple):
    """A secret as it stands in a text: `secrets` are what may appear nowhere; `word`: it is one word, told by its shape alone."""

    rule: str
    text: str
    secrets: tuple[str, ...]
    word: bool = False


class _Maker:
    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def of(self, size: int, alphabet: str = _ALNUM) -> str:
        text = "".join(self._random.choices(alphabet, k=size))
        return "7bK" + text[3:] if alphabet == _ALNUM else text

    def segment(self, text: str) -> str:
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")

    def key(self, kind: str) -> tuple[str, tuple[str, ...]]:
        lines = [self.of(64) for _ in range(12)]
        return f"-----BEGIN {kind}-----\n" + "\n".join(lines) + f"\n-----END {kind}-----", tuple(lines)


def canaries(seed: str) -> list[Canary]:
    """One canary or more of every rule that finds secrets by what they look like or stand beside; other ones for every `seed`."""
    make = _Maker(seed)
    return [*_tokens(make), *_in_context(make)]


def _tokens(make: _Maker) -> Iterable[Canary]:
    upper = string.ascii_uppercase + "234567"
    shapes = {
        "aws": ["AK" + "IA" + make.of(16, upper), "AS" + "IA" + make.of(16, upper)],
        "gcp": ["AI" + "za" + make.of(35), "ya" + "29." + make.of(40), "GOC" + "SPX-" + make.of(28)],
        "github": ["gh" + f"{kind}_" + make.of(36) for kind in "pousr"] + ["github" + "_pat_" + make.of(60)],
        "gitlab": ["gl" + "pat-" + make.of(20), "gl" + "rt-" + make.of(20), "GR13" + "48941" + make.of(20)],
        "slack": ["xox" + "b-" + make.of(10, string.digits) + "-" + make.of(24), "xa" + "pp-1-" + make.of(30)],
        "stripe": ["sk" + "_live_" + make.of(24), "wh" + "sec_" + make.of(32)],
        "anthropic": ["sk" + "-ant-" + "api03-" + make.of(60)],
        "openai": ["sk" + "-" + make.of(48), "sk" + "-proj-" + make.of(50)],
        "npm": ["np" + "m_" + make.of(36)],
        "pypi": ["py" + "pi-Ag" + make.of(80)],
        "age": ["AGE-" + "SECRET-KEY-1" + make.of(58, "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L")],
        "sendgrid": ["SG" + "." + make.of(22) + "." + make.of(43)],
        "huggingface": ["hf" + "_" + make.of(34)],
        "digitalocean": ["dop" + "_v1_" + make.of(64, _HEX)],
        "vault": ["hv" + "s." + make.of(60)],
        "grafana": ["gl" + "sa_" + make.of(32)],
        "shopify": ["shp" + "at_" + make.of(32, _HEX)],
        "docker-token": ["dckr" + "_pat_" + make.of(27)],
        "databricks": ["da" + "pi" + make.of(32, _HEX)],
        "linear": ["lin" + "_api_" + make.of(40)],
        "mailgun": ["ke" + "y-" + make.of(32, _HEX)],
    }
    for rule, tokens in shapes.items():
        for token in tokens:
            yield Canary(rule, token, (token,), word=True)
    signature = make.of(43)
    claims = [make.segment(json.dumps({"alg": "HS256"})), make.segment(json.dumps({"sub": make.of(20)}))]
    yield Canary("jwt", ".".join((*claims, signature)), (claims[1], signature), word=True)


def _in_context(make: _Maker) -> Iterable[Canary]:
    account, sas, hook, discord = make.of(86), make.of(44), make.of(24), make.of(68)
    yield Canary("azure", f"DefaultEndpointsProtocol=https;AccountName=x;Account{'Key'}={account}==;", (account,))
    yield Canary("azure", f"https://x.blob.core.windows.net/c?sv=2020&si{'g'}={sas}%3D&se=1", (sas,))
    yield Canary("slack", "https://hooks.slack." + f"com/services/T0AAAA111/B0AAAA111/{hook}", (hook,))
    yield Canary("discord", f"https://discord.com/api/webhooks/123456789012345678/{discord}", (discord,))
    telegram, bcrypt = "AA" + make.of(33), make.of(53)
    yield Canary("telegram", f"bot 123456789:{telegram} is up", (telegram,))
    yield Canary("password-hash", f"bob has $2b$12${bcrypt}", (bcrypt,))
    for kind in ("RSA PRIVATE KEY", "OPENSSH PRIVATE KEY", "PGP PRIVATE KEY BLOCK"):
        yield Canary("private-key", *make.key(kind))
    putty = [make.of(64) for _ in range(4)]
    yield Canary("private-key", "Private-Lines: 4\n" + "\n".join(putty), tuple(putty))
    bearer, basic, cookie, netrc, url, user = (make.of(32) for _ in range(6))
    yield Canary("authorization", f"Authorization: Bearer {bearer}", (bearer,))
    encoded = base64.b64encode(f"deploy:{basic}".encode()).decode()
    yield Canary("authorization", f"authorization: Basic {encoded}", (encoded, basic))
    yield Canary("cookie", f"Cookie: session={cookie}; theme=dark", (cookie,))
    yield Canary("netrc", f"machine api.example.com login bob password {netrc}", (netrc,))
    yield Canary("url", f"postgresql://app:{url}@db.internal:5432/x", (url,))
    yield Canary("url", f"https://{user}@github.com/o/r.git", (user,))
    password, secret, pair = make.of(20), make.of(40), make.of(24)
    yield Canary("password", f'db_password = "{password}"', (password,))
    yield Canary("secret", f"CLIENT_SECRET={secret}", (secret,))
    yield Canary("secret", json.dumps({"apiKey": pair}), (pair,))
    yield from _by_form(make)


def _by_form(make: _Maker) -> Iterable[Canary]:
    """What a command, a statement or the order of fields tells; one for each pattern of its own."""
    role, signed = "AB" + "IA" + make.of(16, string.ascii_uppercase + "234567"), make.of(64, _HEX)
    yield Canary("aws", f"role {role} is used", (role,))
    yield Canary("aws", f"https://b.s3.amazonaws.com/x?X-Amz-Signature={signed}&x=1", (signed,))
    pem, lines = make.key("RSA PRIVATE KEY")
    packed = base64.b64encode(pem.encode()).decode()
    yield Canary("private-key", f"tls.key: {packed}", (packed, *lines))
    for text in (
        'ALTER USER bob IDENTIFIED BY "{}"', "Server=x;User Id=sa;Pwd={};Timeout=3", "user=bob&password={}&next=1",
        "curl -s -u bob:{} https://x.example", "http -a bob:{} x.example", "mysql -uroot -p{} app", "sshpass -p {} ssh x",
        "docker login -u bob -p {}", "echo {} | docker login -u bob --password-stdin", "redis-cli -h x -a {} ping",
        "sqlcmd -S x -U sa -P {}", "openssl rsa -passin pass:{} -in x", 'ConvertTo-SecureString "{}" -AsPlainText',
    ):  # fmt: skip
        word = make.of(18)
        yield Canary("password", text.format(word), (word,))
    for before, behind in (("setx API_TOKEN ", ""), ('define("AUTH_SALT", "', '");'), ('x="${DB_PASSWORD:-', '}"')):
        word = make.of(18)
        yield Canary("secret", f"{before}{word}{behind}", (word,))
    turned = make.of(18)
    yield Canary("secret", json.dumps({"value": turned, "name": "API_SECRET"}), (turned,))
    crumb, exponent = make.of(18), make.of(43)
    yield Canary("cookie", json.dumps({"name": "Cookie", "value": f"sid={crumb}"}), (crumb,))
    yield Canary("secret", json.dumps({"kty": "EC", "d": exponent}), (exponent,))


def credential_files(seed: str) -> dict[str, tuple[str, list[Canary]]]:
    """Files whose purpose is to hold credentials: text, and the canaries in it; of the rules for such files as well."""
    make = _Maker(f"files {seed}")
    one, two, three, four, five, six, seven, eight, nine, ten = (make.of(24) for _ in range(10))
    basic = base64.b64encode(f"deploy:{seven}".encode()).decode()
    return {
        ".env": (
            f"DEBUG=true\nDB_PASSWORD={one}\nSTRANGE={two}\n",
            [Canary("password", "", (one,)), Canary("env", "", (two,))],
        ),
        ".env.local": (f"export API_TOKEN='{three}'\n", [Canary("secret", "", (three,))]),
        ".netrc": (f"machine example.com\n  login bob\n  password {four}\n", [Canary("netrc", "", (four,))]),
        ".npmrc": (f"//registry.npmjs.org/:_authToken={five}\n", [Canary("secret", "", (five,))]),
        ".pypirc": (f"[pypi]\nusername = bob\npassword = {six}\n", [Canary("password", "", (six,))]),
        ".docker/config.json": (json.dumps({"auths": {"https://r/": {"auth": basic}}}), [Canary("secret", "", (basic, seven))]),
        ".git-credentials": (f"https://deploy:{eight}@example.com\n", [Canary("url", "", (eight,))]),
        ".aws/credentials": (f"[default]\naws_secret_access_key = {nine}\n", [Canary("secret", "", (nine,))]),
        ".gitmodules": (f'[submodule "x"]\n\turl = https://oauth2:{ten}@gitlab.com/x.git\n', [Canary("url", "", (ten,))]),
    }


def long_name(seed: str) -> Canary:
    """A file's name that would be too long with a pseudonym for each of its secrets, and gets one for all of it."""
    make = _Maker(f"name {seed}")
    keys = ["AK" + "IA" + make.of(16, string.ascii_uppercase + "234567") for _ in range(12)]
    return Canary("name", ".".join(keys), tuple(keys))


def fit_for_a_name(canary: Canary) -> bool:
    """True for a canary that can be a file's name."""
    return "/" not in canary.text and "\n" not in canary.text and len(canary.text) <= _LONGEST_NAME


class Search:
    """Every planted secret, and where they stand in bytes: as they are, in UTF-16, in base64 at every alignment, in hex."""

    def __init__(self) -> None:
        self._labels: dict[bytes, str] = {}
        self._finder: object = None

    def plant(self, place: str, found: Iterable[Canary]) -> None:
        """Note that the secrets of `found` stand in `place`."""
        for canary in found:
            for secret in canary.secrets:
                assert len(secret) >= _LEAST, (canary.rule, place)
                for form, data in _forms(secret.encode()):
                    assert data not in self._labels, f"{canary.rule} of {place} is no secret of its own"
                    self._labels[data] = f"{canary.rule} ({form}) planted in {place}"
        self._finder = None

    def rules(self) -> set[str]:
        """The rules of everything planted."""
        return {label.partition(" ")[0] for label in self._labels.values()}

    def has(self, place: str, data: bytes) -> bool:
        """Whether something that was planted in `place` stands in `data`: as `within` says it, but quick where all of it does."""
        return any(secret in data for secret, label in self._labels.items() if label.endswith(f" planted in {place}"))

    def within(self, data: bytes) -> list[str]:
        """The labels of what stands in `data`."""
        import re2

        if self._finder is None:
            options = re2.Options()
            options.encoding = re2.Options.Encoding.LATIN1
            options.never_capture = True
            options.max_mem = 1 << 30
            self._finder = re2.compile(b"|".join(re2.escape(each) for each in self._labels), options)
        finder = self._finder
        return sorted({self._labels[found.group()] for found in finder.finditer(data)})  # type: ignore[attr-defined]


def _forms(secret: bytes) -> Iterable[tuple[str, bytes]]:
    yield "as it is", secret
    text = secret.decode()
    yield "utf-16 little", text.encode("utf-16-le")
    yield "utf-16 big", text.encode("utf-16-be")
    yield "hex", secret.hex().encode()
    for shift in range(3):
        encoded = base64.b64encode(b"\0" * shift + secret)
        # The first and the last characters depend on what stands around it.
        yield f"base64 {shift}", encoded[(0, 2, 3)[shift] : len(encoded) // 4 * 4 - 4]
