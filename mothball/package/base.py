"""The image below a bundle: a toolchain, a distribution, whatever the command needs beside the workspace.

Any OCI image or docker's own (schema 2), packed with gzip, zstd or not at all, from a layout, an archive or a registry. Every
byte is held against its digest before anybody sees it; what an image says of paths stays inside the rootfs (see `base_layers`).
"""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

import msgspec

from mothball.errors import Corrupt, InvalidParams, NotFound
from mothball.package.base_layers import MergedLayers
from mothball.package.base_source import INDEXES, MANIFESTS, MAX_DOCUMENT, Source, Tick, open_source
from mothball.package.bundle_spec import check_command, check_env
from mothball.package.inflate import Inflated
from mothball.package.rootfs import POINTS, RootEntry
from mothball.package.tarread import Limits, TarMember, TarReader
from mothball.settings import Settings
from mothball.store.blobs import full_disk_is_no_space
from mothball.store.foreign import read_json
from mothball.store.manifest import Descriptor
from mothball.store.refs import REF_NAME

MAX_LAYERS: Final = 128
LIMITS: Final = Limits(members=2_000_000, bytes=32 * 1024**3, names=256 * 1024**2)
"""For all layers of one image together."""
_MAX_BYTES: Final = 40 * 1024**3
"""Most bytes of all layers' tars, with their headers."""
_LAYERS: Final = frozenset(
    {
        f"application/vnd.oci.image.layer.v1.tar{packed}" for packed in ("", "+gzip", "+zstd")
    } | {f"application/vnd.docker.image.rootfs.diff.tar{packed}" for packed in ("", ".gzip", ".zstd")}
)  # fmt: skip
_GOARCH: Final = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}
_NESTING: Final = 3
_PIECE: Final = 1024**2


class Base:
    """One image, merged. Use it in a ``with`` block: `entries` reads content until then.

    `args` and `env` are what the image says for a command; empty where it says nothing. A command works in the workspace, whatever
    the image says of that. `left_out` lists (path, reason)
    of what no bundle gets (at most 1000), `left_out_count` counts all of it.
    """

    def __init__(self, reference: str, digest: str, config: dict[str, Any], layers: MergedLayers) -> None:
        self.reference = reference
        self.digest = digest
        self._layers = layers
        self._stack = ExitStack()
        told = config.get("config")
        told = told if isinstance(told, dict) else {}
        what = f"the config of {reference}"
        self.args: list[str] = _texts(told.get("Entrypoint"), what) + _texts(told.get("Cmd"), what)
        if self.args:
            check_command(self.args)
        self.env: dict[str, str] = {}
        for entry in _texts(told.get("Env"), what):
            name, equals, value = entry.partition("=")
            if equals:
                self.env[name] = value
        check_env(self.env)
        self.left_out = layers.left_out
        self.left_out_count = layers.left_out_count

    def entries(self) -> Iterator[RootEntry]:
        """Everything in the image, sorted by path components, without what lies at or below a bundle's mount points."""
        return self._layers.entries(POINTS)

    def has_program(self, name: str, path: str) -> bool:
        """True when the image has `name`, looked for in the folders of the variable `path` as a container does."""
        places = [name] if "/" in name else [f"{folder}/{name}" for folder in path.split(":") if folder.startswith("/")]
        try:
            found = [self._layers.find(os.fsencode(place)) for place in places]
        except (InvalidParams, ValueError):
            return False
        return any(entry is not None and entry.kind == "f" and entry.mode & 0o111 for entry in found)

    def keep(self, stack: ExitStack) -> None:
        """What to close at the end."""
        self._stack = stack

    def close(self) -> None:
        """Give back the disk space that the layers took."""
        self._stack.close()

    def __enter__(self) -> Base:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_base(
    reference: str,
    settings: Settings,
    scratch: Path,
    tick: Tick = lambda **_: None,
    *,
    roots: tuple[Path, ...] | None = None,
) -> Base:
    """The image `reference`: ``oci:DIR[:TAG]``, ``oci-archive:FILE[:TAG]`` or ``REGISTRY/REPO:TAG`` (or ``@sha256:...``).

    Its layers are unpacked to unnamed files in the folder `scratch`, fetched blobs stay there below ``base/``. With `roots` a
    layout or archive must lie below one of them: for jobs, whose arguments anybody may send. `tick` is called often with
    ``step="base"`` and counts. Raises `InvalidParams` (no image, another platform, names that lead out), `Corrupt` (digests, cut
    tars), `Oversize` (bombs), `NotFound`, `PathNotAllowed`, `NoSpace`, and what a registry raises.
    """
    with ExitStack() as stack:
        source = open_source(reference, settings, scratch, tick, stack, roots)
        digest, manifest = _manifest(source)
        config = _config(source, manifest)
        base = Base(source.reference, digest, config, _merge(source, manifest, config, scratch, tick, stack))
        base.keep(stack.pop_all())
    return base


