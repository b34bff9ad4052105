"""What goes into a crash package: the capture's files by frames, decompressed ahead, each held against its sha256."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from types import TracebackType
from typing import Final

from mothball.errors import Corrupt
from mothball.store.merge import Found
from mothball.store.read import show
from mothball.store.toc import read_frame
from mothball.store.tree import Tree

FRAME_BUDGET: Final = 256 * 1024**2
"""Most bytes of decompressed frames kept at once; two frames are kept whatever their size."""


class Contents:
    """The content of a capture's files, asked for in the order of their paths. Use as a context manager, from one thread.

    A walk by paths reads forward in every layer and goes back and forth among the layers, so the last frames of each are kept, and
    the next one of the layer that was read last is decompressed by a thread.
    """

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._frames: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._coming: tuple[tuple[int, int], Future[bytes]] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="package-frames")

    def __enter__(self) -> Contents:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._frames.clear()

    def whole(self, found: Found) -> bytes | None:
        """The content of a file that lies in one frame, verified; None for one that does not. Raises `Corrupt`."""
        row = found.row
        if not row.size:
            return b""
        frame = self._frame(found.layer, row.frame)
        content = frame[row.offset : row.offset + row.size]
        if len(content) != row.size:
            return None
        if sha256(content).digest() != row.sha256:
            raise self._mismatch(found)
        return content

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
            piece = self._frame(found.layer, number)[start : start + left]
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

    def _frame(self, layer: int, number: int) -> bytes:
        key = (layer, number)
        data = self._frames.get(key)
        if data is not None:
            return data
        if self._coming is not None and self._coming[0] == key:
            data = self._coming[1].result()
        else:
            data = self._read(key)
        self._keep(key, data)
        following = (layer, number + 1)
        if number + 1 < len(self._tree.layers[layer].toc.frames) and following not in self._frames:
            self._coming = following, self._pool.submit(self._read, following)
        return data

    def _keep(self, key: tuple[int, int], data: bytes) -> None:
        # The frames before the last one of a layer are done with: content lies in the order of paths.
        for old in [each for each in self._frames if each[0] == key[0] and each[1] < key[1] - 1]:
            del self._frames[old]
        self._frames[key] = data
        while len(self._frames) > 2 and sum(map(len, self._frames.values())) > FRAME_BUDGET:  # noqa: PLR2004 - see above
            self._frames.popitem(last=False)

    def _read(self, key: tuple[int, int]) -> bytes:
        layer = self._tree.layers[key[0]]
        return read_frame(layer.file, layer.toc, key[1])
