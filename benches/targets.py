"""The table of targets: what each row asks for, and how it is found in the results of a run."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from plots import seconds

Results = dict[str, Any]
Found = tuple[str, str, str, bool]  # ours, the peer's, the ratio, and whether the target is met
MIB = 1 << 20


@dataclass(frozen=True)
class Target:
    """One line of the table."""

    id: str
    job: str
    target: str
    measure: Callable[[Results], Found]


def time_of(results: Results, job: str, body: str, phase: str) -> float:
    return results["jobs"][job]["arms"][body]["phases"][phase]["median"]


def best(results: Results, job: str, bodies: Iterable[str], phase: str) -> tuple[str, float]:
    """The fastest of these that did it: its label and its median."""
    arms = results["jobs"][job]["arms"]
    done = [
        (arms[body]["phases"][phase]["median"], arms[body]["label"])
        for body in bodies
        if phase in arms.get(body, {}).get("phases", {})
    ]
    value, label = min(done)
    return label, value


def faster(
    id: str,
    job: str,
    at_least: float,
    bench: str,
    ours: str,
    phase: str,
    peers: tuple[str, ...],
    target: str = "",
) -> Target:
    """A row that asks for so many times the best peer's speed."""

    def found(results: Results) -> Found:
        mine = time_of(results, bench, ours, phase)
        label, theirs = best(results, bench, peers, phase)
        ratio = theirs / mine
        return seconds(mine), f"{seconds(theirs)} ({label})", f"{ratio:.3g}×", ratio >= at_least

    return Target(id, job, target or f"≥ {at_least:g}×", found)


def share(
    id: str, job: str, at_least: float, bench: str, ours: tuple[str, str], roofs: tuple[str, ...], phase: str
) -> Target:
    """A row that asks for so much of what the hardware can do."""

    def found(results: Results) -> Found:
        mine = time_of(results, bench, *ours)
        label, roof = best(results, bench, roofs, phase)
        part = roof / mine
        return seconds(mine), f"{seconds(roof)} ({label})", f"{part:.0%}", part >= at_least

    return Target(id, job, f"≥ {at_least:.0%} of the roof", found)


def below(
    id: str,
    job: str,
    target: str,
    limit: float,
    show: Callable[[float], str],
    value: Callable[[Results], float],
) -> Target:
    """A row that asks for no more than so much of something."""

    def found(results: Results) -> Found:
        mine = value(results)
        return show(mine), "–", f"{mine / limit:.3g} of the limit", mine <= limit

    return Target(id, job, target, found)


def per_tensor(results: Results) -> float:
    """What torch load_file takes for each tensor beyond opening the file."""
    loading = time_of(results, "many-torch", "ours_torch", "load")
    opening = time_of(results, "many-steps", "ours_steps", "open")
    return (loading - opening) / results["jobs"]["many-torch"]["tensors"]


def per_shard_tensor(results: Results) -> float:
    deepseek = results["jobs"]["deepseek"]
    return time_of(results, "deepseek", "ours_index", "ready to look up") / deepseek["tensors"]


def faults_per_mib(results: Results) -> float:
    job = results["jobs"]["big-numpy"]
    phase = job["arms"]["ours_numpy"]["phases"]["used"]
    return (phase["minor"] + phase["major"]) / (job["bytes"] / MIB)


def rust_views(results: Results) -> Found:
    times = dict(results["rust"]["times"].get("views-20000", {}))
    mine, theirs = times["maptensors"], times["safetensors"]
    return (
        seconds(mine),
        f"{seconds(theirs)} (safetensors crate)",
        f"{theirs / mine:.3g}×",
        theirs >= 5 * mine,
    )


def rust_allocations(results: Results) -> Found:
    counts = results["rust"]["allocations"]
    theirs = f"{counts['safetensors_views']:,} (safetensors crate)"
    return str(counts["views"]), theirs, "–", counts["views"] == 0


def held_pss(results: Results) -> Found:
    held = results["holders"]
    part = held["arms"]["ours_numpy"]["Pss"] / held["file_kib"]
    peer = held["arms"]["st_numpy"]["Pss"] / held["file_kib"]
    theirs = f"{peer:.3g} × file (safetensors numpy)"
    return f"{part:.3f} × file", theirs, f"{peer / part:.3g}×", part <= 1.05


def held_tables(results: Results) -> Found:
    arms = results["holders"]["arms"]
    mine, plain = arms["ours_numpy"]["VmPTE"], arms["plain_hold"]["VmPTE"]
    part = mine / plain
    theirs = f"{plain:,.0f} KiB (plain mmap, 4 KiB pages)"
    return f"{mine:,.0f} KiB", theirs, f"1/{1 / part:.0f}" if part > 0 else "0", part <= 1 / 50


