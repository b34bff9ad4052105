"""What goes into a crash package: the capture's files by frames, decompressed and looked through ahead.

The layers are held against their digests as wholes, meanwhile (`mothball.store.hashing.Checking`): that many files are hashed in
less time than one by one.
A frame holds many files. Looking through it as a whole for what could be a secret takes a fraction of looking through each file,
and happens beside the writing. Only files in which something may stand are then redacted one by one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Final, NamedTuple

from mothball.errors import Corrupt
from mothball.redact.files import CODE, HEAD, is_credentials, is_text, judged_as
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
_ORDINARY: Final = (CODE, "")
_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")
_LEAST_KEPT: Final = 2


class _Frame(NamedTuple):
    """A decompressed frame, and where something that may be a secret begins and ends, in rising order."""

    data: bytes
    starts: list[int]
    ends: list[int]


class Whole(NamedTuple):
    """A file that lies in one frame; `plain` when nothing in the frame that looks like a secret touches it."""

    data: bytes
    plain: bool


class Contents:
    """The content of a capture's files, asked for in the order of their paths. Use as a context manager, from one thread.

    A walk by paths reads forward in every layer and goes back and forth among the layers, so the last frames of each are kept, and
    the next ones of the layer that was read last are prepared by threads.
    """

    def __init__(self, tree: Tree, look: Look | None, ahead: int = 3) -> None:
        """`ahead`: so many frames are prepared before they are asked for. `look` finds what may be secret in a frame (by the
        numbers of its layer and its own); without it nothing is said to be plain."""
        self._tree = tree
        self._ahead = ahead
        self._look = look
        self._frames: OrderedDict[tuple[int, int], _Frame] = OrderedDict()
        self._coming: dict[tuple[int, int], Future[_Frame]] = {}
        self._pool = ThreadPoolExecutor(max(1, ahead), thread_name_prefix="package-frames")

    def __enter__(self) -> Contents:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._frames.clear()
        self._coming.clear()

    def whole(self, found: Found) -> Whole | None:
        """The content of a file that lies in one frame; None for one that does not."""
        row = found.row
        if not row.size:
            return Whole(b"", plain=True)
        frame = self._frame(found.layer, row.frame)
        begin, end = row.offset, row.offset + row.size
        content = frame.data[begin:end]
        if len(content) != row.size:
            return None
        # The first place that ends behind the file's beginning: plain when it begins behind the file's end.
        place = bisect_right(frame.ends, begin)
        return Whole(content, plain=place == len(frame.starts) or frame.starts[place] >= end)

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
            # A frame that this file fills to its end is looked at with the file, and not by itself.
            inside = bisect_right(starts, place + left) - 1
            piece = self._frame(found.layer, number, inside).data[start : start + left]
            place += len(piece)
            left -= len(piece)
            number += 1
            yield piece

    def _frame(self, layer: int, number: int, inside: int = 0) -> _Frame:
        """Frame `number`. Those below `inside` hold no file as a whole, and nothing is looked for in them."""
        key = (layer, number)
        frame = self._frames.get(key)
        if frame is not None:
            return frame
        coming = self._coming.pop(key, None)
        last = len(self._tree.layers[layer].toc.frames)
        # What was prepared for another layer is not waited for: it would be asked for again.
        for following in ((layer, each) for each in range(number + 1, min(number + 1 + self._ahead, last))):
            if following not in self._frames and following not in self._coming and len(self._coming) < 2 * self._ahead:
                self._coming[following] = self._pool.submit(self._read, following, following[1] >= inside)
        frame = self._read(key, number >= inside) if coming is None else coming.result()
        # The frames before the last one of a layer are done with: content lies in the order of paths.
        for old in [each for each in self._frames if each[0] == layer and each[1] < number - 1]:
            del self._frames[old]
        for old in [each for each in self._coming if each[0] == layer and each[1] < number]:
            self._coming.pop(old).cancel()
        self._frames[key] = frame
        while len(self._frames) > _LEAST_KEPT and sum(len(each.data) for each in self._frames.values()) > FRAME_BUDGET:
            self._frames.popitem(last=False)
        return frame

    def _read(self, key: tuple[int, int], look: bool) -> _Frame:
        layer = self._tree.layers[key[0]]
        data = read_frame(layer.file, layer.toc, key[1])
        if self._look is None or not look:
            return _Frame(data, [0], [len(data)])
        found = self._look(*key)
        return _Frame(data, [start for start, _ in found], [end for _, end in found])


def learn_credentials(tree: Tree, redactor: Redactor, tick: Callable[[int], None]) -> None:
    """Make known to `redactor` what the credential files of a capture hold, which are told by their names (.env, .netrc, ...):
    it is a secret wherever else it stands. Done once for each capture.

    `tick` is told how many names were seen. Raises `Corrupt` for a damaged one, when all the others were read.
    """
    if tree.digest in redactor.sources:
        return
    damage: Corrupt | None = None
    for count, paths in enumerate(tree.names()):
        tick(_NAMES * count)
        for path in paths:
            if is_credentials(path) and (found := tree.locate(path)) is not None and found.row.type in "fh":
                try:
                    with tree.open_file(path) as file:
                        redactor.learn(path, file.read(LEARN_LIMIT))
                except Corrupt as error:
                    damage = damage or error
    if damage is not None:
        raise damage
    redactor.sources.add(tree.digest)


def look_at_frame(tree: Tree, redactor: Redactor, layer: int, number: int) -> list[tuple[int, int]]:
    """Where something that may be a secret begins and ends in a frame, in rising order."""
    data = read_frame(tree.layers[layer].file, tree.layers[layer].toc, number)
    return [(span.start, span.end) for span in redactor.spans(data, 0, len(data), CODE)]


def look_at_binary(tree: Tree, redactor: Redactor, path: bytes) -> list[str] | None:
    """The rules that fire in a file of the capture, sorted; None for one that is text."""
    found = tree.locate(path)
    with Contents(tree, None, ahead=0) as contents:
        if found is None or is_text(next(contents.pieces(found), b"")[:HEAD]):
            return None
        return sorted(redactor.binary(contents.pieces(found)))


def any_secret(redactor: Redactor, names: list[bytes]) -> bool:
    """True when one of `names` may hold a secret; asked of many together."""
    joined = b"\0".join(names)
    return bool(redactor.spans(joined, 0, len(joined), CODE))


def apart(name: bytes, data: bytes) -> bool:
    """True for a file of which a look at many together does not say whether it is clean.

    Its name sets it a stricter standard, it is UTF-16, or its last byte touches what follows it in the tar.
    """
    return len(data) % BLOCK == 0 or stricter(name, data, 0, len(data)) or data[:2] in _MARKS


def large_apart(name: bytes, size: int, head: bytes) -> bool:
    """`apart` for a file that is never in memory as a whole; `head` is how it begins."""
    return size % BLOCK == 0 or head[:2] in _MARKS or judged_as(name) != _ORDINARY
