"""How large deltas are: one page in a hundred edited, and one bfloat16 in fifty. Prints JSON."""

import json
import sys
from pathlib import Path

import arms_delta
import maptensors
import numpy as np
from body import Job
from shapes import Shape


def main() -> None:
    request = json.loads(sys.argv[1])
    shape = Shape(**(request["shape"] | {"files": tuple(request["shape"]["files"])}))
    job = Job(shape, request["out"], request["threads"])
    model = arms_delta.edited(job)
    changes = model.changed()
    maptensors.save_delta(model, job.out, durable=False)
    pages = Path(job.out).stat().st_size / changes.bytes

    base = Path(job.out).with_name("bf16.base.safetensors")
    elements = shape.nbytes // 4
    rng = np.random.default_rng(0)
    words = rng.integers(0, 1 << 16, elements, dtype=np.uint16)
    with maptensors.create(base, {"w": ("BF16", (elements,))}, durable=False) as draft:
        draft["w"].numpy().view(np.uint16)[:] = words
    model = maptensors.open(base)
    view = model["w"].numpy().view(np.uint16)
    view[rng.choice(elements, elements // 50, replace=False)] ^= 1
    maptensors.save_delta(model, job.out, durable=False)
    sparse = Path(job.out).stat().st_size / base.stat().st_size
    print(json.dumps({"pages": pages, "bf16": sparse}))


if __name__ == "__main__":
    main()
