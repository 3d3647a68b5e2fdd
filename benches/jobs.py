"""What is measured: the shapes, the jobs over them, and the table of targets."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import shapes
from shapes import MIB, Shape, Shapes


@dataclass(frozen=True)
class Effort:
    """How much to do: the full run, or the quick one that only shows that everything works."""

    quick: bool

    @property
    def big(self) -> int:
        return (64 if self.quick else 1024) * MIB

    @property
    def many(self) -> int:
        return 2_000 if self.quick else 20_000

    def applied(self, bench: "Bench") -> "Bench":
        """The quick run takes a few samples of each arm from one process."""
        repetitions = min(max(bench.repetitions, 2), 3)
        return replace(bench, processes=1, repetitions=repetitions) if self.quick else bench


@dataclass(frozen=True)
class Arm:
    """One body among those compared in a job."""

    body: str
    ours: bool
    label: str
    roof: bool = False


@dataclass(frozen=True)
class Bench:
    """One job over one shape: which bodies do it, and how often."""

    id: str
    title: str
    shape: Shape
    arms: tuple[Arm, ...]
    processes: int
    repetitions: int = 1
    cold: bool = False
    filled: str = "written"  # how the page cache was filled: "written" in large pieces, or "read"
    until: str | None = None
    roof: str | None = None  # the id of the bench, or this one's own, whose roof arms bound it
    bytes_moved: int = 0


LABELS = {
    "ours_numpy": "maptensors numpy load_file",
    "ours_numpy_populate": "maptensors open(populate=True).numpy()",
    "st_numpy": "safetensors numpy (mmap)",
    "st_numpy_pread": "safetensors numpy (pread)",
    "memmap_numpy": "numpy memmap, json by hand",
    "raw_mmap": "raw mmap, json by hand",
    "plain_read": "plain read, json by hand",
    "ours_torch": "maptensors torch load_file",
    "st_torch": "safetensors torch (mmap)",
    "st_torch_pread": "safetensors torch (pread)",
    "torch_load": "torch.load(mmap=True)",
    "ours_jax": "maptensors flax load_file",
    "st_jax": "safetensors flax (mmap)",
    "st_jax_pread": "safetensors flax (pread)",
    "ours_steps": "maptensors open",
    "ours_safe_open_steps": "maptensors safe_open",
    "st_steps": "safetensors safe_open (mmap)",
    "st_pread_steps": "safetensors safe_open (pread)",
    "memmap_steps": "numpy memmap, json by hand",
    "torch_load_steps": "torch.load(mmap=True)",
    "ours_index": "maptensors open",
    "st_index": "safetensors, each shard (mmap)",
    "st_index_pread": "safetensors, each shard (pread)",
    "ours_torch_save": "maptensors torch save_file, durable=False",
    "ours_torch_save_durable": "maptensors torch save_file, durable=True",
    "ours_numpy_save": "maptensors numpy save_file, durable=False",
    "ours_numpy_save_durable": "maptensors numpy save_file, durable=True",
    "st_torch_save": "safetensors torch save_file",
    "st_numpy_save": "safetensors numpy save_file",
    "torch_save": "torch.save",
    "roof_write": "roof: parallel pwrite",
    "checkpoint_prepared": "maptensors Checkpointer, output made ready",
    "checkpoint_recycled": "maptensors Checkpointer, output used again",
    "checkpoint_recycled_durable": "maptensors Checkpointer, used again, durable=True",
    "checkpoint_async": "maptensors Checkpointer, save_async",
    "delta_changed": "maptensors changed()",
    "delta_save": "maptensors save_delta, durable=False",
    "delta_save_durable": "maptensors save_delta, durable=True",
    "share_whole": "maptensors publish, everything, new files",
    "share_whole_recycled": "maptensors publish, everything, into files used before",
    "share_changed": "maptensors publish, 1 tensor of 100 named as changed",
    "share_compare": 'maptensors publish, changed="compare", 1 tensor of 100 differs',
    "share_notice": "maptensors publish, 1 of 100, until another process has it",
    "st_share": "safetensors save_file to shared memory and rename",
    "loop_alone": "a Python loop, nothing beside it",
    "loop_beside": "the same loop beside save_async",
    "ours_edit": "maptensors, promote()",
    "ours_edit_dense": "maptensors, dense_edits=True",
    "ours_edit_lazily": "maptensors numpy(), page by page",
    "mmap_edit": "the kernel, page by page (mmap ACCESS_COPY)",
    "copy_edit": "copied to ordinary memory, then edited",
    "roof_memcpy": "roof: memcpy, all threads",
    "roof_memcpy_one_thread": "roof: memcpy, one thread",
    "roof_sum": "roof: sum of a region already mapped",
    "roof_direct": "roof: O_DIRECT, 4 threads a core",
    "roof_direct_few": "roof: O_DIRECT, a thread a core",
    "roof_buffered": "roof: pread, a thread a core",
    "roof_buffered_one": "roof: pread, one thread",
}


def arms(*bodies: str) -> tuple[Arm, ...]:
    return tuple(Arm(body, body.startswith("ours"), LABELS[body], body.startswith("roof")) for body in bodies)


NUMPY = ("ours_numpy", "st_numpy", "st_numpy_pread", "memmap_numpy", "raw_mmap", "plain_read")
TORCH = ("ours_torch", "st_torch", "st_torch_pread", "torch_load")
STEPS = (
    "ours_steps",
    "ours_safe_open_steps",
    "st_steps",
    "st_pread_steps",
    "memmap_steps",
    "torch_load_steps",
)
EDIT = ("ours_edit", "ours_edit_dense", "ours_edit_lazily", "mmap_edit", "copy_edit")
MEMCPY = ("roof_memcpy", "roof_memcpy_one_thread")
CHECKPOINT = (
    "checkpoint_prepared",
    "checkpoint_recycled",
    "checkpoint_recycled_durable",
    "checkpoint_async",
    "st_torch_save",
    "roof_memcpy",
)
SHARE = (
    "share_whole",
    "share_whole_recycled",
    "share_changed",
    "share_compare",
    "share_notice",
    "st_share",
    "roof_memcpy",
)
DELTA = ("delta_changed", "delta_save", "delta_save_durable", "st_torch_save")
COLD = ("roof_direct", "roof_direct_few", "roof_buffered", "roof_buffered_one")


def benches(make: Shapes, effort: Effort) -> list[Bench]:
    """Every job but the ladders and the many processes."""
    big = make.single(f"big-{effort.big >> 20}m", shapes.equal(16, effort.big), pickle=True)
    foreign = make.single(f"foreign-{effort.big >> 20}m", shapes.equal(16, effort.big), align=8)
    many = make.single(
        f"many-{effort.many}",
        [(f"model.layers.{i}.bias", "F32", (64,)) for i in range(effort.many)],
        pickle=True,
    )
    hundred = make.single(f"hundred-{effort.big >> 20}m", shapes.equal(100, effort.big))
    lora = make.single("lora", shapes.lora(), pickle=True)
    llama = make.sharded("llama-7b", list(shapes.llama()), 3)
    deepseek = make.sharded("deepseek-v3", list(shapes.deepseek()), 163)
    # Processes, and samples in each: 20 or more in all. Where frameworks are slow to import, few processes
    # take more samples.
    one, two, some, small = (10, 2), (7, 3), (5, 4), (4, 6)
    size, small_ones = "1 GiB in 16 tensors", f"{effort.many:,} small tensors"
    shards = arms("ours_index", "st_index", "st_index_pread")
    jax = arms("ours_jax", "st_jax", "st_jax_pread")
    held = {"roof": "used", "bytes_moved": big.nbytes}  # against the sum of a region already mapped
    summed = arms("roof_sum")
    jobs = [
        Bench("many-steps", f"{small_ones}, step by step", many, arms(*STEPS), *two),
        Bench("many-torch", f"{small_ones}, torch load", many, arms(*TORCH), *some),
        Bench("many-numpy", f"{small_ones}, numpy load", many, arms(*NUMPY), *two),
        Bench("big-steps", f"{size}, step by step", big, arms(*STEPS), *some),
        Bench(
            "big-numpy",
            f"{size}, numpy load",
            big,
            arms(*NUMPY, "ours_numpy_populate") + summed,
            *one,
            **held,
        ),
        Bench("big-torch", f"{size}, torch load", big, arms(*TORCH) + summed, *some, **held),
        Bench("big-jax", f"{size}, JAX load", big, jax + summed, *some, **held),
        Bench(
            "big-numpy-read",
            f"{size}, numpy load, in the page cache as plain reads leave it",
            big,
            arms("ours_numpy", "st_numpy", "raw_mmap") + summed,
            *some,
            filled="read",
            **held,
        ),
        Bench(
            "big-jax-foreign",
            f"{size}, aligned to 8 bytes as safetensors writes, JAX load",
            foreign,
            jax,
            *some,
        ),
        Bench("deepseek", "DeepSeek-V3-like: 163 shards, 91,991 tensors", deepseek, shards, *two),
        Bench("llama", "Llama-2-7B-like: 3 shards, 323 tensors", llama, shards, *some),
        Bench("lora-torch", "LoRA, 500 tensors, torch load", lora, arms(*TORCH), *small),
        Bench("lora-numpy", "LoRA, 500 tensors, numpy load", lora, arms(*NUMPY), *small),
        Bench("edit", "1 added to every element of 1 GiB", big, arms(*EDIT), *two, bytes_moved=big.nbytes),
        Bench("memcpy", "Roof: memcpy of 1 GiB, resident", big, arms(*MEMCPY), 5),
        *_savers("big-save", size, big, (5, 4)),
        *_savers("many-save", small_ones, many, some),
        Bench("checkpoint", f"{size}, saved again", big, arms(*CHECKPOINT), 5, 4, bytes_moved=big.nbytes),
        Bench(
            "share",
            "1 GiB in 100 tensors, published to other processes",
            hundred,
            arms(*SHARE),
            5,
            4,
            bytes_moved=hundred.nbytes,
        ),
        Bench("delta", f"{size}, one page in a hundred edited", big, arms(*DELTA), 5, 4),
        Bench(
            "checkpoint-loop", "A Python loop beside a save", big, arms("loop_alone", "loop_beside"), *some
        ),
    ]
    jobs += _cold(big, many, deepseek)
    jobs += _real(make, *small)
    return [effort.applied(job) for job in jobs]


def _savers(id: str, title: str, shape: Shape, times: tuple[int, int]) -> list[Bench]:
    torch = ("ours_torch_save", "ours_torch_save_durable", "st_torch_save", "torch_save")
    array = ("ours_numpy_save", "ours_numpy_save_durable", "st_numpy_save", "roof_write")
    return [
        Bench(f"{id}-torch", f"{title}, torch save", shape, arms(*torch), *times, bytes_moved=shape.nbytes),
        Bench(f"{id}-numpy", f"{title}, numpy save", shape, arms(*array), *times, bytes_moved=shape.nbytes),
    ]


def _cold(big: Shape, many: Shape, deepseek: Shape) -> list[Bench]:
    """Six processes, a sample in each, of which one may turn out not to have been cold."""
    size, small_ones = "1 GiB in 16 tensors", f"{many.tensors:,} small tensors"
    shards = arms("ours_index", "st_index", "st_index_pread")
    moved = {"roof": "read", "bytes_moved": big.nbytes}
    loads = arms(*NUMPY, "ours_numpy_populate", *COLD)
    return [
        Bench("big-cold", f"{size}, numpy load, cold", big, loads, 6, cold=True, **moved),
        Bench("big-steps-cold", f"{size}, step by step, cold", big, arms(*STEPS), 6, cold=True),
        Bench("many-steps-cold", f"{small_ones}, step by step, cold", many, arms(*STEPS), 6, cold=True),
        Bench("deepseek-cold", "DeepSeek-V3-like, cold", deepseek, shards, 6, cold=True),
    ]


def _real(make: Shapes, processes: int, repetitions: int) -> list[Bench]:
    """The real models of the tests: the one that is here, and the one that is fetched, where it was."""
    digits = Path(__file__).parent.parent / "models" / "digits.safetensors"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maptensors-tests"
    jobs = []
    for name, path in (("digits", digits), ("minilm", cache / "minilm.safetensors")):
        if not path.exists():
            print(f"NOTE: {name} is skipped: the tests have not fetched it yet")
            continue
        shape = make.existing(name, path, pickle=True)
        title = f"{name}: {shape.tensors} tensors, {shape.nbytes / MIB:.1f} MiB"
        for kind, bodies in (("numpy", NUMPY), ("torch", TORCH)):
            title_of = f"{title}, {kind} load"
            jobs.append(Bench(f"{name}-{kind}", title_of, shape, arms(*bodies), processes, repetitions))
    return jobs


def ladder_bytes(make: Shapes) -> list[Shape]:
    """64 tensors in ever more bytes."""
    return [
        make.single(f"ladder-bytes-{size}m", shapes.equal(64, size * MIB), sparse=True)
        for size in (1, 32, 1 << 10, 32 << 10, 1 << 20)
    ]


def ladder_tensors(make: Shapes) -> list[Shape]:
    """Ever more tensors in 64 MiB."""
    return [
        make.single(f"ladder-tensors-{count}", shapes.equal(count, 64 * MIB), sparse=True)
        for count in (16, 64, 256, 1024, 4096, 16384, 65536)
    ]
