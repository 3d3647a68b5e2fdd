"""The measured bodies that save and edit."""

import mmap
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import kernel
import numpy as np
from body import CHUNK, DTYPES, Job, Phases, body, plain_header, plain_views, use
from shapes import Shape


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
    model.promote()
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
def ours_edit_dense(job: Job) -> Phases:
    """Promoted tensor by tensor, as each is taken."""
    import maptensors

    model = maptensors.open(job.shape.path, dense_edits=True)
    use(maptensors.open(job.shape.path).numpy().values())
    yield "ready"
    for name in model:
        add_one([model[name].numpy()])
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
