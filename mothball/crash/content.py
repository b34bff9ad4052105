"""What goes into a crash package: the capture's files by frames, decompressed ahead, and which of them are judged by themselves.

The layers are held against their digests as wholes, meanwhile (`mothball.store.hashing.Checking`): that many files are hashed in
less time than one by one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Final

from mothball.errors import Corrupt
from mothball.redact.files import CODE, is_credentials
from mothball.redact.formats import stricter
from mothball.store.merge import Found
from mothball.store.read import show
from mothball.store.tarhead import BLOCK
from mothball.store.toc import read_frame
from mothball.store.tree import Tree

if TYPE_CHECKING:
    from mothball.crash.looker import Look
    from mothball.redact.engine import Redactor

FRAME_BUDGET: Final = 256 * 1024**2
"""Most bytes of decompressed frames kept at once; two frames are kept whatever their size."""
LEARN_LIMIT: Final = 1024**2
"""Bytes of a credential file that are read for values to look for everywhere."""
_NAMES: Final = 1024
_REMEMBERED: Final = 16
_BATCH: Final = 256
_AHEAD: Final = 8
_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")
_LEAST_KEPT: Final = 2


class Contents:
    """The content of a capture's files, asked for in the order of their paths. Use as a context manager, from one thread.

    A walk by paths reads forward in every layer and goes back and forth among the layers, so the last frames of each are kept, and
    the next ones of the layer that was read last are prepared by threads.
    """

    def __init__(self, tree: Tree, ahead: int = 3) -> None:
        """`ahead`: so many frames are decompressed before they are asked for."""
        self._tree = tree
        self._ahead = ahead
        self._frames: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._coming: dict[tuple[int, int], Future[bytes]] = {}
        self._pool = ThreadPoolExecutor(max(1, ahead), thread_name_prefix="package-frames")

    def __enter__(self) -> Contents:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._frames.clear()
        self._coming.clear()

    def whole(self, found: Found) -> bytes | None:
        """The content of a file that lies in one frame; None for one that does not."""
        row = found.row
        if not row.size:
            return b""
        content = self._frame(found.layer, row.frame)[row.offset : row.offset + row.size]
        return content if len(content) == row.size else None

    def pieces(self, found: Found) -> Iterator[bytes]:
        """The content of a file of any size, frame by frame."""
        row = found.row
        layer = self._tree.layers[found.layer]
        starts = layer.toc.starts
        place, left = (starts[row.frame] + row.offset, row.size) if row.size else (0, 0)
        number = bisect_right(starts, place) - 1
        while left:
            if number >= len(layer.toc.frames):
                raise layer.toc.corrupt(f"{show(row.path)} claims content outside its frames")
            start = place - starts[number]
            piece = self._frame(found.layer, number)[start : start + left]
            place += len(piece)
            left -= len(piece)
            number += 1
            yield piece

    def _frame(self, layer: int, number: int) -> bytes:
        key = (layer, number)
        frame = self._frames.get(key)
        if frame is not None:
            return frame
        coming = self._coming.pop(key, None)
        last = len(self._tree.layers[layer].toc.frames)
        # What was prepared for another layer is not waited for: it would be asked for again.
        for following in ((layer, each) for each in range(number + 1, min(number + 1 + self._ahead, last))):
            if following not in self._frames and following not in self._coming and len(self._coming) < 2 * self._ahead:
                self._coming[following] = self._pool.submit(self._read, following)
        frame = self._read(key) if coming is None else coming.result()
        # The frames before the last one of a layer are done with: content lies in the order of paths.
        for old in [each for each in self._frames if each[0] == layer and each[1] < number - 1]:
            del self._frames[old]
        for old in [each for each in self._coming if each[0] == layer and each[1] < number]:
            self._coming.pop(old).cancel()
        self._frames[key] = frame
        while len(self._frames) > _LEAST_KEPT and sum(map(len, self._frames.values())) > FRAME_BUDGET:
            self._frames.popitem(last=False)
        return frame

    def _read(self, key: tuple[int, int]) -> bytes:
        layer = self._tree.layers[key[0]]
        return read_frame(layer.file, layer.toc, key[1])


def learn_credentials(tree: Tree, redactor: Redactor, tick: Callable[[int], None]) -> None:
    """Make known to `redactor` what the credential files of a capture hold, which are told by their names (.env, .netrc, ...):
    it is a secret wherever else it stands. Done once for each capture.

    `tick` is told how many names were seen. Raises `Corrupt` for a damaged one, when all the others were read.
    """
    if tree.digest in redactor.sources:
        return
    damage: Corrupt | None = None
    for path in _credential_files(tree, tick):
        if (found := tree.locate(path)) is not None and found.row.type in "fh":
            try:
                with tree.open_file(path) as file:
                    redactor.learn(path, file.read(LEARN_LIMIT))
            except Corrupt as error:
                damage = damage or error
    if damage is not None:
        raise damage
    redactor.sources.add(tree.digest)


_credential_paths: OrderedDict[str, tuple[bytes, ...]] = OrderedDict()
"""Of the last captures: their digest, and where their credential files are. A worker reports the same one again and again."""


def _credential_files(tree: Tree, tick: Callable[[int], None]) -> tuple[bytes, ...]:
    paths = _credential_paths.get(tree.digest)
    if paths is None:
        found: list[bytes] = []
        for count, some in enumerate(tree.names()):
            tick(_NAMES * count)
            found += filter(is_credentials, some)
        paths = _credential_paths[tree.digest] = tuple(found)
        while len(_credential_paths) > _REMEMBERED:
            _credential_paths.popitem(last=False)
    return paths


def any_secret(redactor: Redactor, names: bytes) -> bool:
    """True when one of `names`, with NULs between them, may hold a secret."""
    return bool(redactor.spans(names, 0, len(names), CODE))


def batches(rows: Iterator[Found], ask: Look) -> Iterator[tuple[list[Found], bool]]:
    """The entries, some at a time, and whether one of their names may hold a secret: `any_secret` is asked of those ahead."""
    ahead: deque[tuple[list[Found], Future[bool]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="package-names") as pool:
        while True:
            while len(ahead) < _AHEAD and (batch := list(islice(rows, _BATCH))):
                names = [name for found in batch for name in (found.row.path.rpartition(b"/")[2], found.row.link) if name]
                ahead.append((batch, pool.submit(ask, b"\0".join(names))))
            if not ahead:
                return
            batch, secret = ahead.popleft()
            yield batch, secret.result()


def judged_apart(name: bytes, data: bytes) -> bool:
    """True for a file of which a look at many together does not say whether it is clean.

    Its name sets it a stricter standard, it is UTF-16, or its last byte touches what follows it in the tar.
    """
    if not data:
        return False
    return len(data) % BLOCK == 0 or stricter(name, data, 0, len(data)) or data[:2] in _MARKS
