"""BENCHMARKS.md and its plots, from the results of a run."""

import tomllib
from pathlib import Path
from typing import Any

import plots
from plots import count, seconds, size
from targets import TARGETS, Results

METHOD = """\
Times are medians. Samples are taken in fresh processes that run in random order within a job; jobs of a few
milliseconds take several samples in one process. Imports, and two runs on another small file, come before the
clock starts. **Warm**: before the job the file was evicted and written again, in pieces cut at file offsets
of 2 MiB, as a save here leaves it (real models, and where a title says so: read by plain reads); how the page
cache was filled decides how large the pages are that a map gets. **Cold**: the file is written back and
evicted (`posix_fadvise`) before each sample, then checked (`mincore`, or `cachestat` for large files) to be
out of memory; samples for which it was not are discarded.

*Used* means that every byte is read: the sum of its 64-bit words, by numpy on one thread, whoever loaded it.
Phases add up: *used* includes the load. A peer's save is *durable* after `fsync` of the file and of its
directory. *Private* is anonymous memory that the process has gained, *peak* the growth of its resident set,
the file's pages included. *Roof* is the share of what the hardware did in the same job (the sum of a region
already mapped; the fastest raw read; one parallel write), for edits of a copy in memory."""


def write(results: Results, out: Path, notes_at: Path) -> None:
    """Write BENCHMARKS.md and ``benches/plots/`` under a directory."""
    notes = tomllib.loads(notes_at.read_text()) if notes_at.exists() else {}
    found = judged(results)
    pictures = out / "benches" / "plots"
    pictures.mkdir(parents=True, exist_ok=True)
    drawn = draw(results, pictures)
    parts = [
        "# Benchmarks",
        "Written by `make bench`; what explains a row comes from `benches/notes.toml`.",
        *(
            ["**A quick run: smaller files and few samples. The numbers mean little.**"]
            if results["quick"]
            else []
        ),
        _table(["", ""], [[name, value] for name, value in results["machine"].items()])
        + f"\nTaken on {results['when']}, in {results['minutes']:.0f} minutes.",
        "## Targets",
        "Ours against the best peer of those that load or save models: same run, same bytes, same "
        "durability. What is done by hand (numpy memmap, raw mmap, plain read) is in the tables below.",
        _targets_table(found),
        "## Missed",
        _missed(found, notes),
        "## At a glance",
        *(f"![{title}](benches/plots/{name})" for name, title in drawn),
        "## How it is measured",
        METHOD,
        "## Cost against size",
        *(_ladder(ladder) for ladder in results["ladders"]),
        "## Eight processes, one model",
        _holders(results["holders"]),
        "## Rust",
        _rust(results["rust"]),
        "## Every job",
        *(_job(results, job) for job in results["jobs"].values()),
    ]
    (out / "BENCHMARKS.md").write_text("\n\n".join(parts) + "\n")
    print(_targets_table(found))


Judged = list[tuple[Any, str, str, str, bool | None]]


def judged(results: Results) -> Judged:
    """Each target with what was found; one that could not be measured (an arm failed) keeps its row."""
    rows: Judged = []
    for target in TARGETS:
        try:
            rows.append((target, *target.measure(results)))
        except (KeyError, ValueError, TypeError, ZeroDivisionError):
            rows.append((target, "–", "–", "–", None))
    return rows


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _verdict(met: bool | None) -> str:
    return {True: "met", False: "**missed**", None: "**not measured**"}[met]


def _targets_table(found: Judged) -> str:
    rows = [
        [target.job, target.target, ours, peer, ratio, _verdict(met)]
        for target, ours, peer, ratio, met in found
    ]
    return _table(["job", "target", "ours", "best peer or roof", "ratio", ""], rows)


def _missed(found: Judged, notes: dict[str, str]) -> str:
    lines = [
        f"- **{target.job}** ({target.target}; {ratio}): {notes.get(target.id, 'not explained yet.')}"
        for target, _, _, ratio, met in found
        if not met
    ]
    others = [
        f"- {target.job}: {notes[target.id]}" for target, *_, met in found if met and target.id in notes
    ]
    known = {target.id for target, *_ in found}
    others += [f"- {text}" for id, text in notes.items() if id not in known]
    return "\n".join(lines or ["Nothing."]) + ("\n\nNotes:\n\n" + "\n".join(others) if others else "")


