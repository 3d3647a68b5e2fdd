"""Pages become writable when somebody takes them to write, and no others."""

import hashlib
import io
import json
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import maptensors as mt
import numpy as np
import pytest
import torch
from support import PAGE

NAMES = ("a", "b", "c")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Three tensors of four pages each, and one that has the data start on a page."""
    path = tmp_path / "model.safetensors"
    tensors: dict[str, Any] = {name: np.full((4, 1024), i, np.float32) for i, name in enumerate(NAMES)}
    mt.save({**tensors, "rest": np.zeros(64 << 10, np.uint8)}, path)
    return path


def mapped(path: Path) -> dict[str, list[tuple[int, int]]]:
    """The bytes of the file that this process maps, by protection; neighbours are one."""
    found: dict[str, list[tuple[int, int]]] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        words = line.split(maxsplit=5)
        if words[-1] != str(path.resolve()):
            continue
        start, end = (int(part, 16) for part in words[0].split("-"))
        offset = int(words[2], 16)
        runs = found.setdefault(words[1], [])
        if runs and runs[-1][1] == offset:
            offset = runs.pop()[0]
        runs.append((offset, int(words[2], 16) + end - start))
    return found


def writable(path: Path) -> list[tuple[int, int]]:
    return mapped(path).get("rw-p", [])


def place(model: mt.Model, name: str) -> tuple[int, int]:
    info = model.info(name)
    return info.offset, info.offset + info.nbytes


def frombuffer_to_write(tensor: mt.Tensor) -> Any:
    return torch.frombuffer(tensor, dtype=torch.float32)


WRITERS: dict[str, Callable[[mt.Tensor], Any]] = {
    "numpy": lambda tensor: tensor.numpy(),
    "a part's numpy": lambda tensor: (tensor[0:2].numpy(), tensor[2:4].numpy()),
    "torch": lambda tensor: tensor.torch(),
    "np.asarray": np.asarray,
    "memoryview": memoryview,
    "torch.frombuffer": frombuffer_to_write,
    "torch.from_dlpack": torch.from_dlpack,
    "np.from_dlpack": np.from_dlpack,
    "torch over jax": lambda tensor: torch.from_dlpack(tensor.jax()),
    "data_ptr": lambda tensor: tensor.data_ptr(),
    "view": lambda tensor: tensor.view("U8").numpy(),
    "assignment": lambda tensor: tensor.__setitem__(..., 7.0),
}


@pytest.mark.parametrize("way", WRITERS)
def test_a_tensor_taken_to_be_written_is_made_writable_and_no_other(path: Path, way: str) -> None:
    model = mt.open(path)
    assert writable(path) == []
    held = WRITERS[way](model["b"])
    assert writable(path) == [place(model, "b")]
    if isinstance(held, np.ndarray | torch.Tensor):
        held.reshape(-1)[5:6] = 9
        assert list(model.changed()) == ["b"]


READERS: dict[str, Callable[[mt.Model], Any]] = {
    "tobytes": lambda model: [model[name].tobytes() for name in model],
    "hashing": lambda model: [hashlib.sha256(model[name]).digest() for name in model],  # type: ignore[arg-type]
    "writing to a file": lambda model: [io.BytesIO().write(model[name]) for name in model],  # type: ignore[arg-type]
    "stream": lambda model: list(model.stream()),
    "changed": lambda model: model.changed(),
    "mark": lambda model: model.mark(),
    "residency": lambda model: model.residency_by_tensor(),
    "evict": lambda model: model.evict(),
    "prefetch": lambda model: model.prefetch(wait=True),
    "save": lambda model: mt.dumps(model),
    "repr": lambda model: [repr(model[name]) for name in model],
    "torch on another device": lambda model: model.torch("meta"),
    "a tensor's torch on another device": lambda model: model["a"].torch("meta"),
    "a dlpack copy": lambda model: np.from_dlpack(model["a"], copy=True),
}


@pytest.mark.parametrize(
    ("way", "mode"),
    # Of a model of mode "r" there is no torch.
    [(way, mode) for way in READERS for mode in "rc" if mode == "c" or "torch" not in way],
)
def test_reading_makes_nothing_writable(path: Path, way: str, mode: str) -> None:
    model = mt.open(path, mode)
    held = READERS[way](model)
    assert writable(path) == []
    del held


def test_arrays_of_a_read_only_model_are_of_pages_that_nobody_can_write(path: Path) -> None:
    model = mt.open(path, "r")
    arrays = model.numpy()
    assert not any(array.flags.writeable for array in arrays.values())
    assert writable(path) == []


def test_taking_all_tensors_makes_their_data_writable_in_one_piece(path: Path) -> None:
    model = mt.open(path)
    arrays = model.numpy()
    (start, end), *others = writable(path)
    assert others == []
    assert start == min(place(model, name)[0] for name in model)
    assert end == max(place(model, name)[1] for name in model)
    assert all(array.flags.writeable for array in arrays.values())


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
@pytest.mark.parametrize(
    "of", [lambda m: m.numpy()["b"], lambda m: m["b"].numpy(), lambda m: m["b"][1:3].numpy()]
)
def test_nothing_but_the_tensor_can_be_reached_through_an_arrays_base(
    path: Path, mode: str, of: Callable[[mt.Model], Any]
) -> None:
    array = of(mt.open(path, mode))
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    reached = memoryview(base)
    assert reached.nbytes == array.nbytes
    assert reached.readonly == (mode == "r")
    assert bytes(reached) == array.tobytes()


STRAY = """
import sys, warnings, numpy as np, torch, maptensors as mt
warnings.simplefilter("ignore")
path, way = sys.argv[1:]
model = mt.open(path, "r")
take = {
    "torch.from_dlpack": torch.from_dlpack,
    "torch.asarray": torch.asarray,
    "torch.frombuffer": lambda tensor: torch.frombuffer(tensor, dtype=torch.float32),
    "torch.as_tensor": torch.as_tensor,
}[way]
tensor = take(model["b"])
before = open(path, "rb").read()
tensor.reshape(-1)[5] = 9.0
assert tensor.reshape(-1)[5] == 9.0
assert open(path, "rb").read() == before
if way != "torch.as_tensor":  # which copies
    assert list(model.changed()) == ["b"], model.changed()
