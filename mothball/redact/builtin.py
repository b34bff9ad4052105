"""The built-in rules: the shapes of known tokens, and the words that make a name telling.

Each rule begins at one of its keywords, so one RE2 pass over all keywords finds every place where one can apply, and the rule's own
pattern is then matched there, anchored and bounded: hostile text cannot make that slow.
"""

from __future__ import annotations

import base64
import binascii
import re

from mothball.redact.judge import entropy, harmless, is_strong
from mothball.redact.rules import Rule

VERSION = 2
"""Grows when the rules change: reports say which set redacted them."""

_MIXED = re.compile(rb"(?=.*[0-9])(?=.*[A-Za-z])", re.DOTALL)


def _mixed(value: bytes) -> bool:
    """Letters and digits, as machines make tokens: ``sk-learn-with-pipelines-and-more`` is none."""
    return _MIXED.match(value[:512]) is not None


def _bearer(value: bytes) -> bool:
    """What stands behind ``Bearer`` or ``Basic``, when it is no word of a sentence."""
    return is_strong(value) or _is_basic(value) or (len(value) >= 16 and _mixed(value) and b"//" not in value)  # noqa: PLR2004


def _no_placeholder(value: bytes) -> bool:
    return not harmless(value) and not value.startswith((b"$", b"{", b"<", b"%", b"[", b"`"))


def _chosen(value: bytes) -> bool:
    """A password as somebody chose it, where a word may stand as well: with a digit."""
    return len(value) >= 6 and _no_placeholder(value) and re.search(rb"[0-9]", value) is not None  # noqa: PLR2004


def _user_password(value: bytes) -> bool:
    """Behind ``curl -u user:``; ``-u 1000:1000`` names a user and a group."""
    return _no_placeholder(value) and not value.isdigit()


def _said(value: bytes) -> bool:
    """``login = account = password = None`` and ``login / password`` are sentences and programs; ``machine`` leaves no doubt."""
    return b"[redacted:" in value or (_no_placeholder(value) and not re.match(rb"[=,)/]|[A-Za-z_.]*\Z", value))


_ATTRIBUTES = frozenset((b"expires", b"max-age", b"domain", b"path", b"samesite", b"priority", b"version", b"comment"))


def _session(value: bytes) -> bool:
    """A cookie, or several, of which one may tell who somebody is: ``theme=dark`` is none."""
    for part in value[:4096].split(b";"):
        name, _, told = part.strip().partition(b"=")
        if (
            name.lower() not in _ATTRIBUTES
            and len(told) >= 8  # noqa: PLR2004
            and re.search(rb"[0-9]", told)
            and not told.startswith((b">", b"$", b"{"))
        ):
            return True
    return b"[redacted:" in value


def _diverse(value: bytes) -> bool:
    """``AKIASIAIAFBASAAKAIAE`` is a program in base64: its letters repeat."""
    return entropy(value[4:]) >= 2.5  # noqa: PLR2004 - bits a letter; of 200 000 random ones none had less


def _key_in_base64(value: bytes) -> bool:
    return b"PRIVATE KEY" in base64.b64decode(value[:96])


def _is_basic(value: bytes) -> bool:
    """Base64 of ``user:password``."""
    try:
        plain = base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except (binascii.Error, ValueError):
        return False
    return len(value) >= 8 and b":" in plain and all(32 <= byte < 127 for byte in plain)  # noqa: PLR2004