def _ladder(ladder: dict[str, Any]) -> str:
    rows = [
        [
            label,
            f"{whole:+.3f}",
            f"{upper:+.3f}",
            seconds(ladder["points"][label][0][1]),
            seconds(ladder["points"][label][-1][1]),
        ]
        for label, (whole, upper) in ladder["exponents"].items()
    ]
    if ladder["by"] == "bytes":
        words = "By bytes: 64 tensors in 1 MiB to 1 TiB (sparse). Cost grows with the bytes to the power of:"
    else:
        words = "By tensors: 16 to 65,536 in 64 MiB (sparse). Cost grows with their number to the power of:"
    failed = "".join(f"\n\n{label} failed: `{error}`" for label, error in ladder["failed"].items())
    return f"{words}\n\n{_table(['', 'exponent', 'upper half', 'first', 'last'], rows)}{failed}"


def _holders(held: dict[str, Any]) -> str:
    names = {
        "ours_numpy": "maptensors",
        "st_numpy": "safetensors",
        "plain_hold": "plain mmap, pages of 4 KiB",
    }
    rows = [
        [names[body], f"{arm['Pss'] / held['file_kib']:.3f} × file", f"{arm['VmPTE']:,.0f} KiB"]
        for body, arm in held["arms"].items()
    ]
    return _table(
        [f"{held['processes']} processes, every byte read by each", "ΣPss gained", "ΣVmPTE gained"], rows
    )


def _rust(rust: dict[str, Any]) -> str:
    if not rust["times"]:
        return "Not measured in this run."
    rows = []
    for group, times in sorted(rust["times"].items()):
        ours = times.get("maptensors")
        for name, value in sorted(times.items(), key=lambda item: item[0] != "maptensors"):
            rows.append([group, name, seconds(value), f"{value / ours:.3g}×" if ours else "–"])
    text = _table(["criterion", "", "median", "against ours"], rows)
    if counts := rust["allocations"]:
        text += (
            f"\n\nHeap allocations for {counts['tensors']:,} tensors: {counts['open']} to open, "
            f"{counts['views']} to view them all; the safetensors crate: {counts['safetensors_open']:,} and "
            f"{counts['safetensors_views']:,}."
        )
    return text


def roof_of(results: Results, job: dict[str, Any], phase: str) -> float | None:
    """The time of the roof that a phase of a job is held against."""
    arms = [arm for arm in job["arms"].values() if arm["roof"]]
    own = job["roof"]
    if own and phase != "used":
        return None
    if own:
        times = [arm["phases"][own]["median"] for arm in arms if own in arm["phases"]]
    elif phase in ("returned", "durable"):
        # The bytes alone are written once, for all jobs that save as many.
        same = (
            other["arms"].values() for other in results["jobs"].values() if other["bytes"] == job["bytes"]
        )
        arms = [arm for arms in same for arm in arms if arm["roof"]]
        times = [arm["phases"][phase]["median"] for arm in arms if phase in arm["phases"]]
    elif phase == "edited":
        times = [arm["phases"]["copied"]["median"] for arm in results["jobs"]["memcpy"]["arms"].values()]
    else:
        times = []
    return min(times, default=None)


def _job(results: Results, job: dict[str, Any]) -> str:
    rows = []
    for arm in job["arms"].values():
        if arm["error"]:
            rows.append([arm["label"], "failed", f"`{arm['error'][:80]}`", *[""] * 6])
        for phase, found in arm["phases"].items():
            roof = None if arm["roof"] else roof_of(results, job, phase)
            rows.append(
                [
                    arm["label"],
                    phase,
                    seconds(found["median"]),
                    seconds(found["min"]),
                    f"{seconds(found['q1'])} – {seconds(found['q3'])}",
                    str(found["samples"]),
                    f"{found['minor']:,.0f} + {found['major']:,.0f}",
                    f"{found['private_kib'] / 1024:,.1f} / {found['peak_kib'] / 1024:,.1f}",
                    f"{roof / found['median']:.0%}" if roof else "",
                ]
            )
    head = [
        "",
        "phase",
        "median",
        "min",
        "middle half",
        "n",
        "faults minor + major",
        "private / peak MiB",
        "roof",
    ]
    words = f"{job['processes']} processes an arm, {job['repetitions']} samples in each."
    if job["cold"]:
        left = max((arm["resident"] or 0.0 for arm in job["arms"].values()), default=0.0)
        gone = sum(arm["discarded"] for arm in job["arms"].values())
        words += (
            f" At most {left:.2%} of the file was in memory before a sample; {gone} samples were discarded."
        )
    if job["bytes"] and (roof := _rate(results, job)):
        words += f" {roof}"
    return f"### {job['title']}\n\n{words}\n\n{_table(head, rows)}"


