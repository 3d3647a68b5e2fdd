"""The process that takes samples of one measured body: one request as JSON in, one answer out."""

import gc
import json
import sys
import time
from typing import Any

import arms_checkpoint  # noqa: F401 - for the bodies they add
import arms_delta  # noqa: F401
import arms_load  # noqa: F401
import arms_roof  # noqa: F401
import arms_save  # noqa: F401
import arms_share  # noqa: F401
import kernel
from body import (
    BODIES,
    Body,
    Job,
)
from shapes import Shape


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