RULES: tuple[Rule, ...] = (
    Rule("aws", rb"(?:AKIA|ASIA)[A-Z2-7]{16}", (b"AKIA", b"ASIA"), check=_diverse),
    # Zeros in base64 read ``ABIAAAACAAAA...``: these begin nothing longer.
    Rule("aws", rb"((?:ABIA|ACCA|AROA|AIDA)[A-Z2-7]{16})(?:[^0-9A-Za-z+/=]|\z)", (b"ABIA", b"ACCA", b"AROA", b"AIDA")),
    Rule("gcp", rb"AIza[0-9A-Za-z_-]{35}|ya29\.[0-9A-Za-z_-]{20,}|GOCSPX-[0-9A-Za-z_-]{20,}", (b"AIza", b"ya29.", b"GOCSPX-")),
    Rule(
        "azure",
        rb"(?i)AccountKey=([0-9a-z+/]{40,}={0,2})|SharedAccessKey=([0-9a-z+/]{40,}={0,2})",
        (b"AccountKey=", b"SharedAccessKey="),
    ),
    Rule("azure", rb"[?&;]sig=([0-9A-Za-z%+/]{40,}(?:%3[Dd]|=)?)", (b"?sig=", b"&sig=", b";sig=")),
    Rule(
        "github",
        rb"gh[pousr]_[0-9A-Za-z]{20,}|github_pat_[0-9A-Za-z_]{22,}",
        (b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_", b"github_pat_"),
    ),
    Rule(
        "gitlab",
        rb"gl(?:pat|dt|rt|cbt|ptt|ft|imt|agent|oas|soat|ffct)-[0-9A-Za-z_.-]{20,}|GR1348941[0-9A-Za-z_-]{20,}",
        (
            b"glpat-",
            b"gldt-",
            b"glrt-",
            b"glcbt-",
            b"glptt-",
            b"glft-",
            b"glimt-",
            b"glagent-",
            b"gloas-",
            b"glsoat-",
            b"glffct-",
            b"GR1348941",
        ),
    ),
    Rule(
        "slack", rb"xox[abeoprs]-[0-9A-Za-z-]{10,}|xapp-[0-9]-[0-9A-Za-z-]{10,}", (*(b"xox%c-" % c for c in b"abeoprs"), b"xapp-")
    ),
    Rule("slack", rb"hooks\.slack\.com/(?:services|workflows|triggers)/([0-9A-Za-z+/_-]{20,})", (b"hooks.slack.com/",)),
    Rule("discord", rb"/api/webhooks/([0-9]{15,20}/[0-9A-Za-z_-]{40,})", (b"/api/webhooks/",)),
    Rule(
        "stripe",
        rb"[srp]k_(?:live|test)_[0-9A-Za-z]{10,}|whsec_[0-9A-Za-z+/=]{24,}",
        (b"sk_live_", b"sk_test_", b"rk_live_", b"rk_test_", b"pk_live_", b"pk_test_", b"whsec_"),
    ),
    Rule("anthropic", rb"sk-ant-[0-9A-Za-z_-]{20,}", (b"sk-ant-",)),
    Rule("openai", rb"sk-[0-9A-Za-z_-]{20,}", (b"sk-",), check=_mixed),
    Rule("npm", rb"npm_[0-9A-Za-z]{30,}", (b"npm_",)),
    Rule("pypi", rb"pypi-Ag[0-9A-Za-z_-]{40,}", (b"pypi-Ag",)),
    Rule("age", rb"(?i)AGE-SECRET-KEY-(?:PQ-)?1[0-9a-z]{50,}", (b"AGE-SECRET-KEY-", b"age-secret-key-")),
    Rule("jwt", rb"eyJ[0-9A-Za-z_-]{8,1000}\.[0-9A-Za-z_-]{8,}(?:\.[0-9A-Za-z_-]*){0,3}", (b"eyJ",)),
    Rule("sendgrid", rb"SG\.[0-9A-Za-z_-]{16,32}\.[0-9A-Za-z_-]{16,64}", (b"SG.",)),
    Rule("huggingface", rb"hf_[0-9A-Za-z]{30,}", (b"hf_",)),
    Rule("digitalocean", rb"do[opr]_v1_[0-9a-f]{64}", (b"doo_v1_", b"dop_v1_", b"dor_v1_")),
    Rule("vault", rb"hv[sbr]\.[0-9A-Za-z_-]{20,}", (b"hvs.", b"hvb.", b"hvr.")),
    Rule("grafana", rb"gl(?:sa|c)_[0-9A-Za-z+/=_-]{20,}", (b"glsa_", b"glc_")),
    Rule("shopify", rb"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}", (b"shpat_", b"shpca_", b"shppa_", b"shpss_")),
    Rule("docker-token", rb"dckr_(?:pat|oat)_[0-9A-Za-z_-]{20,}", (b"dckr_pat_", b"dckr_oat_")),
    Rule("databricks", rb"dapi[0-9a-f]{32}", (b"dapi",)),
    Rule("linear", rb"lin_(?:api|oauth)_[0-9A-Za-z]{30,}", (b"lin_api_", b"lin_oauth_")),
    Rule(
        "private-key",
        rb"Private-Lines: [0-9]{1,3}(?:\r?\n|(?:\\{1,8}[rn])+)((?:[0-9A-Za-z+/=]+(?:\r?\n|(?:\\{1,8}[rn])+)?)+)",
        (b"Private-Lines: ",),
    ),
    Rule(
        "authorization",
        rb"(?i)(?:bearer|basic)(?:[ \t]|%20)+([0-9a-z+/=_.~:-]{8,})",
        (b"bearer", b"Bearer", b"BEARER", b"basic ", b"Basic ", b"BASIC "),
        check=_bearer,
    ),
    Rule(
        "netrc",
        rb"machine[ \t\r\n]+[^ \t\r\n]{1,256}[ \t\r\n]+login[ \t\r\n]+[^ \t\r\n]{1,256}[ \t\r\n]+password[ \t\r\n]+"
        rb"(\[redacted:[a-z0-9:-]{1,48}\]|(?:[^ \t\r\n\\]|\\{1,8}[^nrt\\ \t\r\n])+)",
        (b"machine ", b"machine\t"),
    ),
    Rule(
        "netrc",
        rb"login[ \t\r\n]+[^ \t\r\n]{1,256}[ \t\r\n]+(?:account[ \t\r\n]+[^ \t\r\n]+[ \t\r\n]+)?password[ \t\r\n]+"
        # Up to an escaped line end: in JSON the rest of the text is behind it. What stands for a password already is all of it.
        rb"(\[redacted:[a-z0-9:-]{1,48}\]|(?:[^ \t\r\n\\]|\\{1,8}[^nrt\\ \t\r\n])+)",
        (b"login ", b"login\t", b"login\n", b"login\r"),
        check=_said,
    ),
    Rule("private-key", rb"LS0tLS1CRUdJTi[0-9A-Za-z+/]{82,}={0,2}", (b"LS0tLS1CRUdJTi",), check=_key_in_base64),
    Rule("aws", rb"X-Amz-Signature=([0-9a-f]{64})", (b"X-Amz-Signature=",)),
    Rule("telegram", rb":(AA[0-9A-Za-z_-]{33})(?:[^0-9A-Za-z_-]|\z)", (b":AA",), check=_mixed),
    Rule("mailgun", rb"key-[0-9a-f]{32,}", (b"key-",)),
    Rule(
        "password-hash",
        rb"\$2[abxy]\$[0-9]{2}\$[./0-9A-Za-z]{53}|\$apr1\$[^$\s]{1,8}\$[./0-9A-Za-z]{22}|"
        rb"\$[156y]\$(?:[^$\s]{1,32}\$){1,2}[./0-9A-Za-z]{22,86}|\$argon2(?:id|i|d)\$(?:[^$\s]{1,64}\$){2,3}[0-9A-Za-z+/]{16,}|"
        rb"\{SS?HA[0-9]{0,3}\}[0-9A-Za-z+/]{24,}={0,2}",
        (*(b"$2%c$" % c for c in b"abxy"), b"$apr1$", b"$1$", b"$5$", b"$6$", b"$y$", b"$argon2", b"{SSHA", b"{SHA"),
    ),
    # What a database is told.
    Rule(
        "password",
        rb"(?i)(?:identified|password)[ \t]*(?:with[ \t]+\S{1,64}[ \t]+)?(?:by|as|\()?[ \t]*(?:password[ \t]*)?"
        rb"N?(?:'([^'\r\n]+)'|\\{0,8}\"([^\"\\\r\n]+)\\{0,8}\")",
        (b"IDENTIFIED ", b"identified ", b"Identified ", b"PASSWORD '", b"password '", b"PASSWORD('", b"PASSWORD N'"),
        check=_chosen,
    ),
    Rule(
        "password",
        rb"(?i);[ ]?(?:pwd|password)=([^;\"'\s<>&\\]+)",
        (b";Pwd=", b";PWD=", b";pwd=", b"; Pwd=", b";Password=", b"; Password="),
        check=_no_placeholder,
    ),
    Rule(
        "password",
        rb"[?&](?:passw(?:or)?d|pwd|pass|client_secret)=([^&\s\"'<>#\\+]+)",
        (*(mark + word + b"=" for mark in (b"&", b"?") for word in (b"password", b"passwd", b"pwd", b"pass", b"client_secret")),),
        check=_chosen,
    ),
    # Command lines: the option that holds a password is known by its tool alone.
    Rule(
        "password",
        rb"curl[ \t](?:(?:[^\r\n|;&]|\\\r?\n){0,400}[ \t])?(?:-u|--user|--proxy-user)[ \t=]*[\"']?[^\s:\"']{1,128}:([^\s\"']+)",
        (b"curl ",),
        check=_user_password,
    ),
    Rule(
        "password",
        rb"(?:http|https|xh)[ \t](?:[^\r\n|;&]{0,200}[ \t])?(?:-a|--auth)[ \t=]*[\"']?[^\s:\"']{1,128}:([^\s\"']+)",
        (b"http -", b"https -", b"xh -"),
        check=_user_password,
    ),
    Rule(
        "password",
        rb"(?:mysql|mariadb)[\w-]{0,16}[ \t](?:[^\r\n|;&]{0,300}[ \t])?-p(?:\"([^\"\r\n]+)\"|'([^'\r\n]+)'|([^\s\"'-][^\s\"']*))",
        (b"mysql", b"mariadb"),
        check=_no_placeholder,
    ),
    Rule(
        "password",
        rb"sshpass[ \t]+-p[ \t]*(?:\\{0,8}\"([^\"\\\r\n]+)\\{0,8}\"|'([^'\r\n]+)'|([^\s\"'\\]+))",
        (b"sshpass ",),
        check=_no_placeholder,
    ),
    Rule(
        "password",
        rb"login[ \t](?:[^\r\n|;&]{0,200}[ \t])?-p[ \t]*(?:\\{0,8}\"([^\"\\\r\n]+)\\{0,8}\"|'([^'\r\n]+)'|([^\s\"'\\]+))",
        (b"login ",),
        check=_chosen,
    ),
    Rule(
        "password",
        rb"echo[ \t]+(?:-n[ \t]+)?[\"']?([^\s\"'|]+)[\"']?[ \t]*\|[^\r\n]{0,200}--password-stdin",
        (b"echo ",),
        check=_no_placeholder,
    ),
    Rule(
        "password",
        rb"redis-cli[ \t](?:[^\r\n|;&]{0,200}[ \t])?-a[ \t]*\\{0,8}[\"']?((?:[^\s\"'\\]|\\{1,2}[^\"'\\nrt\s])+)",
        (b"redis-cli ",),
        check=_no_placeholder,
    ),
    Rule(
        "password",
        rb"sqlcmd[ \t](?:[^\r\n|;&]{0,200}[ \t])?-P[ \t]*\\{0,8}[\"']?((?:[^\s\"'\\]|\\{1,2}[^\"'\\nrt\s])+)",
        (b"sqlcmd ",),
        check=_no_placeholder,
    ),
    Rule("password", rb"-pass(?:in|out)?[ \t]+pass:([^\s\"']+)", (b"-pass ", b"-passin ", b"-passout "), check=_no_placeholder),
    Rule(
        "password",
        rb"(?i)ConvertTo-SecureString[ \t]+(?:-String[ \t]+)?\\{0,8}[\"']([^\"'\\\r\n]+)\\{0,8}[\"']",
        (b"ConvertTo-SecureString ",),
        check=_no_placeholder,
    ),
    Rule(
        "secret",
        rb"(?i)(?:setx[ \t]+|set[ \t]+-[a-z]{1,4}[ \t]+)"
        rb"\w*(?:TOKEN|SECRET|PASSW|KEY)\w*[ \t]+\\{0,8}[\"']?((?:[^\s\"'\\]|\\{1,2}[^\"'\\nrt\s])+)",
        (b"setx ", b"set -"),
        check=_chosen,
    ),
    Rule(
        "secret",
        rb"(?i)define\([ \t]*[\"']\w*(?:PASSW|SECRET|TOKEN|_KEY|_SALT)\w*[\"'][ \t]*,[ \t]*\\{0,8}[\"']([^\"'\\\r\n]+)\\{0,8}[\"']",
        (b"define(",),
        check=_chosen,
    ),
    Rule(
        "secret", rb"\$\{(?i:[\w.]*(?:PASS|SECRET|TOKEN|KEY|PWD)[\w.]*):[-=]?([^}\s\"'$?+:-][^}\s\"'$]*)\}", (b"${",), check=_chosen
    ),
    # JSON whose order is not that of `name`, `value`, and the private parts of a key; also where it is escaped once more.
    Rule(
        "secret",
        rb'"?value\\{0,8}"\s*:\s*(?:"((?:[^"\\\r\n]|\\.)+)"|\\{1,8}"([^"\\\r\n]+)\\{1,8}")\s*,\s*\\{0,8}"(?:name|key)\\{0,8}"\s*:\s*'
        rb'\\{0,8}"[^"]{0,64}(?i:passw|secret|token|api[_-]?key|credential|cookie|authorization)',
        (b'"value":', b'value\\":', b'value\\\\\\":'),
        check=_no_placeholder,
    ),
    Rule(
        "cookie",
        rb'"?(?i:set-)?(?i:cookie)\\{0,8}"\s*,\s*\\{0,8}"value\\{0,8}"\s*:\s*(?:"((?:[^"\\\r\n]|\\.)+)"|\\{1,8}"([^"\\\r\n]+)\\{1,8}")',
        (
            b'"Cookie"',
            b'"cookie"',
            b'"Set-Cookie"',
            b'"set-cookie"',
            b'Cookie\\"',
            b'cookie\\"',
            b'Cookie\\\\\\"',
            b'cookie\\\\\\"',
        ),
    ),
    Rule(
        "secret",
        rb'\\{0,8}"(?:d|k|p|q|dp|dq|qi)\\{0,8}"\s*:\s*\\{0,8}"([0-9A-Za-z_-]{40,})\\{0,8}"',
        tuple(
            b'"%s%s":' % (name, mark) for name in (b"d", b"k", b"p", b"q", b"dp", b"dq", b"qi") for mark in (b"", b"\\", b"\\\\\\")
        ),
        check=is_strong,
    ),
    Rule(
        "cookie",
        rb"""(?i)cookie["']?:[ \t]*["']?([0-9a-z!#$%&*+.^_|~\[\]-]{1,128}=[^\r\n"'\x00]+)""",
        (b"cookie:", b"Cookie:", b"COOKIE:", b'cookie":', b'Cookie":'),
        check=_session,
    ),
)

URL_MARK = b"://"
"""Where the user-info of a URL is looked for."""
KEY_MARKS = (b"-----BEGIN ", b"-----END ", b"---- BEGIN ", b"---- END ")
"""Where a private key begins or ends."""

WORDS = (
    rb"passw(?:or)?d|passphrase|passcode|pwd|secret|token|credential|authorization|"
    rb"(?:api|access|private|auth|account|signing|signature|encryption|encrypt|master|shared|session|storage|deploy|service|license|ssh|hmac|aes|"
    rb"app|admin|webhook|server|client|subscription|integration|bot|write|read|root)[_-]?key|"
    rb"[_-]pass|requirepass|userpass|storepass|[_-]auth|authident|[?&]auth|[\"']auth[\"']|\bpw\b|[_-]pw\b|\bdsn\b|database[_-]?url|connection[_-]?string|webhook[_-]?url|[_-]dsn|_salt|[_-]pin|[_-]otp"
)
"""Parts of names that are telling, in any case (RE2 syntax)."""

OTHER_NAMES = ("url", "private-key", "password", "secret", "known", "env", "name", "unread")
"""Rules without a pattern of their own."""
