"""What the benchmarks ask the kernel: what is cached, what a process holds, what it has faulted in."""

import ctypes
import mmap
import os
import resource
from pathlib import Path

PAGE = mmap.PAGESIZE
SMALL = 2 << 30  # files up to here are asked about page by page, with mincore
NR_CACHESTAT = 451

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


def _check(failed: bool) -> None:
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _mincore(descriptor: int, length: int) -> int:
    """Pages of a file that are in memory. The mapping is never touched."""
    address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    _check(address == ctypes.c_void_p(-1).value)
    try:
        seen = ctypes.create_string_buffer(-(-length // PAGE))
        _check(_libc.mincore(address, length, seen) != 0)
        return seen.raw.count(1)
    finally:
        _libc.munmap(address, length)


def _cachestat(descriptor: int, length: int) -> int:
    """The same, for files so large that mincore takes seconds."""
    span = (ctypes.c_uint64 * 2)(0, length)
    answer = (ctypes.c_uint64 * 5)()
    _check(_libc.syscall(NR_CACHESTAT, descriptor, span, answer, 0) != 0)
    return answer[0]


def resident(files: tuple[str, ...]) -> float:
    """The share of these files' pages that is in memory."""
    pages = cached = 0
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            length = os.fstat(descriptor).st_size
            pages += -(-length // PAGE)
            if length:
                cached += (_mincore if length <= SMALL else _cachestat)(descriptor, length)
        finally:
            os.close(descriptor)
    return cached / max(pages, 1)


def evict(files: tuple[str, ...]) -> None:
    """Write files back and drop them from the page cache."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def fill(files: tuple[str, ...]) -> None:
    """Bring files into the page cache by plain reads of 2 MiB, from a clean start."""
    evict(files)
    buffer = bytearray(2 << 20)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def rewrite(files: tuple[str, ...]) -> None:
    """Bring files into the page cache as a good writer leaves them: cut at file offsets of 2 MiB."""
    for path in files:
        data = memoryview(Path(path).read_bytes())
        evict((path,))
        with open(path, "r+b", buffering=0) as file:
            for start in range(0, len(data), 2 << 20):
                file.write(data[start : start + (2 << 20)])
            os.fsync(file.fileno())


def sync_to_disk(path: str) -> None:
    """What makes a new file durable: fsync of it and of its directory."""
    for name in (path, os.path.dirname(path)):
        descriptor = os.open(name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def faults() -> tuple[int, int]:
    """Minor and major page faults of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt, usage.ru_majflt


def _kib(path: str, *fields: str) -> dict[str, int]:
    lines = Path(path).read_text().splitlines()
    found = (line.split() for line in lines)
    return {parts[0][:-1]: int(parts[1]) for parts in found if parts[0][:-1] in fields}


def reset_peak() -> None:
    """Let the peak of this process's memory start again from what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def memory(pid: int | str = "self") -> dict[str, int]:
    """What a process holds, in KiB: peak and present, private (anonymous), its proportion, page tables."""
    status = _kib(f"/proc/{pid}/status", "VmHWM", "VmRSS", "VmPTE")
    return status | _kib(f"/proc/{pid}/smaps_rollup", "Anonymous", "Pss")
