"""What goes into a crash package: the capture's files by frames, decompressed and looked through ahead, held against their sha256.

A frame holds many files. Looking through it as a whole for what could be a secret takes a fraction of looking through each file,
and happens beside the writing. Only files in which something may stand are then redacted one by one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from types import TracebackType
from typing import TYPE_CHECKING, Final, NamedTuple

from mothball.errors import Corrupt
from mothball.redact.files import CODE, judged_as
from mothball.redact.formats import stricter
from mothball.store.merge import Found
from mothball.store.read import show
from mothball.store.tarhead import BLOCK
from mothball.store.toc import read_frame
from mothball.store.tree import Tree

if TYPE_CHECKING:
    from mothball.redact.engine import Redactor

FRAME_BUDGET: Final = 256 * 1024**2
"""Most bytes of decompressed frames kept at once; two frames are kept whatever their size."""
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

    def __init__(self, tree: Tree, redactor: Redactor | None, ahead: int = 2) -> None:
        """`ahead`: so many frames are prepared before they are asked for. Without `redactor` nothing is said to be plain."""
        self._tree = tree
        self._ahead = ahead
        self._redactor = redactor
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
        """The content of a file that lies in one frame; None for one that does not. `Corrupt` when its sha256 is another."""
        row = found.row
        if not row.size:
            return Whole(b"", plain=True)
        frame = self._frame(found.layer, row.frame)
        begin, end = row.offset, row.offset + row.size
        content = frame.data[begin:end]
        if len(content) != row.size:
            return None
        # By a thread it would take longer: for each file that would have to wait for the interpreter lock again.
        if sha256(content).digest() != row.sha256:
            raise self._mismatch(found)
        # The first place that ends behind the file's beginning: plain when it begins behind the file's end.
        place = bisect_right(frame.ends, begin)
        return Whole(content, plain=place == len(frame.starts) or frame.starts[place] >= end)

    def pieces(self, found: Found) -> Iterator[bytes]:
        """The content of a file of any size, frame by frame. It was verified when the iteration ends; `Corrupt` ends it else."""
        row = found.row
        layer = self._tree.layers[found.layer]
        starts = layer.toc.starts
        place, left = (starts[row.frame] + row.offset, row.size) if row.size else (0, 0)
        number = bisect_right(starts, place) - 1
        sha = sha256()
        while left:
            if number >= len(layer.toc.frames):
                raise layer.toc.corrupt(f"{show(row.path)} claims content outside its frames")
            start = place - starts[number]
            # A frame that this file fills to its end is looked at with the file, and not by itself.
            inside = bisect_right(starts, place + left) - 1
            piece = self._frame(found.layer, number, inside).data[start : start + left]
            sha.update(piece)
            place += len(piece)
            left -= len(piece)
            number += 1
            yield piece
        if row.size and sha.digest() != row.sha256:
            raise self._mismatch(found)

    def _mismatch(self, found: Found) -> Corrupt:
        layer = self._tree.layers[found.layer]
        reason = f"the content of {show(found.row.path)} does not match its sha256"
        return Corrupt(what=f"layer {layer.digest}", reason=reason, digest=layer.digest)

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
        if self._redactor is None or not look:
            return _Frame(data, [0], [len(data)])
        spans = self._redactor.spans(data, 0, len(data), CODE)
        return _Frame(data, [span.start for span in spans], [span.end for span in spans])


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
