"""The measured bodies that open and load."""

import json
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from body import Job, Phases, body, plain_header, plain_view, plain_views, use


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
