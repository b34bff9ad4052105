"""Sealing and unsealing files: whole or not at all, mode 0600, and never a clear file by accident."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, Literal, NamedTuple

from mothball.errors import InvalidParams, OperationFailed, SealError
from mothball.seal import age, age_scrypt, stim
from mothball.seal.age import Progress
from mothball.seal.age_header import read_header
from mothball.seal.armor import dearmored
from mothball.seal.newfile import check_new, new_file
from mothball.seal.source import Source, open_source

Kind = Literal["age", "stim"]
SUFFIX: Final = ".age"
_PIECE: Final = 1024**2


class Sealed(NamedTuple):
    """What was written: `path`, its `bytes` and `sha256` (``sha256:<hex>``); `removed` says that the source is gone."""

    path: Path
    bytes: int
    sha256: str
    removed: bool = False


def seal_stream(recipients: Sequence[str]) -> Callable[[BinaryIO, BinaryIO], None]:
    """A function that seals the rest of its first argument into its second; `InvalidParams` at once for a bad recipient."""
    parsed = age.parse_recipients(recipients)
    return lambda src, out: age.encrypt(src, out, parsed)


def seal_file(
    src: Path,
    dst: Path | None = None,
    *,
    recipients: Sequence[str] = (),
    passphrase: bytes | None = None,
    remove: bool = False,
    progress: Progress | None = None,
) -> Sealed:
    """Seal `src` to `recipients` or with `passphrase` (one of both) into the new file `dst`, default ``<src>.age``.

    With `remove` the source goes once the sealed file has been opened again and holds the same bytes; that needs the key, so it is
    possible with a passphrase only. Errors come before anything is changed, and nothing is left of what was not finished.
    """
    check_choice(recipients, with_passphrase=passphrase is not None, remove=remove)
    parsed = age.parse_recipients(recipients) if recipients else []
    if passphrase is not None:
        age_scrypt.check_passphrase(passphrase)
    target = check_new(dst or src.with_name(src.name + SUFFIX))
    with open_source(src) as source, new_file(target) as out:
        if passphrase is None:
            age.encrypt(source.file, out, parsed, progress)
        else:
            age_scrypt.encrypt(source.file, out, passphrase, progress)
        source.check_unchanged()
        sealed = described(target, out)
        if remove and passphrase is not None:
            _verify(source, out, passphrase)
    return sealed._replace(removed=_remove(src, source.is_still)) if remove else sealed


def check_choice(recipients: Sequence[str], *, with_passphrase: bool, remove: bool) -> None:
    """`InvalidParams` unless it is one of both ways to seal, the recipients are some, and `remove` goes with it."""
    if bool(recipients) == with_passphrase:
        raise InvalidParams("say who may open it: --to RECIPIENT, or --passphrase (or --passphrase-file); one of both")
    if remove and not with_passphrase:
        raise InvalidParams(
            "only with a passphrase can the sealed file be opened here to see that it holds the same bytes. Sealed to recipients, "
            "it cannot be verified: remove the source yourself once one of them has opened it"
        )
    if recipients:
        age.parse_recipients(recipients)


def unseal_file(
    src: Path,
    dst: Path | None = None,
    *,
    identities: Sequence[bytes] = (),
    passphrase: bytes | None = None,
    progress: Progress | None = None,
) -> Sealed:
    """Open the age file `src` with the keys of `identities` (contents of identity files) or with `passphrase` into the new `dst`.

    The default name is that of `src` without ``.age``. `SealError` for a wrong key or passphrase and for a file that is damaged or
    cut at any byte; nothing is written then.
    """
    if bool(identities) == (passphrase is not None):
        raise InvalidParams("unseal with an identity or with a passphrase: one of both")
    keys = [key for data in identities for key in age.parse_identities(data)]
    target = check_new(dst or unsealed_name(src))
    with open_source(src) as source, new_file(target) as out:
        if _kind(source, with_passphrase=passphrase is not None) != "age":
            raise InvalidParams(f"{src} is a .stim, not an age file")
        with _named(source.path):
            if passphrase is None:
                age.decrypt(source.file, out, keys, progress)
            else:
                age_scrypt.decrypt(source.file, out, passphrase, progress)
        source.check_unchanged()
        return described(target, out)


def unsealed_name(src: Path, kind: Kind = "age") -> Path:
    """`src` without its ``.age``, or with ``.tar`` in place of ``.stim``; `InvalidParams` when it ends otherwise."""
    suffix = SUFFIX if kind == "age" else stim.SUFFIX
    if src.suffix != suffix or not src.stem:
        raise InvalidParams(f"{src.name} does not end with {suffix}; say with --out what the opened file is called")
    return src.with_suffix("" if kind == "age" else ".tar")


def what_opens(src: Path, *, with_passphrase: bool) -> Kind:
    """What `src` is; `SealError` when it is no sealed file, or is sealed for the other kind of key."""
    with open_source(src) as source:
        return _kind(source, with_passphrase=with_passphrase)


def _kind(source: Source, *, with_passphrase: bool) -> Kind:
    """`what_opens` of an open file, which stands at its beginning afterwards. Its header is bounded from here on."""
    stim_file = source.file.read(len(stim.MAGIC)) == stim.MAGIC
    source.file.seek(0)
    if stim_file:
        if not with_passphrase:
            raise SealError(what=str(source.path), reason="a .stim has a password; open it with --passphrase")
        return "stim"
    with _named(source.path):
        wants = read_header(dearmored(source.file)).passphrase
    source.file.seek(0)
    if wants and not with_passphrase:
        raise SealError(what=str(source.path), reason="it is sealed with a passphrase; open it with --passphrase")
    if with_passphrase and not wants:
        raise SealError(what=str(source.path), reason="it is sealed to recipients; open it with --identity")
    return "age"


def write_stim(dst: Path, config: bytes, rootfs: bytes, password: bytes) -> Sealed:
    """A new `.stim` of both parts; errors as `stim.pack_stim` and `check_new`."""
    stim.derive_key(password)
    with new_file(dst) as out:
        stim.pack_stim(out, config, rootfs, password)
        return described(check_new(dst), out)


def open_stim(src: Path, password: bytes) -> tuple[bytes, bytes]:
    """(config, rootfs tar) of the `.stim` `src`; `SealError` with the causes of B-126."""
    with open_source(src) as source:
        parts = stim.unpack_stim(source.file, password)
        source.check_unchanged()
        return parts


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Give a `SealError` the name of the file."""
    try:
        yield
    except SealError as error:
        raise SealError(what=str(path), reason=str(error.fields.get("reason", error.message))) from None


