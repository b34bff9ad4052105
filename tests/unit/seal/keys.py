"""An OpenSSH key made from nothing but bytes: the tests need no ssh-keygen."""

from __future__ import annotations

import base64

from nacl.signing import SigningKey


def ssh_key() -> tuple[bytes, str]:
    """(the private key file, the public key's line) of a new ed25519 key without a passphrase."""
    key = SigningKey.generate()
    public = bytes(key.verify_key)
    kind = b"ssh-ed25519"
    line = _text(kind) + _text(public)
    private = bytes(8) + line + _text(bytes(key) + public) + _text(b"test")
    private += bytes(range(1, -len(private) % 8 + 1))
    none = _text(b"none")
    blob = b"openssh-key-v1\0" + none + none + _text(b"") + (1).to_bytes(4, "big") + _text(line) + _text(private)
    text = base64.b64encode(blob).decode()
    body = "\n".join(text[at : at + 70] for at in range(0, len(text), 70))
    pem = f"-----BEGIN OPENSSH PRIVATE KEY-----\n{body}\n-----END OPENSSH PRIVATE KEY-----\n"
    return pem.encode(), f"ssh-ed25519 {base64.b64encode(line).decode()}"


def _text(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data