def no_growth(results: Results) -> Found:
    ladder = next(ladder for ladder in results["ladders"] if ladder["by"] == "bytes")
    (low, first), *_, (high, last) = ladder["points"]["maptensors open: open"]
    grown = f"{last / first:.2f}× over {high / low:,.0f}× the bytes"
    return seconds(last), f"{seconds(first)} (1 MiB)", grown, last <= 1.25 * first


ST = ("st_steps", "st_pread_steps")
ST_NUMPY = ("st_numpy", "st_numpy_pread")
TORCH = ("st_torch", "st_torch_pread", "torch_load")
TORCH_SAVE = ("st_torch_save", "torch_save")
NUMPY_SAVE = ("st_numpy_save",)
INDEX = ("st_index", "st_index_pread")
RAW_READ = ("roof_direct", "roof_direct_few", "roof_buffered", "roof_buffered_one")
TARGETS = (
    faster(
        "many-first",
        "open + one tensor out of 20,000, Python",
        8,
        "many-steps",
        "ours_steps",
        "first",
        (*ST, "torch_load_steps"),
    ),
    faster("many-torch", "torch load_file, 20,000 tensors", 10, "many-torch", "ours_torch", "load", TORCH),
    below(
        "many-torch-each",
        "torch load_file, 20,000: a tensor, over opening",
        "≤ 1.5 µs a tensor",
        1.5e-6,
        seconds,
        per_tensor,
    ),
    faster("many-numpy", "numpy load_file, 20,000 tensors", 4, "many-numpy", "ours_numpy", "load", ST_NUMPY),
    faster("big-numpy-open", "numpy load, 1 GiB: open", 500, "big-numpy", "ours_numpy", "load", ST_NUMPY),
    faster(
        "big-jax-open",
        "JAX load, 1 GiB: open",
        500,
        "big-jax",
        "ours_jax",
        "load",
        ("st_jax", "st_jax_pread"),
    ),
    faster(
        "big-numpy-used",
        "numpy load, 1 GiB: every byte read and used",
        3,
        "big-numpy",
        "ours_numpy",
        "used",
        ST_NUMPY,
    ),
    faster(
        "big-jax-used",
        "JAX load, 1 GiB: every byte read and used",
        3,
        "big-jax",
        "ours_jax",
        "used",
        ("st_jax", "st_jax_pread"),
    ),
    faster("big-torch", "torch load_file, 1 GiB in 16", 1.5, "big-torch", "ours_torch", "load", TORCH),
    faster(
        "shards",
        "163 shards / 92,000 tensors: ready to look up",
        8,
        "deepseek",
        "ours_index",
        "ready to look up",
        INDEX,
    ),
    below(
        "shards-each",
        "163 shards / 92,000 tensors: a tensor",
        "≤ 1 µs a tensor",
        1e-6,
        seconds,
        per_shard_tensor,
    ),
    below(
        "lora",
        "LoRA, 500 tensors, warm (torch)",
        "≤ 1.5 ms",
        1.5e-3,
        seconds,
        lambda results: time_of(results, "lora-torch", "ours_torch", "load"),
    ),
    share("warm", "every byte read, warm", 0.95, "big-numpy", ("ours_numpy", "used"), ("roof_sum",), "used"),
    below(
        "warm-faults",
        "every byte read, warm: page faults",
        "≤ 1 a MiB",
        1,
        lambda value: f"{value:.2f} a MiB",
        faults_per_mib,
    ),
    share(
        "cold",
        "every byte read, cold (populated)",
        0.9,
        "big-cold",
        ("ours_numpy_populate", "load"),
        RAW_READ,
        "read",
    ),
    share(
        "cold-lazy",
        "every byte read and summed, cold (on demand)",
        0.9,
        "big-cold",
        ("ours_numpy", "used"),
        RAW_READ,
        "read",
    ),
    faster(
        "save-torch",
        "torch save_file, 1 GiB, no fsync",
        1.2,
        "big-save-torch",
        "ours_torch_save",
        "returned",
        TORCH_SAVE,
    ),
    faster(
        "save-torch-durable",
        "torch save_file, 1 GiB, durable",
        1.2,
        "big-save-torch",
        "ours_torch_save_durable",
        "durable",
        TORCH_SAVE,
    ),
    faster(
        "save-numpy",
        "numpy save_file, 1 GiB, no fsync",
        1.2,
        "big-save-numpy",
        "ours_numpy_save",
        "returned",
        NUMPY_SAVE,
    ),
    faster(
        "save-numpy-durable",
        "numpy save_file, 1 GiB, durable",
        1.2,
        "big-save-numpy",
        "ours_numpy_save_durable",
        "durable",
        NUMPY_SAVE,
    ),
    faster(
        "save-many-torch",
        "torch save_file, 20,000 tensors, no fsync",
        8,
        "many-save-torch",
        "ours_torch_save",
        "returned",
        TORCH_SAVE,
    ),
    faster(
        "save-many-torch-durable",
        "torch save_file, 20,000 tensors, durable",
        8,
        "many-save-torch",
        "ours_torch_save_durable",
        "durable",
        TORCH_SAVE,
    ),
    faster(
        "save-many-numpy",
        "numpy save_file, 20,000 tensors, no fsync",
        3,
        "many-save-numpy",
        "ours_numpy_save",
        "returned",
        NUMPY_SAVE,
    ),
    faster(
        "save-many-numpy-durable",
        "numpy save_file, 20,000 tensors, durable",
        3,
        "many-save-numpy",
        "ours_numpy_save_durable",
        "durable",
        NUMPY_SAVE,
    ),
    faster(
        "edit",
        "dense copy-on-write edit of a whole 1 GiB model",
        3,
        "edit",
        "ours_edit",
        "edited",
        ("mmap_edit",),
        target="≥ 3× the kernel's page by page",
    ),
    faster(
        "checkpoint-prepared",
        "checkpoint, 1 GiB, output made ready: the pause, no fsync",
        4,
        "checkpoint",
        "checkpoint_prepared",
        "returned",
        ("st_torch_save",),
    ),
    faster(
        "checkpoint-recycled",
        "checkpoint, 1 GiB, output used again: the pause, no fsync",
        4,
        "checkpoint",
        "checkpoint_recycled",
        "returned",
        ("st_torch_save",),
    ),
    share(
        "checkpoint-prepared-memcpy",
        "checkpoint, output made ready: against memcpy",
        0.7,
        "checkpoint",
        ("checkpoint_prepared", "returned"),
        ("roof_memcpy",),
        "copied",
    ),
    share(
        "checkpoint-recycled-memcpy",
        "checkpoint, output used again: against memcpy",
        0.7,
        "checkpoint",
        ("checkpoint_recycled", "returned"),
        ("roof_memcpy",),
        "copied",
    ),
    faster(
        "checkpoint-durable",
        "checkpoint, 1 GiB, output used again, durable",
        1,
        "checkpoint",
        "checkpoint_recycled_durable",
        "durable",
        ("st_torch_save",),
        target="not slower",
    ),
    share(
        "checkpoint-async",
        "save_async: staging against memcpy",
        0.7,
        "checkpoint",
        ("checkpoint_async", "returned"),
        ("roof_memcpy",),
        "copied",
    ),
    share(
        "checkpoint-loop",
        "a Python loop beside save_async keeps its rate",
        0.9,
        "checkpoint-loop",
        ("loop_beside", "looped"),
        ("loop_alone",),
        "looped",
    ),
    below(
        "changed",
        "1 GiB, 1 % of its pages edited: changed()",
        "≤ 20 ms",
        20e-3,
        seconds,
        lambda results: time_of(results, "delta", "delta_changed", "changed"),
    ),
    faster(
        "delta",
        "1 GiB, 1 % of its pages edited: save_delta, no fsync",
        20,
        "delta",
        "delta_save",
        "returned",
        ("st_torch_save",),
    ),
    below(
        "delta-size",
        "its size against the changed content",
        "≤ 1.1×",
        1.1,
        lambda value: f"{value:.3f}×",
        lambda results: results["delta_sizes"]["pages"],
    ),
    below(
        "delta-sparse",
        "bf16, 2 % of its elements changed at random: the delta",
        "≤ 8 % of the file",
        0.08,
        lambda value: f"{value:.1%}",
        lambda results: results["delta_sizes"]["bf16"],
    ),
    faster(
        "share-changed",
        "1 GiB published, 1 tensor of 100 changed",
        20,
        "share",
        "share_changed",
        "published",
        ("share_whole", "share_whole_recycled"),
        target="≥ 20× all of it",
    ),
    faster(
        "share-whole",
        "1 GiB published, all of it",
        1,
        "share",
        "share_whole_recycled",
        "published",
        ("st_share",),
        target="not slower",
    ),
    below(
        "share-notice",
        "1 of 100 published until another process holds it",
        "≤ 5 ms after publishing",
        5e-3,
        seconds,
        lambda results: (
            time_of(results, "share", "share_notice", "noticed")
            - time_of(results, "share", "share_notice", "published")
        ),
    ),
    share(
        "warm-populated",
        "every byte read, warm (populated)",
        0.95,
        "big-numpy",
        ("ours_numpy_populate", "used"),
        ("roof_sum",),
        "used",
    ),
    Target("rust-views", "Rust: open + all views of 20,000", "≥ 5×", rust_views),
    Target("rust-allocations", "Rust: heap allocations in all views of 20,000", "0", rust_allocations),
    Target("hold-pss", "8 processes holding one model: ΣPss", "≤ 1.05 × file", held_pss),
    Target("hold-tables", "8 processes holding one model: ΣVmPTE", "≤ 1/50 of 4 KiB-paged", held_tables),
    Target("no-growth", "open, 64 tensors: 1 TiB against 1 MiB", "the same (within 1.25×)", no_growth),
)
