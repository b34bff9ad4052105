"""Which form a file has by its name: what `mothball.redact.formats` looks for in it. ``.env`` and its like: see `files`."""

from __future__ import annotations

import re
from typing import Final

_WHOLE: Final = frozenset(
    b"master.key .vault-token .vault_pass .vault-pass .vault_password .vault_pass.txt vault_pass vault_pass.txt vault_password "
    b"vault_password.txt .erlang.cookie .secret_key_base secret_key_base .secret_key secret_key secret_token .passphrase "
    b"sa_password root_password db_password postgres_password".split()
)
_NAMES: Final = {
    b".netrc": "netrc", b"_netrc": "netrc", b".pgpass": "pgpass", b"pgpass.conf": "pgpass", b".htpasswd": "htpasswd",
    b"passwd-s3fs": "htpasswd", b".yarnrc": "words", b".msmtprc": "words", b".muttrc": "words",
    b".fetchmailrc": "words", b"hosts": "words", b"redis.conf": "words",
}  # fmt: skip
_ENDS: Final = (
    (b".har", "har"), (b".tfstate", "tfstate"), (b".tfstate.backup", "tfstate"), (b".tf", "hcl"), (b".hcl", "hcl"),
    (b".csv", "table"), (b".tsv", "table"), (b".yml", "yaml"), (b".yaml", "yaml"), (b".json", "json"), (b".toml", "toml"),
    (b".xml", "xml"), (b".config", "xml"), (b".plist", "xml"), (b".props", "xml"), (b".html", "xml"), (b".xhtml", "xml"),
    (b".conf", "words"), (b".cnf", "words"), (b".cfg", "words"), (b".ini", "words"), (b".sql", "sql"),
)  # fmt: skip
_STRONG: Final = re.compile(rb"(?:secrets|credentials)\.(?:ya?ml|json|toml)\Z|(?:local\.settings|appsettings[\w.-]*)\.json\Z")
_LINE_FILES: Final = re.compile(
    rb"[\w.-]*?(?:passw|secret|token|api[_-]?key|credential)[\w-]*(?:\.txt|\.key|\.secret|\.token)?\Z|[\w.-]+\.(?:key|token|secret)\Z"
)


def form_of_name(path: bytes) -> str:
    """The form of the file `path` (lower case), empty for one without; ``.env`` and its like: see `files`."""
    base = path.rpartition(b"/")[2]
    if base in _NAMES:
        return _NAMES[base]
    if base in _WHOLE:
        return "whole"
    if _STRONG.match(base):
        return "strong"
    for end, form in _ENDS:
        if base.endswith(end):
            return form
    return "line" if _LINE_FILES.match(base) else ""
