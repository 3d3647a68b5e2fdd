"""Compare this build of maptensors with another one, in one run.

``against.py PYTHON`` takes the interpreter of an environment that has the other build. Samples of the two
are taken in fresh processes, in random order within a job. The table has the medians, and this build's as a
ratio of the other's.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import compare
import jobs
import shapes
from jobs import Arm, Bench, Effort
from shapes import Shapes

OURS = ("ours", "checkpoint_", "delta_", "share_")
TIMES = 2  # more samples than a comparison with peers needs: two builds differ by less


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", help="the Python that has the other build")
    parser.add_argument(
        "--data", type=Path, help="where the files are made and kept (default: a temporary one)"
    )
    parser.add_argument("--only", action="append", help="only the jobs whose id starts with this")
    parser.add_argument("--times", type=int, default=TIMES, help="how many times the samples of `make bench`")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="maptensors-bench-") as temporary:
        data = (given.data or Path(temporary)).resolve()
        (data / "out").mkdir(parents=True, exist_ok=True)
        make = Shapes(data)
        runner = compare.Runner(data, make.single("tiny", shapes.equal(4, 64 << 10), pickle=True))
        print(f"{'job':18} {'what':58} {'other':>10} {'this':>10} {'ratio':>7}")
        for bench in jobs.benches(make, Effort(quick=False)):
            if not bench.cold and (not given.only or bench.id.startswith(tuple(given.only))):
                compare_one(runner, bench, given.other, given.times)


def compare_one(runner: compare.Runner, bench: Bench, other: str, times: int) -> None:
    ours = [arm for arm in bench.arms if arm.body.startswith(OURS)]
    if not bench.shape.sparse:
        compare.fill(bench.shape, bench.filled)
    turns = [(arm, python) for arm in ours for python in (other, sys.executable)] * (bench.processes * times)
    random.shuffle(turns)
    samples: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for arm, python in turns:
        samples[arm.body, python] += taken(runner, bench, arm, python)
    shutil.rmtree(runner.data / "out")
    (runner.data / "out").mkdir()
    for arm in ours:
        before, after = (compare.summary(samples[arm.body, python]) for python in (other, sys.executable))
        for phase in before:
            old, new = before[phase]["median"], after[phase]["median"]
            label = f"{arm.label}: {phase}"
            print(
                f"{bench.id:18} {label:58} {old * 1e3:10.4f} {new * 1e3:10.4f} {new / old:7.3f}", flush=True
            )


def taken(runner: compare.Runner, bench: Bench, arm: Arm, python: str) -> list[dict[str, Any]]:
    command = runner.command(
        arm.body, bench.shape, cold=False, until=bench.until, repetitions=bench.repetitions
    )
    done = subprocess.run([python, *command[1:]], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arm.label} with {python}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])["samples"]


if __name__ == "__main__":
    main()
