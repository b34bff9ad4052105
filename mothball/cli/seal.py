"""Commands for sealed files: seal, unseal, inspect. They need no fleet and no settings."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mothball import errors
from mothball.cli.ending import tidy_end
from mothball.cli.output import JsonFlag, emit_json, line, note, pairs
from mothball.cli.text import escape, human_bytes, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mothball.seal.sealed import Sealed

PANEL = "Sealed files"
MAX_PASSPHRASE = 64 * 1024
MAX_IDENTITY = 1024**2

PassphraseFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Its first line is the passphrase; - is standard input, /dev/fd/3 a descriptor. A passphrase is never an argument.",
        show_default=False,
    ),
]


def add_to(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    for name, command in (("seal", seal), ("unseal", unseal), ("inspect", inspect)):
        app.command(name, rich_help_panel=PANEL)(command)


def seal(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What to seal; with --stim a bundle, as a folder or a tar.")],
    *,
    to: Annotated[
        list[str] | None,
        typer.Option(metavar="RECIPIENT", help="age1..., ssh-ed25519 ... or ssh-rsa ...; again for more.", show_default=False),
    ] = None,
    passphrase: Annotated[bool, typer.Option("--passphrase", help="Ask for a passphrase.", show_default=False)] = False,
    passphrase_file: PassphraseFile = None,
    stim: Annotated[
        bool,
        typer.Option(
            "--stim",
            help="The reference system's container. Weak: its key is one unsalted SHA-256 of the password, which can be found by "
            "trying. For interop only.",
            show_default=False,
        ),
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: FILE.age.", show_default=False)] = None,
    remove: Annotated[
        bool,
        typer.Option(
            "--remove", help="Remove FILE once the sealed one was opened again. With a passphrase only.", show_default=False
        ),
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Encrypt a file with age, to recipients or with a passphrase.

    The sealed file is there when it is whole, mode 0600, and replaces nothing. Whatever goes wrong, nothing half made is left.
    """
    from mothball.seal.sealed import check_choice, seal_file

    asks = passphrase or passphrase_file is not None
    if stim and to:
        raise errors.InvalidParams("a .stim has a password and no recipients; leave --to or --stim out")
    if stim and remove:
        raise errors.InvalidParams("a .stim does not hold all that a bundle is (owners, further files); --remove is not for it")
    if stim:
        _seal_stim(file, out, passphrase_file, json=json)
        return
    check_choice(to or [], with_passphrase=asks, remove=remove)  # before anybody is asked for anything
    secret = _passphrase(passphrase_file, twice=True) if asks else None
    with tidy_end(), _progress("seal", hidden=json) as progress:
        sealed = seal_file(file, out, recipients=to or [], passphrase=secret, remove=remove, progress=progress)
    _said(sealed, json=json)
    if sealed.removed and not json:
        line(escape(f"{file} was removed; the sealed file was opened before and holds the same bytes"))


def _seal_stim(file: Path, out: Path | None, passphrase_file: str | None, *, json: bool) -> None:
    from mothball.package.stim_parts import parts_of_folder, parts_of_tar
    from mothball.seal.newfile import check_new
    from mothball.seal.sealed import write_stim
    from mothball.seal.source import open_source
    from mothball.seal.stim import MAX_CLEAR, SUFFIX

    place = file.expanduser().absolute()
    target = check_new(out or place.with_name(place.name.removesuffix(".tar") + SUFFIX))
    secret = _passphrase(passphrase_file, twice=True)
    if place.is_dir():
        parts = parts_of_folder(place, MAX_CLEAR)
    else:
        with open_source(place) as source:
            parts = parts_of_tar(source.file, str(place), MAX_CLEAR)
            source.check_unchanged()
    with tidy_end():
        sealed = write_stim(target, parts.config, parts.rootfs, secret)
    for name in parts.left_out:
        note(f"note: {name} is left out; a .stim has config.json and regular files, folders and links below rootfs only")
    _said(sealed, json=json, left_out=list(parts.left_out))