def described(target: Path, out: BinaryIO) -> Sealed:
    """What was written to `out`, read back."""
    out.flush()
    out.seek(0)
    digest = _digest(out)
    return Sealed(target, out.tell(), "sha256:" + digest)


def _digest(file: BinaryIO) -> str:
    sha = hashlib.sha256()
    while piece := file.read(_PIECE):
        sha.update(piece)
    return sha.hexdigest()


class _Hash:
    """A file that only keeps the hash of what is written to it."""

    def __init__(self) -> None:
        self.sha = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha.update(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is kept back here."""


def _verify(source: Source, out: BinaryIO, passphrase: bytes) -> None:
    """The sealed file opens and holds what the source holds, else `OperationFailed`."""
    opened = _Hash()
    out.seek(0)
    age_scrypt.decrypt(out, opened, passphrase)  # type: ignore[arg-type]
    source.file.seek(0)
    if _digest(source.file) != opened.sha.hexdigest():
        raise OperationFailed(f"the sealed form of {source.path} does not hold the same bytes; nothing was written or removed")
    source.check_unchanged()


def _remove(src: Path, is_still: Callable[[os.stat_result], bool]) -> bool:
    place = src.expanduser().absolute()
    if not is_still(place.lstat()):
        raise OperationFailed(f"{place} is another file now and was not removed; the sealed one is complete")
    place.unlink()
    return True