assert model["a"].numpy()[0, 0] == 0
kept = model.evict()
assert tensor.reshape(-1)[5] == 9.0
"""


@pytest.mark.parametrize("way", ["torch.from_dlpack", "torch.asarray", "torch.frombuffer", "torch.as_tensor"])
def test_a_stray_write_to_a_read_only_model_costs_a_page_and_is_reported(path: Path, way: str) -> None:
    command = [sys.executable, "-c", STRAY, path, way]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr


LIMITED = """
import resource, sys
import numpy as np
import maptensors as mt
path, mode, large = sys.argv[1], sys.argv[2], int(sys.argv[3])
used = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmData")) << 10
# The kernel counts private writable memory against RLIMIT_DATA, as it does under strict overcommit.
limit = used + large // 2
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
model = mt.open(path, mode)
assert model["large"].tobytes()[-1] == 0 if large < 1 << 24 else True
array = model["small"].numpy()
if mode == "c":
    array[0] = 1
import maptensors.numpy, maptensors.torch
loads = [] if mode == "r" else [lambda: mt.numpy.load_file(path), lambda: mt.torch.load_file(path)]
for take in [lambda: model["large"].numpy(), lambda: model["large"].torch(), lambda: model.numpy(), *loads]:
    try:
        take()
    except OSError as error:
        text = str(error) + str(error.__notes__)
        assert error.errno == 12 and "RLIMIT_DATA" in text and 'mode "r"' in text, text
        assert any(f"making {n} bytes" in text for n in (large, large + 4096)), text
    except ValueError as error:
        assert mode == "r" and "torch" in str(error)
    else:
        assert mode == "r"
"""


@pytest.mark.parametrize("mode", ["r", "c"])
def test_a_model_larger_than_what_may_be_written_opens_and_is_charged_for_what_is_taken(
    tmp_path: Path, mode: str
) -> None:
    path, large = tmp_path / "model.safetensors", 8 << 30
    header = json.dumps(
        {
            "large": {"dtype": "U8", "shape": [large], "data_offsets": [0, large]},
            "small": {"dtype": "U8", "shape": [PAGE], "data_offsets": [large, large + PAGE]},
        }
    ).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + large + PAGE)
    ran = subprocess.run(
        [sys.executable, "-c", LIMITED, path, mode, str(large)], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] != large  # the child's alone


LOADED_AT_ONCE = """
import sys
import maptensors.numpy, maptensors.torch
load = {"numpy": maptensors.numpy, "torch": maptensors.torch}[sys.argv[1]].load_file
kept = load(sys.argv[2])
"""


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_tensors_that_are_all_loaded_are_mapped_writable_at_once(path: Path, framework: str) -> None:
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    command = ["strace", "-f", "-y", "-e", "trace=mmap,mprotect", sys.executable, "-c", LOADED_AT_ONCE]
    ran = subprocess.run([*command, framework, path], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    written = [line for line in ran.stderr.splitlines() if "PROT_WRITE" in line]
    (at,) = (int(line.split()[-1], 16) for line in written if "mmap(" in line and str(path) in line)
    changed = [int(line.split("mprotect(")[1].split(",")[0], 16) for line in written if "mprotect(" in line]
    assert not [address for address in changed if at <= address < at + path.stat().st_size]


def test_a_rank_of_a_model_that_is_edited_in_its_file_never_gets_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    mt.save({"rows": np.zeros((8, 1024), np.float32), "columns": np.zeros((8, 1024), np.float32)}, path)
    model = mt.open(path, "r+")
    with pytest.raises(mt.errors.MapTensorsError, match=r'"columns".*would not reach the file'):
        model.rank_view(1, 2, {"rows": "column", "columns": "row"})
    part = model.rank_view(1, 2, {"rows": "column", "columns": "replicate"})
    part["rows"].numpy()[...] = 5
    part["columns"].numpy()[0, 0] = 6
    model.flush()
    read = mt.open(path, "r")
    assert (read["rows"].numpy()[4:] == 5).all()
    assert (read["rows"].numpy()[:4] == 0).all()
    assert read["columns"].numpy()[0, 0] == 6


def test_a_part_of_a_page_is_never_a_copy_where_a_model_is_edited_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    mt.save({"w": np.zeros((2, 8), np.float32)}, path)
    part = mt.open(path, "r+").rank_view(1, 2, {"w": "column"})
    part["w"].numpy()[...] = 3
    assert mt.open(path, "r")["w"].numpy().tolist() == [[0] * 8, [3] * 8]
