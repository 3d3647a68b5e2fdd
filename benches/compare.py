"""Compare maptensors with its peers, and write BENCHMARKS.md.

Samples are taken in fresh processes; those of one job run in random order. ``--quick`` shows that
everything works, on smaller files and with few samples; its numbers mean little.
"""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jobs
import kernel
import report
import shapes
from jobs import Arm, Bench, Effort
from shapes import MIB, Shape, Shapes

HERE = Path(__file__).parent
ROOT = HERE.parent
THREADS = len(os.sched_getaffinity(0))
COLD_LIMIT = 0.001  # of a file may be in memory for it to count as cold
HOLDERS = 8


class Runner:
    """Starts the processes that take samples."""

    def __init__(self, data: Path, tiny: Shape) -> None:
        self.data = data
        self.tiny = tiny
        self.out = str(data / "out" / "saved.safetensors")

    def command(self, body: str, shape: Shape, **more: Any) -> list[str]:
        request = {
            "body": body,
            "shape": asdict(shape),
            "tiny": asdict(self.tiny),
            "out": self.out,
            "threads": THREADS,
            "cold": False,
            "until": None,
            "repetitions": 1,
        }
        return [sys.executable, str(HERE / "arms.py"), json.dumps(request | more)]

    def samples(self, bench: Bench, arm: Arm) -> dict[str, Any]:
        """What one fresh process has to say about one arm."""
        command = self.command(
            arm.body, bench.shape, cold=bench.cold, until=bench.until, repetitions=bench.repetitions
        )
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            return {"error": f"exit status {done.returncode}: {last}"}
        return json.loads(done.stdout.splitlines()[-1])


def run_all(runner: Runner, benches: list[Bench]) -> dict[str, Any]:
    """All jobs, one after another; the processes of each in random order."""
    return {bench.id: run_one(runner, bench, i, len(benches)) for i, bench in enumerate(benches, 1)}


def fill(shape: Shape, how: str) -> None:
    """Bring a model into the page cache in a known way, whoever wrote it and read it before."""
    files = (*shape.files, *filter(None, [shape.pickle]))
    if how == "written" and shape.made:
        kernel.rewrite(files)
    else:
        kernel.fill(files)


def run_one(runner: Runner, bench: Bench, number: int, of: int) -> dict[str, Any]:
    started = time.monotonic()
    if not bench.cold and not bench.shape.sparse:
        fill(bench.shape, bench.filled)
    turns = [arm for arm in bench.arms for _ in range(bench.processes)]
    random.shuffle(turns)
    samples: dict[str, list[dict[str, Any]]] = defaultdict(list)
    discarded: dict[str, int] = defaultdict(int)
    errors: dict[str, str] = {}
    for arm in turns:
        if arm.body in errors:
            continue
        answer = runner.samples(bench, arm)
        if "error" in answer:
            errors[arm.body] = answer["error"]
            continue
        for sample in answer["samples"]:
            if sample["resident"] is not None and sample["resident"] > COLD_LIMIT:
                discarded[arm.body] += 1
            else:
                samples[arm.body].append(sample)
    shutil.rmtree(runner.data / "out")
    (runner.data / "out").mkdir()
    print(f"[{number}/{of}] {bench.title}: {time.monotonic() - started:.0f} s", flush=True)
    for body, error in errors.items():
        print(f"    {jobs.LABELS[body]} failed: {error}")
    for body, count in discarded.items():
        print(f"    {jobs.LABELS[body]}: {count} samples discarded, the file was not cold")
    return {
        "title": bench.title,
        "cold": bench.cold,
        "tensors": bench.shape.tensors,
        "bytes": bench.bytes_moved,
        "processes": bench.processes,
        "repetitions": bench.repetitions,
        "roof": bench.roof,
        "arms": {
            arm.body: {
                "label": arm.label,
                "ours": arm.ours,
                "roof": arm.roof,
                "error": errors.get(arm.body),
                "discarded": discarded[arm.body],
                "phases": summary(samples[arm.body]),
                "resident": max((s["resident"] or 0.0 for s in samples[arm.body]), default=None)
                if bench.cold
                else None,
            }
            for arm in bench.arms
        },
    }


