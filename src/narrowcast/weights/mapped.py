"""Files in memory as the system maps them: bytes are read where they are touched, and it may drop them again."""

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

# Of bytes that are never written nothing has to be reserved, however many: without this, or read only, Linux refuses
# to map a file that is larger than memory. Read only, whoever writes into a tensor would end the process.
NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
POPULATE_READ = 22  # of Linux 5.14: mmap has no name for it yet, and its madvise lets no other thread run meanwhile


class MappedFile:
    """The bytes of a file that is not empty, and views of them, uint8. What is written into them never reaches it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        weakref.finalize(self, os.close, self._descriptor)
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | NO_RESERVE
        self._map = mmap.mmap(self._descriptor, 0, flags=flags, prot=protection)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def holds(self, part: Tensor) -> bool:
        """True for a view of these bytes."""
        return part.untyped_storage().data_ptr() == self.bytes.data_ptr()

    def read(self, *views: Tensor) -> None:
        """Come back when views, in the order of the file, have been read; other threads run meanwhile."""
        madvise = ctypes.CDLL(None).madvise
        for start, stop in self._runs(views):
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            address, length = self.bytes.data_ptr() + first, stop - first
            if madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), POPULATE_READ):
                self.bytes[start : stop : mmap.PAGESIZE].numpy().sum()  # a byte of each page, where it is not known

    def forget(self, *views: Tensor, everywhere: bool = True) -> None:
        """Take views out of this process's memory, and `everywhere` out of the system's: what are whole pages."""
        for start, stop in self._runs(views):
            first, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
            if first < end:
                self._map.madvise(mmap.MADV_DONTNEED, first, end - first)
                if everywhere:
                    os.posix_fadvise(self._descriptor, first, end - first, os.POSIX_FADV_DONTNEED)

    def _runs(self, views: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
        """From where to where views lie behind each other: as far as can be, since large pages go as a whole."""
        start = stop = 0
        for view in views:
            place = view.data_ptr() - self.bytes.data_ptr()
            rows = view[None] if view.is_contiguous() else view
            for row in range(len(rows)):
                if (first := place + row * rows.stride(0)) != stop:
                    yield start, stop
                    start = first
                stop = first + rows[0].numel()
        yield start, stop