# -- documents ---------------------------------------------------------------------------------------------------------


class _Platform(msgspec.Struct, frozen=True):
    architecture: str = ""
    os: str = ""


class _Entry(msgspec.Struct, frozen=True, rename={"media_type": "mediaType"}):
    digest: str
    size: int
    media_type: str = ""
    annotations: dict[str, str] | None = None
    platform: _Platform | None = None

    def descriptor(self) -> Descriptor:
        return Descriptor(self.media_type, self.digest, self.size)


class _Index(msgspec.Struct, frozen=True):
    manifests: list[_Entry]


class _Manifest(msgspec.Struct, frozen=True):
    config: _Entry
    layers: list[_Entry]


def _manifest(source: Source) -> tuple[str, _Manifest]:
    """The manifest for this machine and its digest."""
    data, kind = source.top()
    tag = source.tag
    for _ in range(_NESTING):
        kind = read_json(data, dict, f"the manifest of {source.reference}", limit=MAX_DOCUMENT).get("mediaType", kind)
        if kind in MANIFESTS:
            manifest = read_json(data, _Manifest, f"the manifest of {source.reference}", limit=MAX_DOCUMENT)
            return f"sha256:{hashlib.sha256(data).hexdigest()}", _checked(manifest, source)
        if kind not in INDEXES:
            raise InvalidParams(f"{source.reference} is {str(kind)[:100]!r}, no image")
        index = read_json(data, _Index, f"the index of {source.reference}", limit=MAX_DOCUMENT)
        entry = _choose(index.manifests, tag, source)
        data, kind, tag = _document(source, entry), entry.media_type, ""
    raise InvalidParams(f"{source.reference} has indexes nested deeper than {_NESTING} levels")


def _choose(found: Sequence[_Entry], tag: str, source: Source) -> _Entry:
    if tag:
        found = [each for each in found if (each.annotations or {}).get(REF_NAME) == tag]
        if not found:
            raise NotFound(f"{source.reference}: the layout has no image with this tag", what="image", id=source.reference)
    machine = platform.machine()
    wanted = (_GOARCH.get(machine, machine), "linux")
    ours = [each for each in found if each.platform is None or (each.platform.architecture, each.platform.os) == wanted]
    ours = [each for each in ours if each.media_type in INDEXES | MANIFESTS]
    if not ours:
        raise InvalidParams(f"{source.reference} has no image for {wanted[1]}/{wanted[0]}, which is what this machine runs")
    if len({each.digest for each in ours}) > 1 and not any(each.platform for each in ours):
        raise InvalidParams(f"{source.reference} has several images; name one with :TAG")
    return ours[0]


def _checked(manifest: _Manifest, source: Source) -> _Manifest:
    if not 1 <= len(manifest.layers) <= MAX_LAYERS:
        raise InvalidParams(f"{source.reference} has {len(manifest.layers)} layers; 1 to {MAX_LAYERS} are supported")
    for layer in manifest.layers:
        if layer.media_type not in _LAYERS:
            raise InvalidParams(f"{source.reference} has a layer of the type {layer.media_type[:100]!r}, which is not supported")
    for blob in (manifest.config, *manifest.layers):
        if blob.size < 1:
            raise InvalidParams(f"{source.reference} names a blob of {blob.size} bytes")
    return manifest


def _document(source: Source, entry: _Entry) -> bytes:
    if entry.size > MAX_DOCUMENT:
        raise InvalidParams(f"{source.reference} has a document of {entry.size} bytes; at most {MAX_DOCUMENT} are read")
    data = source.document(entry.descriptor())
    found = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if found != entry.digest:
        raise Corrupt(what=f"blob {entry.digest} of {source.reference}", reason=f"its content has the digest {found}")
    return data