def unseal(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An age file or a .stim.", show_default=False)],
    *,
    identity: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Secret keys: `age-keygen`'s file or an OpenSSH private key; again for more.", show_default=False
        ),
    ] = None,
    passphrase: Annotated[bool, typer.Option("--passphrase", help="Ask for the passphrase.", show_default=False)] = False,
    passphrase_file: PassphraseFile = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default: FILE without .age; .tar for .stim.", show_default=False)
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Open a sealed file. A .stim becomes the tar of its bundle: config.json and rootfs/.

    A wrong key, a wrong passphrase and a file that is damaged or cut leave nothing behind.
    """
    from mothball.seal.newfile import check_new
    from mothball.seal.sealed import open_stim, unseal_file, unsealed_name, what_opens

    asks = passphrase or passphrase_file is not None
    if bool(identity) == asks:
        raise errors.InvalidParams("say how it opens: --identity FILE, or --passphrase or --passphrase-file")
    kind = what_opens(file, with_passphrase=asks)
    target = check_new(out or unsealed_name(file, kind))
    secret = _passphrase(passphrase_file, twice=False) if asks else None
    if kind == "stim":
        assert secret is not None  # noqa: S101 -- what_opens has refused an identity
        from mothball.package.stim_parts import write_bundle_tar

        config, rootfs = open_stim(file, secret)
        _said(_bundle_tar(target, lambda tar: write_bundle_tar(tar, config, rootfs)), json=json)
        if not json and b'"ociVersion"' not in config:
            note("note: its config.json is no OCI runtime spec, so runc refuses the bundle; its files are below rootfs/")
        return
    with tidy_end(), _progress("unseal", hidden=json) as progress:
        keys = [_small(path, MAX_IDENTITY) for path in identity or []]
        _said(unseal_file(file, target, identities=keys, passphrase=secret, progress=progress), json=json)


def _bundle_tar(target: Path, write: Callable[[Any], object]) -> Sealed:
    from mothball.seal.newfile import new_file
    from mothball.seal.sealed import described

    with tidy_end(), new_file(target) as tar:
        write(tar)
        return described(target, tar)


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A sealed file, a crash package, a bundle's tar.")],
    *,
    json: JsonFlag = False,
) -> None:
    """Say what a file is, without its key: to whom it is sealed, how large it is, what a crash package reports."""
    from mothball.package import tarlook
    from mothball.package.tarread import BLOCK
    from mothball.seal.inspect import look
    from mothball.seal.source import open_source

    with open_source(file) as source:
        found = look(source.file)
        if found is None:
            source.file.seek(0)
            tar = tarlook.is_tar(source.file.read(BLOCK))
            found = tarlook.look(source.file, str(source.path)) if tar else {"format": "unknown"}
        found = {"file": str(source.path), "size": source.size, **found}
    if json:
        emit_json(found)
        return
    pairs((name, _value(value)) for name, value in _flat(found))


def _flat(found: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in found.items():
        key = escape(f"{prefix}{name}")
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            yield key, ", ".join(" ".join(str(each) for each in item.values()) for item in value)
        else:
            yield key, value


def _value(value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if value is None or isinstance(value, str | int) else str(value)


def _said(sealed: Sealed, *, json: bool, **more: Any) -> None:
    if json:
        emit_json({"path": str(sealed.path), "bytes": sealed.bytes, "sha256": sealed.sha256, "removed": sealed.removed, **more})
        return
    line(f"{sealed.sha256}  {escape(str(sealed.path))}")
    line(human_bytes(sealed.bytes))


def _passphrase(file: str | None, *, twice: bool) -> bytes:
    """The passphrase from `file` or from the terminal; never from an argument or the environment, which others can read."""
    if file is None:
        secret = _ask(twice=twice)
    else:
        data = sys.stdin.buffer.readline(MAX_PASSPHRASE) if file == "-" else _small(Path(file), MAX_PASSPHRASE)
        secret = data.split(b"\n", 1)[0].removesuffix(b"\r")
    if not secret:
        raise errors.InvalidParams("password is required for encryption: the passphrase is empty")
    return secret


def _ask(*, twice: bool) -> bytes:
    from getpass import getpass

    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        raise errors.InvalidParams("there is no terminal to ask for the passphrase on; use --passphrase-file") from None
    first = getpass("Passphrase: ")
    if twice and getpass("Again: ") != first:
        raise errors.InvalidParams("the two passphrases differ; nothing was written")
    return first.encode("utf-8", "surrogateescape")


def _small(path: Path, limit: int) -> bytes:
    """What a file, a FIFO or a descriptor holds; its errors never repeat anything of it."""
    try:
        with path.expanduser().open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise errors.InvalidParams(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise errors.InvalidParams(f"{path} has more than {limit} bytes; it is not what was asked for")
    return data


@contextmanager
def _progress(label: str, *, hidden: bool) -> Iterator[Callable[[int], None] | None]:
    """A line on a terminal that says how far a large file is."""
    if hidden or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as shown:
        task = shown.add_task(label, total=None)
        yield lambda done: shown.update(task, description=printable(f"{label}: {human_bytes(done)}"))