def _rate(results: Results, job: dict[str, Any]) -> str:
    """The roof in bytes a second."""
    for phase in ("used", "load", "durable", "edited"):
        if roof := roof_of(results, job, phase):
            return f"The roof ran at {job['bytes'] / roof / 1e9:.1f} GB/s."
    return ""


# --- Plots -----------------------------------------------------------------------------------------------

SERIES = ("maptensors", "safetensors (mmap)", "safetensors (pread)", "torch.load / torch.save",
          "memmap by hand", "raw mmap by hand", "plain read by hand")  # fmt: skip
FAMILY = {"ours": 0, "st": 1, "torch": 3, "memmap": 4, "raw": 5, "mmap": 5, "plain": 6}
# The phase that says most of each job; ours is the drop-in or, for saves, what does the same as the peers.
GLANCE = (
    ("many-steps", "first", "open + 1 of 20,000, numpy"),
    ("many-numpy", "load", "numpy load, 20,000"),
    ("many-torch", "load", "torch load, 20,000"),
    ("lora-torch", "load", "torch load, LoRA, 500"),
    ("deepseek", "ready to look up", "163 shards, ready to look up"),
    ("big-numpy", "load", "numpy load, 1 GiB"),
    ("big-numpy", "used", "numpy load + use, 1 GiB"),
    ("big-jax", "used", "JAX load + use, 1 GiB"),
    ("big-torch", "load", "torch load, 1 GiB"),
    ("big-cold", "used", "numpy load + use, 1 GiB, cold"),
    ("big-save-torch", "returned", "torch save, 1 GiB, no fsync"),
    ("big-save-torch", "durable", "torch save, 1 GiB, durable"),
    ("big-save-numpy", "durable", "numpy save, 1 GiB, durable"),
    ("many-save-torch", "returned", "torch save, 20,000, no fsync"),
    ("many-save-numpy", "returned", "numpy save, 20,000, no fsync"),
    ("edit", "edited", "edit all of 1 GiB"),
)


def series_of(body: str) -> str:
    return SERIES[2] if "pread" in body else SERIES[FAMILY[body.split("_")[0]]]


def cells(job: dict[str, Any], phase: str) -> dict[str, float]:
    """One time for each series: of ours the first that reaches the phase, which is the plain way."""
    found: dict[str, float] = {}
    for body, arm in job["arms"].items():
        if not arm["roof"] and body != "copy_edit" and phase in arm["phases"]:
            found.setdefault(series_of(body), arm["phases"][phase]["median"])
    return found


def draw(results: Results, folder: Path) -> list[tuple[str, str]]:
    """Write the plots; their file names and titles."""
    rows = [(label, cells(results["jobs"][job], phase)) for job, phase, label in GLANCE]
    rows = [(label, found) for label, found in rows if found]
    shown = [name for name in SERIES if any(name in found for _, found in rows)]
    drawn = [("jobs.svg", "Time of each job, by who does it; left is faster")]
    (folder / "jobs.svg").write_text(plots.dots(drawn[0][1], rows, shown))
    for ladder in results["ladders"]:
        by = ladder["by"]
        name, title = f"by-{by}.svg", f"Cost of opening and viewing against the number of {by}"
        lines = {label: [(x, y) for x, y in line] for label, line in ladder["points"].items()}
        (folder / name).write_text(plots.lines(title, lines, by, size if by == "bytes" else count))
        drawn.append((name, title))
    return drawn
