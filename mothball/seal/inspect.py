"""What a sealed file is, said without its key (B-119): for whom, how large, and what stands in the clear."""

from __future__ import annotations

from typing import Any, BinaryIO, Final

from mothball.seal.age_header import Stanza, read_header
from mothball.seal.age_scrypt import CHUNK, TAG
from mothball.seal.armor import BEGIN, dearmored
from mothball.seal.stim import MAGIC, read_stim_header, read_stim_layout

AGE: Final = b"age-encryption.org/"
TRIX: Final = b"TRIX"
MAX_SHOWN: Final = 64 * 1024
"""Largest header of a container that is shown, bytes."""
_GREASE: Final = "-grease"
"""Writers put random recipients of such a type in, so that readers learn to pass over what they do not know."""
_NONCE: Final = 16
_PIECE: Final = 1024**2


def look(src: BinaryIO) -> dict[str, Any] | None:
    """Facts of the sealed file `src` (seekable, from its beginning) in JSON types; None when it is no sealed file.

    `SealError` for one that is damaged or cut as far as that shows without the key. What stands in it was written by somebody
    else: escape it before a terminal gets it.
    """
    src.seek(0)
    head = src.read(max(len(BEGIN), len(AGE)))
    src.seek(0)
    if head.startswith((AGE, BEGIN)):
        return _age(src, armored=head.startswith(BEGIN))
    if head.startswith((MAGIC, TRIX)):
        return _container(src, head[:4])
    return None


def _age(src: BinaryIO, *, armored: bool) -> dict[str, Any]:
    reader = dearmored(src)
    header = read_header(reader)
    payload = 0
    while piece := reader.read(_PIECE):
        payload += len(piece)
    body = payload - _NONCE
    # Every chunk but the last is full, and the last holds at least its tag.
    chunks = max(-(-body // (CHUNK + TAG)), 1)
    whole = body >= chunks * TAG
    return {
        "format": "age",
        "version": 1,
        "armored": armored,
        "passphrase": header.passphrase,
        "recipients": [_recipient(stanza) for stanza in header.stanzas if not stanza.type.endswith(_GREASE)],
        "payload_size": payload,
        "clear_size": body - chunks * TAG if whole else None,
        "cut": not whole,
    }


def _recipient(stanza: Stanza) -> dict[str, Any]:
    shown: dict[str, Any] = {"type": stanza.type}
    if stanza.type == "scrypt" and len(stanza.arguments) == 2 and stanza.arguments[1].isdecimal():  # noqa: PLR2004 -- salt, factor
        shown["work_factor"] = int(stanza.arguments[1])
    elif stanza.type.startswith("ssh-") and stanza.arguments:
        shown["key"] = stanza.arguments[0]  # the first bytes of the public key's hash
    return shown


def _container(src: BinaryIO, magic: bytes) -> dict[str, Any]:
    header = read_stim_header(src, magic)
    large = header.start > MAX_SHOWN
    found: dict[str, Any] = {
        "format": "stim" if magic == MAGIC else "trix",
        "magic": magic.decode(),
        "version": 2,
        "header": sorted(header.fields)[:100] if large else header.fields,
        "payload_size": header.payload,
    }
    if magic == MAGIC:
        layout = read_stim_layout(src, header)
        found |= {"config_size": layout.config, "rootfs_size": layout.rootfs, "key": "SHA-256 of the password, no salt: weak"}
    return found
