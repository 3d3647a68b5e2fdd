"""The measured bodies, and the process that takes samples of one of them.

A body is a generator. What it does up to its first ``yield`` is set-up; from then on the clock runs, and
each ``yield`` names the phase that has just ended. Run as a script, this takes one request as JSON and prints
one answer: see ``sample``.
"""

import gc
import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import kernel
import numpy as np
from shapes import MIB, Shape

CHUNK = 2 * MIB
BLOCK = 8 * MIB
DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "BF16": "<u2", "F8_E4M3": "u1", "U8": "u1"}


@dataclass(frozen=True)
class Job:
    """What a body works on."""

    shape: Shape
    out: str  # a new file, for savers
    threads: int


Phases = Iterator[str]
Body = Callable[[Job], Phases]
BODIES: dict[str, Body] = {}


def body(function: Body) -> Body:
    BODIES[function.__name__] = function
    return function


def use(arrays: Iterable[Any]) -> int:
    """Read every byte: the sum of the 64-bit words, by numpy on one thread, whoever loaded them."""
    total = 0
    for array in arrays:
        flat = np.asarray(array).reshape(-1).view(np.uint8)
        whole = flat.size & ~7
        total += int(flat[:whole].view(np.uint64).sum()) if whole else 0
        total += int(flat[whole:].sum()) if whole < flat.size else 0
    return total


