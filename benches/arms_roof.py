"""The measured bodies that show what the machine can do."""

import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from body import BLOCK, Job, Phases, body, use


def _copy(target: np.ndarray, source: np.ndarray, threads: int) -> None:
    step = -(-source.size // threads)
    with ThreadPoolExecutor(threads) as pool:
        cuts = [slice(i, i + step) for i in range(0, source.size, step)]
        list(pool.map(lambda cut: np.copyto(target[cut], source[cut]), cuts))


@body
def roof_memcpy(job: Job) -> Phases:
    source, target = (np.full(job.shape.nbytes, value, np.uint8) for value in (1, 2))
    yield "ready"
    _copy(target, source, job.threads)
    yield "copied"


@body
def roof_memcpy_one_thread(job: Job) -> Phases:
    source, target = (np.full(job.shape.nbytes, value, np.uint8) for value in (1, 2))
    yield "ready"
    np.copyto(target, source)
    yield "copied"


@body
def roof_sum(job: Job) -> Phases:
    """The sum over a region that is mapped, with huge pages, and has been read before."""
    with open(job.shape.path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_HUGEPAGE)
    data = np.frombuffer(mapped, np.uint8)
    data = data[: data.size & ~7]
    use([data])
    yield "ready"
    use([data])
    yield "used"


def _parallel(path: str, flags: int, threads: int) -> Phases:
    """Read a whole file in blocks of 8 MiB, each thread into a buffer of its own that is resident."""
    descriptor = os.open(path, os.O_RDONLY | flags)
    size = os.fstat(descriptor).st_size
    share = -(-size // threads // BLOCK) * BLOCK
    buffers = [mmap.mmap(-1, BLOCK) for _ in range(threads)]
    for buffer in buffers:
        buffer.madvise(mmap.MADV_HUGEPAGE)
        buffer[:] = bytes(BLOCK)

    def run(thread: int) -> None:
        for start in range(thread * share, min((thread + 1) * share, size), BLOCK):
            os.preadv(descriptor, [buffers[thread]], start)

    yield "ready"
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, range(threads)))
    yield "read"
    os.close(descriptor)


@body
def roof_direct(job: Job) -> Phases:
    return _parallel(job.shape.path, os.O_DIRECT, 4 * job.threads)


@body
def roof_direct_few(job: Job) -> Phases:
    return _parallel(job.shape.path, os.O_DIRECT, job.threads)


@body
def roof_buffered(job: Job) -> Phases:
    return _parallel(job.shape.path, 0, job.threads)


@body
def roof_buffered_one(job: Job) -> Phases:
    return _parallel(job.shape.path, 0, 1)
