"""Memory that is promised now and taken as it is used."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import re
from pathlib import Path

import torch
from torch import Tensor

# Private mappings of files: all of them in maps; in smaps those that cannot be written, and of which no page
# was (a library's relocated pages were). See proc_pid_maps(5) and proc_pid_smaps(5).
_PLACE = r"^(?P<begin>[0-9a-f]+)-(?P<end>[0-9a-f]+) "
_FILE = re.compile(_PLACE + r"...p \S+ \S+ \d+ +/", re.MULTILINE)
_WHOLLY_FILE = re.compile(
    _PLACE + r".-.p \S+ \S+ \d+ +(?P<path>/.*)$(?:\n\w+: .*)*?\nAnonymous: +0 kB$", re.MULTILINE
)


def lazy_zeros(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu", *, huge: bool = False
) -> Tensor:
    """Zeros whose pages a CPU takes only when they are first written; elsewhere plain zeros.

    torch.zeros writes its zeros, and so takes all the memory at once; a fresh anonymous mapping does not, and
    a private one (not Python's default) does not where it is only read, either. `huge` asks for huge pages,
    for what is written as a whole and read often: on one machine it was read 15 % faster.
    """
    if torch.device(device).type != "cpu" or math.prod(shape) == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    if hasattr(mmap, "MAP_PRIVATE"):
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:  # Windows, whose mappings are private
        mapping = mmap.mmap(-1, size)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=dtype).view(shape)


def give_back() -> None:
    """Have the C library return what it holds of freed memory, where it can be asked."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def drop_pages(tensor: Tensor) -> None:
    """Have the system drop the pages of a tensor that lies in a mapped file and was only read: what reads it
    again reads the file again. Other tensors, and other systems than Linux, are left alone."""
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    files = _FILE.finditer(_read("/proc/self/maps"))
    if any(_place(file)[0] <= begin < end <= _place(file)[1] for file in files):
        _drop(begin, end)


def drop_library_pages() -> None:
    """Have the system drop what lies in memory of libraries' files: starting uses much of them that nothing
    uses again. What is used comes back from the system's cache of files. Does nothing but on Linux."""
    for file in _WHOLLY_FILE.finditer(_read("/proc/self/smaps")):
        if ".so" in Path(file["path"]).suffixes:
            _drop(*_place(file))


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).is_file() else ""


def _place(mapping: re.Match[str]) -> tuple[int, int]:
    return int(mapping["begin"], 16), int(mapping["end"], 16)


def _drop(begin: int, end: int) -> None:
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
