"""Writing a layer: one tar, cut into independent zstd frames, with its table of contents behind it.

The caller fills a buffer, this module compresses, hashes and writes it behind the caller's back. Memory is bounded by the
buffers in flight (`threads` + 2 of `frame_bytes`), never by the tree. Frames are cut by sizes alone and compressed one by
one, so the same entries give the same bytes however many threads there are.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import zstandard

from mothball.store.blobs import BlobStore, BlobWriter
from mothball.store.manifest import LAYER_CONTENT, MEDIA_LAYER, TOC_DIGEST, TOC_OFFSET, TOC_SIZE, Descriptor
from mothball.store.toc import Row, encode_toc, skippable_frame

_ROW_SHA = 7
FLUSH_EVERY = 32 * 1024**2
"""Compressed bytes after which what was written is flushed to disk beside the work, so that the end need not wait."""


class Layer(NamedTuple):
    """A finished layer. `new` is False when the store had this very blob already."""

    descriptor: Descriptor
    diff_id: str
    new: bool


class Mark(NamedTuple):
    """A point in the stream to which `LayerWriter.rewind` returns."""

    blob: tuple[object, int]
    diff: Any
    frames: int


class LayerWriter:
    """One layer on its way. Use as a context manager; without `finish` nothing is published.

    `hashed_later` takes (start, end, row) of files that lie whole in the current frame: their sha256 is put into the row
    beside the compression, and is there after `drain`. `view` (of `frame_bytes`) is filled by the caller up to `position`;
    `flush` hands its buffer over and takes a fresh one.
    """

    def __init__(self, blobs: BlobStore, *, frame_bytes: int, level: int, threads: int) -> None:
        frame_bytes &= -512  # whole tar blocks, so that a header never begins in the middle of one
        self.frame_bytes = frame_bytes
        self.position = 0
        self._level = level
        self._blob: BlobWriter = blobs.writer()
        self._diff = hashlib.sha256()
        self._frames: list[tuple[int, int, int]] = []
        self._handed = 0
        self._free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        for _ in range(threads + 1):
            self._free.put(bytearray(frame_bytes))
        self._fresh(bytearray(frame_bytes))
        self._local = threading.local()
        self._compress = ThreadPoolExecutor(threads, thread_name_prefix="compress")
        self._write = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flush") if blobs.fsync else None
        self._flushed: Future[None] | None = None
        self._flushed_at = 0
        self._pending: list[Future[None]] = []

    def __enter__(self) -> LayerWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        for pool in (self._compress, self._write, self._flusher):
            if pool:
                pool.shutdown(wait=True, cancel_futures=True)
        self._blob.__exit__()
        self._release()

    def _release(self) -> None:
        """Give the buffers back: the table of contents of a large tree needs as much again."""
        self._fresh(bytearray())
        self._free = queue.SimpleQueue()

    @property
    def frame(self) -> int:
        """Number of the frame that `buffer` will become."""
        return self._handed

    @property
    def stored(self) -> int:
        """Compressed bytes written so far."""
        return self._blob.size

    def room(self) -> int:
        return self.frame_bytes - self.position

    def append(self, data: bytes) -> None:
        """Copy `data` (headers, padding) into the stream, over as many frames as it needs."""
        view = memoryview(data)
        while view:
            if not self.room():
                self.flush()
            part = view[: self.room()]
            self.buffer[self.position : self.position + len(part)] = part
            self.position += len(part)
            view = view[len(part) :]

    def flush(self) -> None:
        """Close the current frame; raises what went wrong in the background, `NoSpace` above all."""
        self._raise_failures()
        if not self.position:
            return
        raw, size = self.buffer, self.position
        packed = self._compress.submit(self._pack, raw, size, self.hashed_later)
        self._pending.append(self._write.submit(self._store, packed, raw, size))
        self._handed += 1
        self.position = 0
        self._fresh(self._take())

    def _fresh(self, buffer: bytearray) -> None:
        self.hashed_later: list[tuple[int, int, list[Any]]] = []
        self.buffer = buffer
        self.view = memoryview(buffer)

    def _take(self) -> bytearray:
        while True:
            try:
                return self._free.get(timeout=1.0)
            except queue.Empty:
                self._raise_failures()

    def _raise_failures(self) -> None:
        while self._pending and self._pending[0].done():
            self._pending.pop(0).result()

    def _pack(self, raw: bytearray, size: int, hashed: list[tuple[int, int, list[Any]]]) -> bytes:
        compressor = getattr(self._local, "compressor", None)
        if compressor is None:
            compressor = zstandard.ZstdCompressor(level=self._level, write_checksum=True, write_content_size=True)
            self._local.compressor = compressor
        sha256 = hashlib.sha256
        with memoryview(raw) as view:
            for start, end, row in hashed:
                row[_ROW_SHA] = sha256(view[start:end]).digest()
            return compressor.compress(view[:size])

    def _store(self, packed: Future[bytes], raw: bytearray, size: int) -> None:
        try:
            with memoryview(raw) as view:
                self._diff.update(view[:size])
                data = packed.result()
        finally:
            self._free.put(raw)
        self._frames.append((self._blob.size, len(data), size))
        self._blob.write(data)
        if self._flusher and self._blob.size - self._flushed_at >= FLUSH_EVERY and (not self._flushed or self._flushed.done()):
            self._flushed_at = self._blob.size
            if self._flushed:
                self._flushed.result()  # the kernel tells a failed write-back once, and not to the fsync that follows
            self._flushed = self._flusher.submit(self._blob.flush)

    def drain(self) -> None:
        """Close the current frame and wait until everything handed over is written."""
        self.flush()
        while self._pending:
            self._pending.pop(0).result()

    def mark(self) -> Mark:
        """Close the current frame and remember this point."""
        self.drain()
        return Mark(self._blob.mark(), self._diff.copy(), len(self._frames))

    def rewind(self, mark: Mark) -> None:
        """Forget everything after `mark`."""
        self.position = 0
        self.drain()
        self._blob.rewind(mark.blob)
        self._diff = mark.diff.copy()
        del self._frames[mark.frames :]
        self._handed = mark.frames

    def finish(self, rows: list[Row], removed: list[bytes], content: int) -> Layer:
        """Close the last frame, append the table of contents, publish the blob. `content`: bytes of its files."""
        self.drain()
        if self._flushed:
            self._flushed.result()
        self._release()
        toc = encode_toc(rows, self._frames, removed, content)
        offset = self._blob.size + 8
        self._blob.write(skippable_frame(toc.payload))
        size = self._blob.size
        digest, new = self._blob.commit()
        notes = {
            TOC_OFFSET: str(offset),
            TOC_SIZE: str(len(toc.payload)),
            TOC_DIGEST: toc.index_digest,
            LAYER_CONTENT: str(content),
        }
        return Layer(Descriptor(MEDIA_LAYER, digest, size, notes), f"sha256:{self._diff.hexdigest()}", new)
