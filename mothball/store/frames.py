"""The frames of a capture's layers in the order in which many files are read, each decompressed once and ahead of its use."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from types import TracebackType
from typing import Final

from mothball.errors import Corrupt
from mothball.store.merge import Found
from mothball.store.read import Layer, show
from mothball.store.toc import read_frame

_AHEAD: Final = 3
_EMPTY_PER_UNIT: Final = 256

Unit = list[Found]
"""Files whose content begins in the same frame."""


class Frames:
    """Content of files by frames, at most five of them (64 MiB each at the worst) in memory. Use as a context manager.

    `ahead` are files in the order in which they will be asked for: their frames are decompressed by a thread, so that the
    caller finds them done. What is asked for in another order is decompressed when it is asked for.
    """

    def __init__(self, layers: Sequence[Layer], ahead: Iterable[Unit] = ()) -> None:
        self._layers = layers
        self._known: dict[tuple[int, int], bytes] = {}
        self._coming: deque[tuple[tuple[int, int], Future[bytes]]] = deque()
        self._keys = self._frames_of(ahead)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="frames")

    def __enter__(self) -> Frames:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def pieces(self, found: Found) -> Iterator[memoryview]:
        """The content, frame by frame. `Corrupt` for a frame that is damaged and for a table that points outside."""
        row = found.row
        if not row.size:
            return  # its frame means nothing, and was not checked
        layer = self._layers[found.layer]
        starts = layer.toc.starts
        place, left = starts[row.frame] + row.offset, row.size
        number = bisect_right(starts, place) - 1
        while left:
            if number >= len(layer.toc.frames):
                raise layer.toc.corrupt(f"{show(row.path)} claims content outside its frames")
            start = place - starts[number]
            piece = memoryview(self.frame(found.layer, number))[start : start + left]
            yield piece
            place += len(piece)
            left -= len(piece)
            number += 1

    def mismatch(self, found: Found) -> Corrupt:
        """The error for content that is not what the table of contents says."""
        layer = self._layers[found.layer]
        reason = f"the content of {show(found.row.path)} does not match its sha256"
        return Corrupt(what=f"layer {layer.digest}", reason=reason, digest=layer.digest)

    def frame(self, layer: int, number: int) -> bytes:
        """One frame, decompressed."""
        key = (layer, number)
        data = self._known.get(key)
        if data is None:
            while len(self._known) > 1:
                del self._known[next(iter(self._known))]
            data = self._known[key] = self._fetch(key)
        return data

    def _fetch(self, key: tuple[int, int]) -> bytes:
        coming = self._coming
        if any(each == key for each, _ in coming):
            while coming[0][0] != key:
                coming.popleft()[1].cancel()
            future = coming.popleft()[1]
        else:
            future = None
        while len(coming) < _AHEAD and (following := next(self._keys, None)) is not None:
            if following != key and following not in self._known:
                coming.append((following, self._pool.submit(self._read, following)))
        return future.result() if future is not None else self._read(key)

    def _read(self, key: tuple[int, int]) -> bytes:
        layer = self._layers[key[0]]
        return read_frame(layer.file, layer.toc, key[1])

    def _frames_of(self, ahead: Iterable[Unit]) -> Iterator[tuple[int, int]]:
        for unit in ahead:
            if not unit[0].row.size:
                continue
            last = unit[-1].row
            starts = self._layers[unit[-1].layer].toc.starts
            stop = bisect_right(starts, starts[last.frame] + last.offset + last.size - 1)
            for number in range(unit[0].row.frame, stop):
                yield unit[-1].layer, number


def units(files: Iterable[Found]) -> Iterator[Unit]:
    """`files` (sorted as a `Selection` has them) in portions of one frame each; empty files in portions of their own."""
    for (layer, _), group in groupby(files, key=lambda found: (found.layer, found.row.frame) if found.row.size else (-1, 0)):
        portion = list(group)
        if layer >= 0:
            yield portion
            continue
        for start in range(0, len(portion), _EMPTY_PER_UNIT):
            yield portion[start : start + _EMPTY_PER_UNIT]
