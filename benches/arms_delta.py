"""The measured bodies that ask what changed, and save only that."""

from pathlib import Path
from typing import Any

import numpy as np
from arms_save import numpy_tensors
from body import Job, Phases, body

PAGE = 4096


def edited(job: Job) -> Any:
    """A model whose base carries checksums, with one page in a hundred edited, at random."""
    import maptensors

    base = Path(job.out).with_name(f"{job.shape.name}.base.safetensors")
    if not base.exists():
        maptensors.save(numpy_tensors(job.shape), base, checksums=True)
    model = maptensors.open(base)
    rng = np.random.default_rng(0)
    for array in model.numpy().values():
        words = array.reshape(-1).view(np.uint32)
        pages = words.size * 4 // PAGE
        for page in rng.choice(pages, max(1, pages // 100), replace=False):
            words[page * PAGE // 4 : (page + 1) * PAGE // 4] ^= 1
    return model


@body
def delta_changed(job: Job) -> Phases:
    model = edited(job)
    yield "ready"
    model.changed()
    yield "changed"


@body
def delta_save(job: Job) -> Phases:
    import maptensors

    model = edited(job)
    Path(job.out).unlink(missing_ok=True)
    yield "ready"
    maptensors.save_delta(model, job.out, durable=False)
    yield "returned"


@body
def delta_save_durable(job: Job) -> Phases:
    import maptensors

    model = edited(job)
    Path(job.out).unlink(missing_ok=True)
    yield "ready"
    maptensors.save_delta(model, job.out)
    yield "durable"
