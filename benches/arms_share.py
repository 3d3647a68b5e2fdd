"""The measured bodies that hand weights to other processes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arms_save import numpy_tensors
from body import Job, Phases, body

READER = """
import sys, maptensors as mt
weights = mt.attach(sys.argv[1], "r")
print("attached", flush=True)
while weights.wait(60):
    weights.refresh()
    print(weights.generation, flush=True)
"""


@contextmanager
def published(job: Job, **options: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A publication in shared memory that has two generations, and its state."""
    import maptensors

    state = numpy_tensors(job.shape)
    publisher = maptensors.publish(f"bench-{os.getpid()}", state, **options)
    try:
        publisher.publish(state)
        yield publisher, state
    finally:
        publisher.remove()


def one_in_a_hundred(state: dict[str, Any]) -> list[str]:
    return list(state)[: max(1, len(state) // 100)]


@body
def share_whole(job: Job) -> Phases:
    with published(job, recycle=False) as (publisher, state):
        yield "ready"
        publisher.publish(state)
        yield "published"


@body
def share_whole_recycled(job: Job) -> Phases:
    with published(job) as (publisher, state):
        yield "ready"
        publisher.publish(state)
        yield "published"


@body
def share_changed(job: Job) -> Phases:
    with published(job) as (publisher, state):
        names = one_in_a_hundred(state)
        for _ in range(2):  # as in the middle of a run
            publisher.publish(state, changed=names)
        yield "ready"
        publisher.publish(state, changed=names)
        yield "published"


@body
def share_compare(job: Job) -> Phases:
    with published(job) as (publisher, state):
        for name in one_in_a_hundred(state):
            state[name] = state[name] + 1
        yield "ready"
        publisher.publish(state, changed="compare")
        yield "published"


@body
def share_notice(job: Job) -> Phases:
    """One in a hundred published, until another process holds the new generation and has said so."""
    with published(job) as (publisher, state):
        names = one_in_a_hundred(state)
        command = [sys.executable, "-c", READER, f"bench-{os.getpid()}"]
        reader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            reader.stdout.readline()
            yield "ready"
            generation = publisher.publish(state, changed=names)
            yield "published"
            while int(reader.stdout.readline()) < generation:
                pass
            yield "noticed"
        finally:
            reader.kill()
            reader.wait()


@body
def st_share(job: Job) -> Phases:
    """What is done without: a file in shared memory, written anew and renamed into place."""
    from safetensors.numpy import save_file

    state = numpy_tensors(job.shape)
    directory = Path("/dev/shm" if os.path.isdir("/dev/shm") else Path(job.out).parent)
    path = directory / f"bench-{os.getpid()}.safetensors"
    try:
        yield "ready"
        save_file(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
        yield "published"
    finally:
        path.unlink(missing_ok=True)
