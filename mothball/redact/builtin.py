"""The built-in rules: the shapes of known tokens, and the words that make a name telling.

Each rule begins at one of its keywords, so one RE2 pass over all keywords finds every place where one can apply, and the rule's own
pattern is then matched there, anchored and bounded: hostile text cannot make that slow.
"""

from __future__ import annotations

import base64
import binascii
import re

from mothball.redact.judge import is_strong
from mothball.redact.rules import Rule

VERSION = 1
"""Grows when the rules change: reports say which set redacted them."""

_MIXED = re.compile(rb"(?=.*[0-9])(?=.*[A-Za-z])", re.DOTALL)


def _mixed(value: bytes) -> bool:
    """Letters and digits, as machines make tokens: ``sk-learn-with-pipelines-and-more`` is none."""
    return _MIXED.match(value[:512]) is not None


def _bearer(value: bytes) -> bool:
    """What stands behind ``Bearer`` or ``Basic``, when it is no word of a sentence."""
    return is_strong(value) or _is_basic(value) or (len(value) >= 16 and _mixed(value) and b"//" not in value)  # noqa: PLR2004


def _is_basic(value: bytes) -> bool:
    """Base64 of ``user:password``."""
    try:
        plain = base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except (binascii.Error, ValueError):
        return False
    return len(value) >= 8 and b":" in plain and all(32 <= byte < 127 for byte in plain)  # noqa: PLR2004


RULES: tuple[Rule, ...] = (
    Rule("aws", rb"(?:AKIA|ASIA|ABIA|ACCA|AROA|AIDA)[A-Z2-7]{16}", (b"AKIA", b"ASIA", b"ABIA", b"ACCA", b"AROA", b"AIDA")),
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
        rb"login[ \t\r\n]+[^ \t\r\n]{1,256}[ \t\r\n]+(?:account[ \t\r\n]+[^ \t\r\n]+[ \t\r\n]+)?password[ \t\r\n]+"
        # Up to an escaped line end: in JSON the rest of the text is behind it. What stands for a password already is all of it.
        rb"(\[redacted:[a-z0-9:-]{1,48}\]|(?:[^ \t\r\n\\]|\\{1,8}[^nrt\\ \t\r\n])+)",
        (b"login ", b"login\t", b"login\n", b"login\r"),
    ),
    Rule(
        "cookie",
        rb"""(?i)cookie["']?:[ \t]*["']?([!#-&(-:<-~]{1,128}=[^\r\n"'\x00]+)""",
        (b"cookie:", b"Cookie:", b"COOKIE:", b'cookie":', b'Cookie":'),
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
    rb"[_-]pass|userpass|[_-]auth|[\"']auth[\"']|[_-]pw\b|database[_-]?url|connection[_-]?string|webhook[_-]?url|[_-]dsn|_salt|[_-]pin|[_-]otp"
)
"""Parts of names that are telling, in any case (RE2 syntax)."""

OTHER_NAMES = ("url", "private-key", "password", "secret", "known", "env", "name", "unread")
"""Rules without a pattern of their own."""