def summary(samples: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each phase: median, quartiles and minimum of the time; medians of the rest."""
    found: dict[str, dict[str, float]] = {}
    for name in samples[0]["phases"] if samples else ():
        of = [sample["phases"][name] for sample in samples]
        times = sorted(phase["s"] for phase in of)
        found[name] = {
            "samples": len(times),
            "median": quantile(times, 0.5),
            "min": times[0],
            "q1": quantile(times, 0.25),
            "q3": quantile(times, 0.75),
            **{
                key: quantile(sorted(phase[key] for phase in of), 0.5)
                for key in ("minor", "major", "private_kib", "peak_kib")
            },
        }
    return found


def quantile(ordered: list[float], at: float) -> float:
    place = at * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def run_ladder(runner: Runner, rungs: list[Shape], by: str, effort: Effort) -> dict[str, Any]:
    """Opening and viewing over a row of shapes, and the exponent of each arm's cost."""
    # Peers that copy would read the bytes to make their views; over bytes they are only asked to open.
    far = {"ours_steps": "views", "memmap_steps": "views", "st_steps": "views" if by == "tensors" else "open"}
    points: dict[str, list[list[float]]] = defaultdict(list)
    failed: dict[str, str] = {}
    for i, shape in enumerate(rungs, 1):
        x = shape.tensors if by == "tensors" else shape.nbytes
        size = f"{shape.tensors:,} tensors, {shape.nbytes / MIB:,.0f} MiB"
        for body, until in far.items():
            title = f"ladder by {by}: {size}, {jobs.LABELS[body]}"
            bench = Bench(shape.name, title, shape, jobs.arms(body), 3, 7, until=until)
            arm = run_one(runner, effort.applied(bench), i, len(rungs))["arms"][body]
            if arm["error"]:
                failed[f"{arm['label']}, {shape.name}"] = arm["error"]
            for phase, found in arm["phases"].items():
                if phase != "first":
                    points[f"{arm['label']}: {phase}"].append([x, found["median"]])
    exponents = {
        label: [slope(line), slope(line[len(line) // 2 :])] for label, line in points.items() if len(line) > 3
    }
    return {"by": by, "points": points, "failed": failed, "exponents": exponents}


def slope(points: list[list[float]]) -> float:
    """The exponent of the power law through the points: the slope of their logarithms."""
    import numpy as np

    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def run_holders(runner: Runner, shape: Shape) -> dict[str, Any]:
    """What so many processes that hold and have read one model take together, beyond what they had."""
    return {
        "file_kib": shape.nbytes / 1024,
        "processes": HOLDERS,
        "arms": {body: hold(runner, shape, body) for body in ("ours_numpy", "st_numpy", "plain_hold")},
    }


def run_delta_sizes(runner: Runner, shape: Shape) -> dict[str, float]:
    """How large deltas are."""
    request = {"shape": asdict(shape), "out": runner.out, "threads": THREADS}
    return json.loads(output(sys.executable, str(HERE / "delta_sizes.py"), json.dumps(request)))


def hold(runner: Runner, shape: Shape, body: str) -> dict[str, float]:
    fill(shape, "written")
    command = runner.command(body, shape, hold=True)
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(HOLDERS)
    ]
    try:
        for child in children:
            child.stdout.readline()
        before = [kernel.memory(child.pid) for child in children]
        for child in children:  # one by one: a peer's copies must not be made all at once
            _tell(child)
            child.stdout.readline()
        after = [kernel.memory(child.pid) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    return {
        key: float(sum(b[key] - a[key] for a, b in zip(before, after, strict=True)))
        for key in ("Pss", "VmPTE")
    }


def _tell(child: "subprocess.Popen[str]") -> None:
    child.stdin.write("\n")
    child.stdin.flush()


def rust_results() -> dict[str, Any]:
    """What criterion has left in the target directories, and how many allocations there are."""
    found: dict[str, Any] = {"times": {}, "allocations": None}
    if shutil.which("cargo") is None:
        print("NOTE: no Rust here: its rows are left out")
        return found
    manifest = f"--manifest-path={ROOT / 'Cargo.toml'}"
    target = json.loads(output("cargo", "metadata", "--format-version=1", "--no-deps", manifest))
    # The peers have a target directory of their own: the crate is built there against other features.
    for directory in (Path(target["target_directory"]), HERE / "peers" / "target"):
        for file in sorted(directory.glob("criterion/*/*/new/estimates.json")):
            name = json.loads((file.parent / "benchmark.json").read_text())
            median = json.loads(file.read_text())["median"]["point_estimate"] / 1e9
            found["times"].setdefault(name["group_id"], {})[name["function_id"]] = median
    counted = output("cargo", "bench", "--quiet", "--bench=allocations", manifest)
    found["allocations"] = json.loads(counted.splitlines()[-1])
    return found


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def machine(data: Path) -> dict[str, str]:
    """Where the numbers come from."""
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in cpus if line.startswith("model name")), "unknown")
    total = next(
        line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line
    )
    system = output("findmnt", "-n", "-o", "FSTYPE", "-T", str(data)) if shutil.which("findmnt") else ""
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    packages = ("maptensors", "safetensors", "torch", "numpy", "jax", "ml_dtypes")
    rustc = output("rustc", "--version") if shutil.which("rustc") else ""
    return {
        "kernel": f"{platform.system()} {platform.release()}",
        "file system": system or "unknown",
        "CPU": model,
        "cores": str(THREADS),
        "memory": f"{int(total) / (1 << 20):.0f} GiB",
        "transparent huge pages": huge.read_text().strip() if huge.exists() else "none",
        "Python": platform.python_version(),
        "Rust": rustc or "none",
        "packages": ", ".join(f"{name} {version(name)}" for name in packages),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, help="where the files are made and kept (default: a temporary one)"
    )
    parser.add_argument("--quick", action="store_true", help="small files, few samples")
    parser.add_argument("--out", type=Path, default=ROOT, help="where BENCHMARKS.md and the plots go")
    parser.add_argument("--only", action="append", help="only the jobs whose id starts with this; no report")
    parser.add_argument("--report", type=Path, help="only write the report again, from this results.json")
    given = parser.parse_args()
    if given.report:
        report.write(json.loads(given.report.read_text()), given.out, HERE / "notes.toml")
        return
    with tempfile.TemporaryDirectory(prefix="maptensors-bench-") as temporary:
        data = given.data or Path(temporary)
        (data / "out").mkdir(parents=True, exist_ok=True)
        results = measure(data.resolve(), Effort(given.quick), given.only)
    given.out.mkdir(parents=True, exist_ok=True)
    results_at = given.out / "results.json" if given.quick or given.only else HERE / "results.json"
    results_at.write_text(json.dumps(results, indent=1) + "\n")
    if not given.only:
        report.write(results, given.out, HERE / "notes.toml")


def measure(data: Path, effort: Effort, only: list[str] | None) -> dict[str, Any]:
    started = time.monotonic()
    rust = {} if only else rust_results()  # first: if it fails, nothing is lost
    make = Shapes(data)
    tiny = make.single("tiny", shapes.equal(4, 64 << 10), pickle=True)
    runner = Runner(data, tiny)
    benches = jobs.benches(make, effort)
    by_bytes, by_tensors = jobs.ladder_bytes(make), jobs.ladder_tensors(make)
    print(f"shapes ready: {time.monotonic() - started:.0f} s", flush=True)
    if only:
        benches = [bench for bench in benches if bench.id.startswith(tuple(only))]
        return {"jobs": run_all(runner, benches)}
    big = next(bench.shape for bench in benches if bench.id == "big-numpy")
    found = {
        "quick": effort.quick,
        "when": time.strftime("%Y-%m-%d"),
        "machine": machine(data),
        "jobs": run_all(runner, benches),
        "ladders": [
            run_ladder(runner, by_bytes, "bytes", effort),
            run_ladder(runner, by_tensors, "tensors", effort),
        ],
        "holders": run_holders(runner, big),
        "delta_sizes": run_delta_sizes(runner, big),
        "rust": rust,
    }
    return found | {"minutes": (time.monotonic() - started) / 60}


if __name__ == "__main__":
    main()
