"""Is what stands beside a telling name a secret? Names, placeholders and entropy; every figure is here.

In code ``token = get_token()`` and ``password: str`` stay, in configuration a value needs less to be a secret, and in a file for
credentials (or an environment, or a command line) every value of a telling name is one unless it is plainly harmless.
"""

from __future__ import annotations

import math
import re

from mothball.redact.files import CODE, CONFIG, CREDENTIALS, PROSE

PASSWORD_BITS = 2.5
"""Least entropy of a quoted password, bits a character (``hunter2`` has 2.8)."""
TOKEN_BITS = 3.0
"""Least entropy of a quoted token, secret or key."""
STRONG_BITS = 3.3
"""Least entropy of what is neither quoted nor in configuration, or whose name says that it is no secret (``token_url``)."""
LEAST_PASSWORD, LEAST_TOKEN, LEAST_STRONG = 6, 8, 16
"""Least lengths in characters that go with the three."""
_LONGEST_PLACEHOLDER = 256
_CLASSES, _ALL_CLASSES = 3, 4

_PASSWORD = re.compile(rb"pass|pwd", re.IGNORECASE)
_HARMLESS = re.compile(
    rb"""(?ix) (?: true|false|yes|no|on|off|none|null|nil|undefined|empty|default|optional|required|enabled|disabled|unset|n/a
    | str(?:ing)? | bytes | int | bool(?:ean)? | any | object | text | redacted
    | [-+]?[0-9.]{1,6} | (.)\1* | \*+ | \.+ | -+
    | \$\{(?!\w[\w.]*:[-=]?[^}?+-])[^}]*\} | \$\([^)]*\) | \$[A-Za-z_]\w* | \#\ .* | \# | %\w? | %\w+% | %\([^)]*\).? | <[^>]*>
    | \{\{.*\}\} | \{[\w.\ -]{0,40}\}
    | \[\w*\] | @\w+@ | &\w+ | !\w+\ .*
    | (?:your|insert|replace|enter|put|change)[-_ ].*(?:here|me|token|key|password|secret)
    | changeme | example | placeholder | dummy ) \Z""",
    re.DOTALL,
)
_WORDS = re.compile(rb"[A-Za-z_.\-/ :]+\Z")
_DOTTED = re.compile(rb"[A-Za-z_]\w*(?:(?:\.|->|::|\?\.)\w+)+\Z")
_IDENTIFIER = re.compile(rb"[A-Za-z_]\w*\Z")
_PATH = re.compile(
    rb"(?:[.~]{0,2}|[A-Za-z]:)?[/\\][A-Za-z._-]+[/\\].*|(?:[\w.@-]+/)+[\w.@-]+\.[a-z]{1,5}\Z|[a-z+]+://.*", re.DOTALL
)
_CODE = re.compile(rb"[()\[\]{}<>;|&*?!]|::|->|\$")
_HOST = re.compile(rb"(?:[a-z0-9-]+\.)+[a-z0-9-]+(?::[0-9]{1,5})?(?:/.*)?\Z|[a-z0-9-]{1,30}:[0-9]{1,5}(?:/.*)?\Z|[0-9.:/-]+\Z")
_SAYS_NOT = re.compile(
    rb"(?i)(?:[_.-]|(?<=[a-z]))(?:name|names|type|types|count|len|length|size|url|uri|file|path|dir|field|regex|pattern|id|ids|ttl|expir\w*|"
    rb"label|title|hint|help|text|message|msg|error|prompt|prefix|suffix|header|format|version|policy|rule|rules|manager|provider|"
    rb"service|class|module|index|limit|min|max|timeout|at|on|is|has|get|set|kind|list|required|placeholder|strength|enabled)\Z"
)
_CHAINED = re.compile(rb"[A-Za-z_$][\w$]*\.[A-Za-z_$][\w$]*=")
_NAMED = re.compile(rb"[A-Za-z_][\w.]*\Z")
_CAMEL = re.compile(rb"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
_LEAST_WORD = 3.2
"""Least mean length of the words in a name; parts of random letters and digits have fewer than two."""
_PUBLIC = re.compile(rb"(?i)public[_-]?key")
_ENV_NAME = re.compile(rb"[A-Z][A-Z0-9_]*\Z")
_COMMON = frozenset(
    b"password passwords passwd passphrase username development production staging localhost undefined function default internal "
    b"external changeme placeholder disabled required optional anonymous administrator postgres postgresql mongodb rabbitmq "
    b"mysqladmin something example keychain credential credentials authorization authentication application/json bearer "
    b"x-oauth-basic x-access-token github-actions 127.0.0.1 loopback access_token refresh_token client_secret true false".split()
)  # fmt: skip
LEAST_KNOWN = 8
"""Shorter values are not looked for elsewhere: they stand everywhere by chance."""


def entropy(value: bytes) -> float:
    """Shannon entropy of `value`, bits a byte."""
    if not value:
        return 0.0
    size = len(value)
    return -sum(count / size * math.log2(count / size) for count in map(value.count, set(value)))


def is_password(name: bytes) -> bool:
    """True when `name` speaks of a password, which people choose, rather than of a token, which machines make."""
    return _PASSWORD.search(name[-128:]) is not None


def harmless(value: bytes) -> bool:
    """True for placeholders, variables, booleans, small numbers, and nothing at all."""
    return not value or (len(value) <= _LONGEST_PLACEHOLDER and _HARMLESS.match(value) is not None)


def says_not(name: bytes) -> bool:
    """True for a name whose end says that its value is no secret: ``token_url``, ``password_field``."""
    return _SAYS_NOT.search(name[-64:]) is not None


_SIZE = re.compile(rb"[-+]?[0-9][0-9.,:/_-]*(?:[a-zA-Z]{1,3}|%)?\Z")
_DIGIT, _NO_ALNUM = re.compile(rb"[0-9]"), re.compile(rb"[^0-9A-Za-z_]")


def _classes(value: bytes) -> int:
    """How many of lower case, upper case, digits and others stand in `value`."""
    kinds = (value.upper() != value, value.lower() != value, _DIGIT.search(value) is not None, _NO_ALNUM.search(value) is not None)
    return sum(kinds)


def _digits(value: bytes) -> int:
    return len(_DIGIT.findall(value))


def no_name(value: bytes) -> bool:
    """True for what can hardly be one of a list of names: ``"oauth_token", "crypto_box_keypair2"``."""
    if is_wordy(value):
        return False
    return (b"_" not in value and is_strong(value)) or (_classes(value) == _ALL_CLASSES and not _IDENTIFIER.match(value))


def is_wordy(value: bytes) -> bool:
    """True for names made of words: ``generateEncryptionKeyBase64``, ``process.env.NEXT_ACTIONS_KEY``; random letters are none."""
    return _NAMED.match(value) is not None and len(value) >= _LEAST_WORD * len(_CAMEL.findall(value))


def is_strong(value: bytes) -> bool:
    """True for what looks made by a machine: long, of high entropy, with digits, no path and no expression."""
    if len(value) < LEAST_STRONG or entropy(value) < STRONG_BITS or _PATH.match(value) or _CODE.search(value):
        return False
    digits = _digits(value)
    if not digits:
        return len(value) >= 2 * LEAST_STRONG and _classes(value) > 1 and not _WORDS.match(value)
    return _classes(value) >= _CLASSES or digits * 8 >= len(value)


def is_env_secret(value: bytes) -> bool:
    """Whether a value of an ``.env`` is one though its name does not tell: whatever is no word, number, path, host or plain URL."""
    if (
        harmless(value)
        or _PATH.match(value)
        or _WORDS.match(value)
        or len(value) < LEAST_TOKEN
        or any(byte in b" ," for byte in value)
    ):
        return False
    return entropy(value) >= TOKEN_BITS and _digits(value) > 0 and not _HOST.match(value)


def is_secret(name: bytes, value: bytes, *, quoted: bool, tight: bool, level: int) -> bool:
    """Whether `value` beside the telling `name` is redacted.

    `tight`: written ``NAME=value`` without spaces, as in an environment. `level` is that of the file (`mothball.redact.files`).
    """
    if harmless(value):
        return False
    if level == CREDENTIALS:
        return not (says_not(name) and _PATH.match(value))
    if _PUBLIC.search(name[-64:]) or (not quoted and level in (CODE, PROSE) and (_is_name(value) or _CHAINED.search(value))):
        return False
    if _SAYS_NOT.search(name[-64:]):
        return is_strong(value)
    plain = value.lower()
    if plain in _COMMON or plain == name.lower():
        return False
    literal = quoted or level == CONFIG or (tight and _ENV_NAME.match(name) is not None)
    if not literal:
        return _unquoted(value) or (level == PROSE and _told(name, value))
    if not quoted and _CODE.search(value) and level in (CODE, PROSE):
        return is_strong(value)
    if _PATH.match(value):
        return False
    return _literal(name, value, quoted=quoted, tight=tight, level=level)


def _is_name(value: bytes) -> bool:
    """``argon2id.PASSWD_MIN``, ``crypto_pwhash_scrypt_SALTBYTES``: what code calls something, though it has digits."""
    return _DOTTED.match(value) is not None or (value.count(b"_") > 1 and _IDENTIFIER.match(value) is not None)


def _unquoted(value: bytes) -> bool:
    """In code, without quotes: an expression unless it can hardly be one."""
    if _IDENTIFIER.match(value) and _digits(value) < 3:  # noqa: PLR2004 - `sha256`-like names have up to three digits
        return False
    if _PATH.match(value):
        return False
    return is_strong(value) or (len(value) >= LEAST_TOKEN and _classes(value) == _ALL_CLASSES and not _CODE.search(value))


def _told(name: bytes, value: bytes) -> bool:
    """In a log or a message, without quotes: ``password=hunter2`` is no assignment of a variable."""
    digits = _digits(value)
    if _PATH.match(value) or _HOST.match(value) or _CODE.search(value) or not digits or _SIZE.match(value):
        return False
    if is_password(name):
        return len(value) >= LEAST_PASSWORD and entropy(value) >= PASSWORD_BITS
    return len(value) >= LEAST_TOKEN and digits > 1 and entropy(value) >= TOKEN_BITS


def _literal(name: bytes, value: bytes, *, quoted: bool, tight: bool, level: int) -> bool:
    password = is_password(name)
    if not password and is_wordy(value):
        return False
    spaced = any(byte in b" \t\n" for byte in value)
    if spaced:
        return level == CONFIG and password and quoted and _digits(value) > 0
    if _WORDS.match(value):
        if len(value) >= 2 * LEAST_STRONG and _classes(value) >= 2 and entropy(value) >= 4.0:  # noqa: PLR2004 - letters only, yet random
            return True
        # A password of letters: in configuration and environments only, for in code it is mostly a name.
        chosen = password and len(value) >= LEAST_PASSWORD and (level == CONFIG or (tight and _ENV_NAME.match(name) is not None))
        return chosen and not _PASSWORD.search(value)
    if password:
        return len(value) >= LEAST_PASSWORD and entropy(value) >= PASSWORD_BITS
    least = TOKEN_BITS if len(value) > LEAST_STRONG else PASSWORD_BITS
    return len(value) >= LEAST_TOKEN and entropy(value) >= least and _digits(value) > 0


def is_distinct(value: bytes) -> bool:
    """True for a found value that may be looked for everywhere: long enough and no common word."""
    if len(value) < LEAST_KNOWN or value.lower() in _COMMON or harmless(value):
        return False
    return len(value) >= LEAST_STRONG or not _WORDS.match(value) or _classes(value) > 1