def plain_header(file: Any) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file as the json module reads it, and where the data starts."""
    length = int.from_bytes(file.read(8), "little")
    table = json.loads(file.read(length))
    table.pop("__metadata__", None)
    return table, 8 + length


def plain_views(buffer: Any, table: dict[str, Any], start: int) -> dict[str, np.ndarray]:
    """Numpy views of a whole file, by hand."""
    data = np.frombuffer(buffer, np.uint8)
    return {name: plain_view(data, entry, start) for name, entry in table.items()}


def plain_view(data: np.ndarray, entry: dict[str, Any], start: int) -> np.ndarray:
    first, end = entry["data_offsets"]
    return data[start + first : start + end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


# --- Loading ---------------------------------------------------------------------------------------------


def loader(load: Callable[[str], dict[str, Any]], path: str) -> Phases:
    """Everything loaded, then every byte read."""
    yield "ready"
    tensors = load(path)
    yield "load"
    use(tensors.values())
    yield "used"


@body
def ours_numpy(job: Job) -> Phases:
    import maptensors.numpy

    return loader(maptensors.numpy.load_file, job.shape.path)


@body
def ours_numpy_populate(job: Job) -> Phases:
    import maptensors

    return loader(lambda path: maptensors.open(path, populate=True).numpy(), job.shape.path)


@body
def st_numpy(job: Job) -> Phases:
    import safetensors.numpy

    return loader(safetensors.numpy.load_file, job.shape.path)


@body
def st_numpy_pread(job: Job) -> Phases:
    import safetensors.numpy

    return loader(lambda path: safetensors.numpy.load_file(path, backend="pread"), job.shape.path)


@body
def memmap_numpy(job: Job) -> Phases:
    def load(path: str) -> dict[str, np.ndarray]:
        with open(path, "rb") as file:
            table, start = plain_header(file)
        return plain_views(np.memmap(path, np.uint8, "r"), table, start)

    return loader(load, job.shape.path)


@body
def raw_mmap(job: Job) -> Phases:
    def load(path: str) -> dict[str, np.ndarray]:
        with open(path, "rb") as file:
            table, start = plain_header(file)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return plain_views(mapped, table, start)

    return loader(load, job.shape.path)


@body
def plain_read(job: Job) -> Phases:
    def load(path: str) -> dict[str, np.ndarray]:
        with open(path, "rb", buffering=0) as file:
            table, start = plain_header(file)
            buffer = np.empty(os.fstat(file.fileno()).st_size, np.uint8)
            file.seek(0)
            view = memoryview(buffer)
            while view and (got := file.readinto(view)):
                view = view[got:]
        return plain_views(buffer, table, start)

    return loader(load, job.shape.path)


@body
def ours_torch(job: Job) -> Phases:
    import maptensors.torch

    return loader(maptensors.torch.load_file, job.shape.path)


@body
def st_torch(job: Job) -> Phases:
    import safetensors.torch

    return loader(safetensors.torch.load_file, job.shape.path)


@body
def st_torch_pread(job: Job) -> Phases:
    import safetensors.torch

    return loader(lambda path: safetensors.torch.load_file(path, backend="pread"), job.shape.path)


@body
def torch_load(job: Job) -> Phases:
    import torch

    assert job.shape.pickle
    return loader(lambda path: torch.load(path, mmap=True), job.shape.pickle)


@body
def ours_jax(job: Job) -> Phases:
    import maptensors.flax

    return loader(maptensors.flax.load_file, job.shape.path)


@body
def st_jax(job: Job) -> Phases:
    import safetensors.flax

    return loader(safetensors.flax.load_file, job.shape.path)


@body
def st_jax_pread(job: Job) -> Phases:
    import safetensors.flax

    return loader(lambda path: safetensors.flax.load_file(path, backend="pread"), job.shape.path)


# --- Opening, step by step -------------------------------------------------------------------------------


@body
def ours_steps(job: Job) -> Phases:
    import maptensors

    yield "ready"
    model = maptensors.open(job.shape.path)
    yield "open"
    model[job.shape.pick].numpy()
    yield "first"
    arrays = model.numpy()
    yield "views"
    use(arrays.values())
    yield "used"


@body
def ours_safe_open_steps(job: Job) -> Phases:
    from maptensors import safe_open

    return _safe_open_steps(lambda: safe_open(job.shape.path, framework="np"), job)


@body
def st_steps(job: Job) -> Phases:
    from safetensors import safe_open

    return _safe_open_steps(lambda: safe_open(job.shape.path, framework="np"), job)


@body
def st_pread_steps(job: Job) -> Phases:
    from safetensors import safe_open

    return _safe_open_steps(lambda: safe_open(job.shape.path, framework="np", backend="pread"), job)


def _safe_open_steps(opened: Callable[[], Any], job: Job) -> Phases:
    yield "ready"
    with opened() as file:
        yield "open"
        file.get_tensor(job.shape.pick)
        yield "first"
        # The names in file order, as load_file of safetensors does it.
        arrays = {name: file.get_tensor(name) for name in file.offset_keys()}
        yield "views"
        use(arrays.values())
        yield "used"


@body
def memmap_steps(job: Job) -> Phases:
    yield "ready"
    with open(job.shape.path, "rb") as file:
        table, start = plain_header(file)
    data = np.memmap(job.shape.path, np.uint8, "r")
    yield "open"
    plain_view(data, table[job.shape.pick], start)
    yield "first"
    arrays = plain_views(data, table, start)
    yield "views"
    use(arrays.values())
    yield "used"


@body
def torch_load_steps(job: Job) -> Phases:
    import torch

    assert job.shape.pickle
    yield "ready"
    tensors = torch.load(job.shape.pickle, mmap=True)
    yield "open"
    tensors[job.shape.pick].numpy()
    yield "first"
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    yield "views"
    use(arrays.values())
    yield "used"


@body
def ours_index(job: Job) -> Phases:
    import maptensors

    yield "ready"
    model = maptensors.open(job.shape.path)
    assert model.info(job.shape.pick)
    yield "ready to look up"


@body
def st_index(job: Job) -> Phases:
    """Each shard opened, and which one has which name: from the index, and checked against the headers."""
    from safetensors import safe_open

    return _index(job, lambda path: safe_open(path, framework="np"))


@body
def st_index_pread(job: Job) -> Phases:
    from safetensors import safe_open

    return _index(job, lambda path: safe_open(path, framework="np", backend="pread"))


def _index(job: Job, opened: Callable[[str], Any]) -> Phases:
    yield "ready"
    where = {}
    folder = Path(job.shape.path)
    if folder.is_dir():
        index = json.loads((folder / "model.safetensors.index.json").read_bytes())
        for shard in sorted(set(index["weight_map"].values())):
            file = opened(str(folder / shard))
            where.update(dict.fromkeys(file.keys(), file))
    else:
        file = opened(str(folder))
        where = dict.fromkeys(file.keys(), file)
    assert where[job.shape.pick].get_slice(job.shape.pick).get_shape()
    yield "ready to look up"


# --- Saving ----------------------------------------------------------------------------------------------


@cache
def numpy_tensors(shape: Shape) -> dict[str, np.ndarray]:
    """Resident arrays of this shape, each with memory of its own."""
    with open(shape.path, "rb") as file:
        table, _ = plain_header(file)
    return {
        name: np.full(entry["shape"], i, DTYPES[entry["dtype"]])
        for i, (name, entry) in enumerate(table.items())
    }


@cache
def torch_tensors(shape: Shape) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(array) for name, array in numpy_tensors(shape).items()}


def saver(
    job: Job, tensors: dict[str, Any], save: Callable[[dict[str, Any], str], None], sync: bool
) -> Phases:
    """One save to a new file; the peers, which sync nothing, are followed by the syncs they leave out."""
    Path(job.out).unlink(missing_ok=True)
    os.sync()
    yield "ready"
    save(tensors, job.out)
    yield "returned"
    if sync:
        kernel.sync_to_disk(job.out)
        yield "durable"


@body
def ours_torch_save(job: Job) -> Phases:
    from maptensors.torch import save_file

    return saver(job, torch_tensors(job.shape), lambda t, path: save_file(t, path, durable=False), sync=False)


@body
def ours_torch_save_durable(job: Job) -> Phases:
    from maptensors.torch import save_file

    return _ours_durable(job, torch_tensors(job.shape), save_file)


@body
def ours_numpy_save(job: Job) -> Phases:
    from maptensors.numpy import save_file

    return saver(job, numpy_tensors(job.shape), lambda t, path: save_file(t, path, durable=False), sync=False)


@body
def ours_numpy_save_durable(job: Job) -> Phases:
    from maptensors.numpy import save_file

    return _ours_durable(job, numpy_tensors(job.shape), save_file)


def _ours_durable(job: Job, tensors: dict[str, Any], save: Callable[[dict[str, Any], str], None]) -> Phases:
    Path(job.out).unlink(missing_ok=True)
    os.sync()
    yield "ready"
    save(tensors, job.out)
    yield "durable"


@body
def st_torch_save(job: Job) -> Phases:
    from safetensors.torch import save_file

    return saver(job, torch_tensors(job.shape), save_file, sync=True)


@body
def st_numpy_save(job: Job) -> Phases:
    from safetensors.numpy import save_file

    return saver(job, numpy_tensors(job.shape), save_file, sync=True)


@body
def torch_save(job: Job) -> Phases:
    import torch

    return saver(job, torch_tensors(job.shape), torch.save, sync=True)


@body
def roof_write(job: Job) -> Phases:
    """The bytes alone, written by every thread in pieces of 2 MiB."""
    source = np.full(job.shape.nbytes, 7, np.uint8)

    def save(_tensors: dict[str, Any], path: str) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        os.posix_fallocate(descriptor, 0, source.size)
        at = range(0, source.size, CHUNK)
        with ThreadPoolExecutor(job.threads) as pool:
            list(pool.map(lambda start: os.pwrite(descriptor, source[start : start + CHUNK], start), at))
        os.close(descriptor)

    return saver(job, {}, save, sync=True)


# --- Editing ---------------------------------------------------------------------------------------------


def add_one(arrays: Iterable[np.ndarray]) -> None:
    for array in arrays:
        array += 1


@body
def ours_edit(job: Job) -> Phases:
    import maptensors

    model = maptensors.open(job.shape.path)
    arrays = model.numpy()
    use(arrays.values())
    yield "ready"
    if hasattr(model, "promote"):
        model.promote()
        arrays = model.numpy()
    add_one(arrays.values())
    yield "edited"


@body
def ours_edit_lazily(job: Job) -> Phases:
    import maptensors

    arrays = maptensors.open(job.shape.path).numpy()
    use(arrays.values())
    yield "ready"
    add_one(arrays.values())
    yield "edited"


@body
def mmap_edit(job: Job) -> Phases:
    with open(job.shape.path, "rb") as file:
        table, start = plain_header(file)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    arrays = plain_views(mapped, table, start)
    use(arrays.values())
    yield "ready"
    add_one(arrays.values())
    yield "edited"


@body
def copy_edit(job: Job) -> Phases:
    """Every tensor copied to ordinary memory, and edited there."""
    with open(job.shape.path, "rb") as file:
        table, start = plain_header(file)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    arrays = plain_views(mapped, table, start)
    use(arrays.values())
    yield "ready"
    copies = [array.copy() for array in arrays.values()]
    add_one(copies)
    yield "edited"


# --- Roofs -----------------------------------------------------------------------------------------------


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


# --- Many processes --------------------------------------------------------------------------------------


@body
def plain_hold(job: Job) -> Phases:
    """A plain map with pages of 4 KiB."""

    def load(path: str) -> dict[str, np.ndarray]:
        with open(path, "rb") as file:
            table, start = plain_header(file)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.madvise(mmap.MADV_NOHUGEPAGE)
        return plain_views(mapped, table, start)

    return loader(load, job.shape.path)


def hold(run: Body, job: Job) -> None:
    """Load and read a model, and keep it until told to go."""
    phases = run(job)
    next(phases)
    print(json.dumps(kernel.memory()), flush=True)
    sys.stdin.readline()
    while next(phases) != "used":
        pass
    print("held", flush=True)
    sys.stdin.readline()


# --- One process -----------------------------------------------------------------------------------------


def sample(run: Body, job: Job, cold: bool, until: str | None) -> dict[str, Any]:
    """Time one body once, phase by phase. Times and faults add up over the phases.

    A cold sample comes with the share of the file that was still in memory.
    """
    gc.collect()
    phases = run(job)
    next(phases)
    left = None
    if cold:
        files = (job.shape.pickle,) if "torch_load" in run.__name__ else job.shape.files
        kernel.evict(files)
        left = kernel.resident(files)
    kernel.reset_peak()
    before = kernel.memory()
    total = (0.0, 0, 0)
    answer = {}
    while True:
        start = (*kernel.faults(), time.perf_counter())
        name = next(phases, None)
        end = (time.perf_counter(), *kernel.faults())
        if name is None:
            break
        total = (total[0] + end[0] - start[2], total[1] + end[1] - start[0], total[2] + end[2] - start[1])
        after = kernel.memory()
        answer[name] = {
            "s": total[0],
            "minor": total[1],
            "major": total[2],
            "private_kib": after["Anonymous"] - before["Anonymous"],
            "peak_kib": after["VmHWM"] - before["VmRSS"],
        }
        if name == until:
            break
    return {"phases": answer, "resident": left}


def main() -> None:
    request = json.loads(sys.argv[1])
    run = BODIES[request["body"]]
    job, tiny = (
        Job(
            Shape(**(request[key] | {"files": tuple(request[key]["files"])})),
            request["out"],
            request["threads"],
        )
        for key in ("shape", "tiny")
    )
    if request.get("hold"):
        hold(run, job)
        return
    until = request["until"]
    try:
        for _ in range(2):  # imports, and whatever else a library does only once
            sample(run, tiny, False, until)
        samples = [sample(run, job, request["cold"], until) for _ in range(request["repetitions"])]
        answer: dict[str, Any] = {"samples": samples}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