def _config(source: Source, manifest: _Manifest) -> dict[str, Any]:
    config: dict[str, Any] = read_json(_document(source, manifest.config), dict, f"the config of {source.reference}")
    machine = platform.machine()
    wanted = _GOARCH.get(machine, machine)
    if config.get("os", "linux") != "linux" or config.get("architecture", wanted) not in {wanted, ""}:
        told = f"{str(config.get('os'))[:30]}/{str(config.get('architecture'))[:30]}"
        raise InvalidParams(f"{source.reference} is an image for {told}; this machine runs linux/{wanted}")
    rootfs = config.get("rootfs")
    ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(ids, list) or len(ids) != len(manifest.layers):
        raise Corrupt(what=f"the config of {source.reference}", reason="it does not have one diff id per layer")
    return config


def _texts(value: object, what: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise InvalidParams(f"{what} holds something else where a list of texts belongs")
    return value


# -- layers ------------------------------------------------------------------------------------------------------------


def _merge(
    source: Source, manifest: _Manifest, config: dict[str, Any], scratch: Path, tick: Tick, stack: ExitStack
) -> MergedLayers:
    files: list[BinaryIO] = []

    def pieces(layer: int, start: int, size: int) -> Iterator[bytes]:
        end = start + size
        while start < end:
            data = os.pread(files[layer].fileno(), min(_PIECE, end - start), start)
            if not data:
                raise Corrupt(what=source.reference, reason="a layer that was unpacked has become shorter")
            start += len(data)
            yield data

    merged = MergedLayers(source.reference, pieces)
    members = content = total = 0
    for number, (entry, diff_id) in enumerate(zip(manifest.layers, config["rootfs"]["diff_ids"], strict=True)):
        plain = stack.enter_context(_unnamed(scratch))
        files.append(plain)
        name = f"layer {entry.digest} of {source.reference}"
        with source.blob(entry.descriptor()) as packed, full_disk_is_no_space(scratch):
            total += _unpack(packed, entry, str(diff_id), plain, name, _MAX_BYTES - total, tick)
        limits = Limits(LIMITS.members - members, LIMITS.bytes - content, LIMITS.names)
        found = list(_members(plain, name, limits, tick))
        members, content = members + len(found), content + sum(member.size for member in found)
        merged.apply(number, found, lambda done=members: tick(step="base", entries=done))  # type: ignore[misc]
    return merged


def _unnamed(folder: Path) -> BinaryIO:
    """A file without a name: whatever ends this process, its space comes back."""
    with full_disk_is_no_space(folder):
        return tempfile.TemporaryFile(dir=folder, buffering=0)


def _unpack(packed: BinaryIO, entry: _Entry, diff_id: str, out: BinaryIO, name: str, limit: int, tick: Tick) -> int:
    """Decompress one layer to `out` and hold both its digests against what manifest and config say; returns plain bytes."""
    taken, given = hashlib.sha256(), hashlib.sha256()
    stream = Inflated(packed, name, limit=limit, seen=taken.update)
    trouble: Corrupt | None = None
    try:
        while piece := stream.read(_PIECE):
            given.update(piece)
            view = memoryview(piece)
            while view:
                view = view[out.write(view) :]
            if stream.taken > entry.size:
                raise Corrupt(what=name, reason=f"it has more than the {entry.size:,} bytes that the manifest says")
            tick(step="base", bytes=stream.taken, total_bytes=entry.size)
    except Corrupt as error:  # a digest that is wrong says more than what became of the wrong bytes
        trouble = error
    stream.drain(entry.size)
    if stream.taken != entry.size or f"sha256:{taken.hexdigest()}" != entry.digest:
        raise Corrupt(what=name, reason=f"{stream.taken} bytes of it have the digest sha256:{taken.hexdigest()}")
    if trouble is not None:
        raise trouble
    if f"sha256:{given.hexdigest()}" != diff_id:
        raise Corrupt(what=name, reason=f"its tar has the digest sha256:{given.hexdigest()}, the config says {diff_id[:100]}")
    return stream.given


def _members(plain: BinaryIO, name: str, limits: Limits, tick: Tick) -> Iterator[TarMember]:
    """The members of an unpacked layer; their content is jumped over."""
    plain.seek(0)
    with os.fdopen(os.dup(plain.fileno()), "rb", buffering=64 * 1024) as file:
        reader = TarReader(file.read, name, limits=limits, strict=False)
        size = os.fstat(file.fileno()).st_size
        for number, member in enumerate(reader):
            if number % 1024 == 0:
                tick(step="base", entries=number)
            if member.start + member.size > size:
                raise Corrupt(what=name, reason="it is cut in the content of a member")
            file.seek(reader.jump())
            yield member
