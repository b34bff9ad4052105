"""age files for keys: X25519 and ssh recipients, streamed, by the library of rage (https://age-encryption.org/v1).

What is sealed to several recipients is opened by any one of their keys. Recipients and keys are read here; plugins, which run other
programs, are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, Final

from mothball.errors import InvalidParams, SealError
from mothball.seal.armor import dearmored
from mothball.store.read import show

Progress = Callable[[int], None]
"""Called with the bytes read so far, now and then; what it raises ends the work."""

MAX_RECIPIENTS: Final = 64
MAX_KEY_FILE: Final = 1024**2
_IDENTITY: Final = "AGE-SECRET-KEY-1"
_SHOWN: Final = 24
_SSH: Final = ("ssh-ed25519 ", "ssh-rsa ")
_PIECE: Final = 256 * 1024


def parse_recipients(texts: Iterable[str]) -> list[Any]:
    """Recipients of ``age1...``, ``ssh-ed25519 ...`` and ``ssh-rsa ...``; `InvalidParams` names the first that is none."""
    wanted = list(dict.fromkeys(text.strip() for text in texts))
    if not wanted:
        raise InvalidParams("no recipient given; write --to age1... (`age-keygen` makes a key and prints its recipient)")
    if len(wanted) > MAX_RECIPIENTS:
        raise InvalidParams(f"{len(wanted)} recipients; {MAX_RECIPIENTS} are possible")
    return [_recipient(text) for text in wanted]


def _recipient(text: str) -> Any:
    import pyrage

    if text.upper().startswith("AGE-SECRET-KEY-"):
        raise InvalidParams(
            "a recipient is public and begins with age1; what was given is a secret key, and may now stand in your shell's history"
        )
    try:
        if text.startswith("age1"):
            return pyrage.x25519.Recipient.from_str(text)
        if text.startswith(_SSH):
            return pyrage.ssh.Recipient.from_str(text)
    except pyrage.RecipientError as error:
        raise InvalidParams(f"{_brief(text)} is not a recipient: {error}") from None
    raise InvalidParams(f"{_brief(text)} is not a recipient; one begins with age1, ssh-ed25519 or ssh-rsa")


def _brief(text: str) -> str:
    shown = show(text[:_SHOWN].encode("utf-8", "replace"))
    return repr(shown + ("..." if len(text) > _SHOWN else ""))


def parse_identities(data: bytes) -> list[Any]:
    """The secret keys of an identity file: lines ``AGE-SECRET-KEY-1...`` and comments, or one OpenSSH private key.

    `InvalidParams` when there is none; the message never repeats what stands in the file.
    """
    import pyrage

    if len(data) > MAX_KEY_FILE:
        raise InvalidParams(f"an identity file of more than {MAX_KEY_FILE} bytes is none")
    if data.startswith((b"age-encryption.org/", b"-----BEGIN AGE ENCRYPTED")):
        raise InvalidParams("the identity file is itself sealed; unseal it with its passphrase first")
    try:
        if data.lstrip().startswith(b"-----BEGIN "):
            return [pyrage.ssh.Identity.from_buffer(data)]
        found = []
        for number, line in enumerate(data.decode("ascii").splitlines(), 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            if not text.startswith(_IDENTITY):
                raise InvalidParams(f"line {number} of the identity file is neither a comment nor a key {_IDENTITY}...")
            found.append(pyrage.x25519.Identity.from_str(text))
    except (pyrage.IdentityError, UnicodeDecodeError) as error:
        raise InvalidParams(
            "the identity file holds no key that can be used: age keys and OpenSSH private keys without a passphrase can"
        ) from error
    if not found:
        raise InvalidParams("the identity file holds no key")
    return found


def encrypt(src: BinaryIO, out: BinaryIO, recipients: list[Any], progress: Progress | None = None) -> None:
    """Seal the rest of `src` into `out`. Errors of both, and of `progress`, come through as they are."""
    import pyrage

    _run("this file", lambda reader, writer: pyrage.encrypt_io(reader, writer, recipients), src, out, progress)


def decrypt(src: BinaryIO, out: BinaryIO, identities: list[Any], progress: Progress | None = None) -> None:
    """Open the rest of `src` into `out`: `SealError` for a wrong key and for a file that is damaged or cut.

    `out` has got what stood before the damage by then, and must not be used.
    """
    import pyrage

    _run("this file", lambda reader, writer: pyrage.decrypt_io(reader, writer, identities), dearmored(src), out, progress)


def _run(what: str, work: Callable[[Any, Any], None], src: Any, out: Any, progress: Progress | None) -> None:
    import pyrage

    reader, writer = _Reader(src, progress), _Writer(out)
    try:
        work(reader, writer)
        writer.flush()
    except BaseException as error:
        # The library turns what its reader and writer raise into errors of its own, also a full disk and Ctrl-C.
        if (cause := reader.error or writer.error) is not None:
            raise cause from None
        if isinstance(error, pyrage.DecryptError) and "No matching keys" in str(error):
            raise SealError(what=what, reason="none of the keys given is for it") from None
        if isinstance(error, (pyrage.DecryptError, pyrage.EncryptError, OSError)):
            raise SealError(what=what, reason="it is damaged or cut") from None
        if type(error).__name__ == "PanicException":
            raise SealError(what=what, reason="it cannot be read") from None
        raise


class _Reader:
    """What the library reads from; it keeps the error that the library would swallow."""

    def __init__(self, src: Any, progress: Progress | None) -> None:
        self._src = src
        self._progress = progress
        self._done = self._told = 0
        self.error: BaseException | None = None

    def read(self, count: int = -1) -> bytes:
        try:
            data: bytes = self._src.read(count)
            self._done += len(data)
            if self._progress is not None and self._done - self._told >= _PIECE:
                self._told = self._done
                self._progress(self._done)
        except BaseException as error:
            self.error = error
            raise
        return data


class _Writer:
    """What the library writes to."""

    def __init__(self, out: Any) -> None:
        self._out = out
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        try:
            self._out.write(data)
        except BaseException as error:
            self.error = error
            raise
        return len(data)

    def flush(self) -> None:
        try:
            self._out.flush()
        except BaseException as error:
            self.error = error
            raise
