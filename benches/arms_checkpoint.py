"""The measured bodies that save the same state again and again."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from arms_save import torch_tensors
from body import Job, Phases, body


@contextmanager
def checkpointer(job: Job, **options: Any) -> Iterator[Any]:
    import maptensors

    directory = Path(job.out).with_suffix(".checkpoints")
    shutil.rmtree(directory, ignore_errors=True)
    with maptensors.Checkpointer(directory, **options) as checkpoints:
        yield checkpoints
    shutil.rmtree(directory)


def settled(checkpoints: Any) -> None:
    """Nothing under way, nothing to be written by the kernel."""
    checkpoints.wait()
    os.sync()


@contextmanager
def recycling(job: Job, state: dict[str, Any], durable: bool) -> Iterator[Any]:
    """A checkpointer whose next output is an old checkpoint's."""
    with checkpointer(job, keep=1, durable=durable) as checkpoints:
        for step in range(10):
            if checkpoints.save(state, step).output == "recycled":
                break
            checkpoints.wait()
        settled(checkpoints)
        yield checkpoints


@body
def checkpoint_prepared(job: Job) -> Phases:
    state = torch_tensors(job.shape)
    with checkpointer(job, example=state, durable=False) as checkpoints:
        settled(checkpoints)
        yield "ready"
        saved = checkpoints.save(state, 1)
        yield "returned"
        assert saved.output == "prepared"


@body
def checkpoint_recycled(job: Job) -> Phases:
    state = torch_tensors(job.shape)
    with recycling(job, state, durable=False) as checkpoints:
        yield "ready"
        saved = checkpoints.save(state, 100)
        yield "returned"
        assert saved.output == "recycled"


@body
def checkpoint_recycled_durable(job: Job) -> Phases:
    state = torch_tensors(job.shape)
    with recycling(job, state, durable=True) as checkpoints:
        yield "ready"
        saved = checkpoints.save(state, 100)
        yield "durable"
        assert saved.output == "recycled"


@body
def checkpoint_async(job: Job) -> Phases:
    """In the background: the pause, and when it is durable."""
    state = torch_tensors(job.shape)
    with recycling(job, state, durable=True) as checkpoints:
        yield "ready"
        saving = checkpoints.save_async(state, 100)
        yield "returned"
        saving.wait()
        yield "durable"


@body
def loop_alone(job: Job) -> Phases:
    """The time that a Python loop takes for some ten million turns, with nothing beside it."""
    yield "ready"
    _turns(10_000)
    yield "looped"


@body
def loop_beside(job: Job) -> Phases:
    """The same loop while checkpoints are made durable in the background, for as long as it runs."""
    state = {"w": np.ones(job.shape.nbytes // 4, np.float32)}
    with recycling(job, state, durable=True) as checkpoints:
        saving = checkpoints.save_async(state, 100)
        yield "ready"
        _turns(10_000)
        yield "looped"
        saving.wait()


def _turns(thousands: int) -> int:
    turns = 0
    for _ in range(thousands):
        for _ in range(1000):
            turns += 1
    return turns
