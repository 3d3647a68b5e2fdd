"""Drafts: files made in place, visible whole or not at all."""

import contextlib
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import maptensors as mt
import maptensors.errors
import maptensors.numpy
import ml_dtypes
import numpy as np
import pytest
import torch
from support import Read, mapped_from, names_in, raw, reference, regions, run_python, sha256, succeed

SPEC = {"w": ("F32", (2, 3)), "b": ("F32", (3,))}
VALUES = np.arange(6, dtype="f4").reshape(2, 3)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def fill_numpy_out(draft: mt.Draft) -> None:
    np.multiply(VALUES, 2, out=draft["w"].numpy())


def fill_torch_copy(draft: mt.Draft) -> None:
    draft["w"].torch().copy_(torch.from_numpy(VALUES * 2))


def fill_torch_out(draft: mt.Draft) -> None:
    torch.mul(torch.from_numpy(VALUES), 2, out=draft["w"].torch())


def fill_setitem_numpy(draft: mt.Draft) -> None:
    draft["w"] = VALUES * 2


def fill_setitem_torch(draft: mt.Draft) -> None:
    draft["w"] = torch.from_numpy(VALUES * 2).T.contiguous().T


def fill_setitem_list(draft: mt.Draft) -> None:
    draft["w"] = (VALUES * 2).tolist()


def fill_setitem_big_endian(draft: mt.Draft) -> None:
    draft["w"] = (VALUES * 2).astype(">f8")


def fill_rows(draft: mt.Draft) -> None:
    for i in range(2):
        draft["w"][i] = VALUES[i] * 2


def fill_memoryview(draft: mt.Draft) -> None:
    memoryview(draft["w"]).cast("B")[:] = (VALUES * 2).tobytes()


def fill_in_a_thread(draft: mt.Draft) -> None:
    thread = threading.Thread(target=fill_setitem_numpy, args=(draft,))
    thread.start()
    thread.join()


def fill_from_a_generator(draft: mt.Draft) -> None:
    for name, value in ((name, VALUES * 2) for name in ["w"]):
        draft[name] = value


FILLS = [value for name, value in list(globals().items()) if name.startswith("fill_")]


@pytest.mark.parametrize("fill", FILLS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("durable", [True, False])
def test_what_is_filled_in_is_in_the_file(fill: Callable[[mt.Draft], None], durable: bool, out: Path) -> None:
    with mt.create(out, SPEC, metadata={"a": "b"}, durable=durable) as draft:
        assert not out.exists()
        assert list(draft) == list(draft.keys()) == ["w", "b"]
        assert len(draft) == 2
        assert "w" in draft
        assert "z" not in draft
        assert Path(draft.path) == out
        fill(draft)
        draft["b"] = 7
    assert reference(out) == {
        "w": Read("F32", (2, 3), (VALUES * 2).tobytes()),
        "b": Read("F32", (3,), np.full(3, 7, "f4").tobytes()),
    }
    assert mt.open(out).metadata == {"a": "b"}
    assert names_in(out.parent) == [out.name]


def test_tensors_lie_in_the_new_files_own_pages(out: Path) -> None:
    with mt.create(out, SPEC) as draft:
        assert draft.mapped
        assert draft["w"].mapped
        assert not draft["w"].readonly
        address = draft["w"].data_ptr()
        [region] = [region for region in regions() if region.start <= address < region.end]
        # The file has no name yet.
        assert region.path.startswith(f"{out.parent}/")
        assert region.path.endswith(" (deleted)")
        assert names_in(out.parent) == []
        draft["w"] = VALUES
        with open(f"/proc/self/map_files/{region.start:x}-{region.end:x}", "rb") as file:
            file.seek(region.offset + address - region.start)
            assert file.read(24) == VALUES.tobytes()
    assert reference(out)["w"].data == VALUES.tobytes()


def test_what_is_not_filled_is_zero(out: Path) -> None:
    mt.create(out, SPEC).commit()
    assert reference(out)["w"].data == bytes(24)


SPECS: dict[str, tuple[Any, str, tuple[int, ...]]] = {
    "pair": (("F16", (2, 3)), "F16", (2, 3)),
    "pair with a list": (("F16", [2, 3]), "F16", (2, 3)),
    "scalar": (("I64", ()), "I64", ()),
    "dict": ({"dtype": "BF16", "shape": [4]}, "BF16", (4,)),
    "numpy array": (np.zeros((2, 3), "u2"), "U16", (2, 3)),
    "big-endian array": (np.zeros((2, 3), ">u2"), "U16", (2, 3)),
    "torch tensor": (torch.zeros(5, dtype=torch.bfloat16), "BF16", (5,)),
    "numpy name": (("float32", (1,)), "F32", (1,)),
    "numpy class": ((np.float32, (1,)), "F32", (1,)),
    "numpy dtype": ((np.dtype("f4"), (1,)), "F32", (1,)),
    "numpy bool": ((np.bool_, (1,)), "BOOL", (1,)),
    "python bool": ((bool, (1,)), "BOOL", (1,)),
    "torch dtype": ((torch.float8_e4m3fn, (1,)), "F8_E4M3", (1,)),
    "torch dtype text": (("torch.int8", (1,)), "I8", (1,)),
    "ml_dtypes class": ((ml_dtypes.bfloat16, (1,)), "BF16", (1,)),
    "torch float4": ((torch.float4_e2m1fn_x2, (4,)), "F4", (4,)),
    "numpy integers in the shape": (("U8", tuple(np.array([2, 3]))), "U8", (2, 3)),
    "torch size": (("U8", torch.zeros(2, 3).shape), "U8", (2, 3)),
    "zero-size": (("F32", (0, 3)), "F32", (0, 3)),
}


@pytest.mark.parametrize("form", SPECS)
def test_a_spec_may_be_written_in_many_ways(form: str, out: Path) -> None:
    what, dtype, shape = SPECS[form]
    with mt.create(out, {"t": what}) as draft:
        assert (draft["t"].dtype, draft["t"].shape) == (dtype, shape)
    assert reference(out)["t"][:2] == (dtype, shape)


def test_a_spec_may_be_a_model_or_tensors_of_one(out: Path) -> None:
    with mt.loads(mt.dumps({"a": VALUES, "h": np.zeros(3, "f2")})) as model:
        for spec in [model, dict(model)]:
            with mt.create(out, spec) as draft:
                for name in draft:
                    draft[name] = model[name]
            assert reference(out)["a"].data == VALUES.tobytes()


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ({"t": ("F7", (2,))}, mt.errors.DTypeError),
        ({"t": ("", (2,))}, mt.errors.DTypeError),
        ({"t": (None, (2,))}, TypeError),
        ({"t": (object, (2,))}, mt.errors.DTypeError),
        ({"t": (np.complex128, (2,))}, mt.errors.DTypeError),
        ({"t": ("F32", (-1,))}, (ValueError, OverflowError)),
        ({"t": ("F32", (2.0,))}, (TypeError, ValueError)),
        ({"t": ("F32", 3)}, (TypeError, ValueError)),
        ({"t": ("F32",)}, (TypeError, ValueError)),
        ({"t": {"dtype": "F32"}}, ValueError),
        ({"t": {"shape": (1,)}}, ValueError),
        ({"t": ("F32", (2**62, 4))}, mt.errors.SizeOverflowError),
        ({"t": ("F32", (2**64,))}, (ValueError, OverflowError)),
        ({"t": ("F4", (3,))}, mt.errors.AlignError),
        ({"t": ("U8", (1,) * 10_000)}, mt.errors.LimitError),
        ({"t": "F32"}, (TypeError, ValueError)),
        ({"t": None}, (TypeError, ValueError)),
        ({1: ("F32", (1,))}, (TypeError, ValueError)),
        ({"__metadata__": ("F32", (1,))}, ValueError),
        ([("t", ("F32", (1,)))], (TypeError, AttributeError, ValueError)),
        (None, (TypeError, AttributeError, ValueError)),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_a_spec_that_is_none_is_refused_and_leaves_nothing(spec: Any, error: Any, out: Path) -> None:
    with pytest.raises(error):
        mt.create(out, spec)
    assert names_in(out.parent) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("existing", [True, False])
def test_an_exception_inside_with_leaves_what_was_there(
    error: type[BaseException], existing: bool, out: Path
) -> None:
    if existing:
        mt.save({"old": np.zeros(3)}, out)
    before = {name: sha256(out.parent / name) for name in names_in(out.parent)}

    def attempt() -> None:
        with mt.create(out, SPEC) as draft:
            draft["w"] = VALUES
            raise error("stop")

    with pytest.raises(error, match="stop"):
        attempt()
    assert {name: sha256(out.parent / name) for name in names_in(out.parent)} == before


@pytest.mark.parametrize("how", ["del", "close", "failed assignment"])
def test_a_draft_given_up_leaves_nothing(how: str, out: Path) -> None:
    draft = mt.create(out, SPEC)
    held = draft["w"].numpy()
    held[...] = 1
    if how == "failed assignment":
        with pytest.raises(ValueError, match="shape"):
            draft["w"] = np.zeros(7)
    elif how == "close":
        draft.close()
        draft.close()
        assert draft.closed
    del draft
    gc.collect()
    assert names_in(out.parent) == []
    held[...] = 2
    assert held.sum() == 12


def test_arrays_held_after_the_commit_stay_valid_and_do_not_reach_the_file(out: Path) -> None:
    draft = mt.create(out, SPEC)
    array, tensor, kept = draft["w"].numpy(), draft["b"].torch(), draft["w"]
    array[...] = VALUES
    draft.commit()
    before = sha256(out)
    assert array.tobytes() == kept.tobytes() == VALUES.tobytes()
    array[...] = 9
    tensor[...] = 9
    kept[0, 0] = 8
    assert array[0, 0] == 8
    assert sha256(out) == before
    assert reference(out)["w"].data == VALUES.tobytes()
    del draft
    gc.collect()
    array[...] = 10
    assert sha256(out) == before
    del array, tensor, kept
    gc.collect()
    assert not mapped_from(out)


@pytest.mark.parametrize("end", ["commit", "close", "with"])
def test_a_draft_that_has_ended_refuses_all_use(end: str, out: Path) -> None:
    draft = mt.create(out, SPEC)
    if end == "with":
        with draft:
            pass
    else:
        getattr(draft, end)()
    assert draft.closed
    for use in [draft.commit, lambda: draft["w"], lambda: draft.__setitem__("w", VALUES)]:
        with pytest.raises(ValueError, match="committed or closed"):
            use()
    draft.close()
    assert out.exists() == (end != "close")
    assert "closed" in repr(draft)


def test_a_commit_inside_with_is_not_done_twice(out: Path) -> None:
    with mt.create(out, SPEC) as draft:
        draft["w"] = VALUES
        draft.commit()
        mt.save({"other": np.zeros(1)}, out)
    assert reference(out).keys() == {"other"}


def test_an_unknown_name_is_refused(out: Path) -> None:
    with mt.create(out, SPEC) as draft:
        for use in [lambda: draft["z"], lambda: draft.__setitem__("z", VALUES)]:
            with pytest.raises(mt.errors.MissingError, match="z"):
                use()


def test_a_bool_of_2_written_to_a_draft_is_seen_before_a_framework_does(out: Path) -> None:
    with mt.create(out, {"m": ("BOOL", (2,))}) as draft:
        draft["m"].view("U8")[...] = np.array([0, 2], "u1")
        with pytest.raises(mt.errors.BitPatternError):
            draft["m"].numpy()
        draft["m"].view("U8")[...] = np.array([0, 1], "u1")
        assert draft["m"].numpy().tolist() == [False, True]


def test_a_draft_over_a_file_that_is_mapped_leaves_the_mapping(out: Path) -> None:
    mt.save({"w": VALUES}, out)
    with mt.open(out) as model:
        with mt.create(out, model) as draft:
            np.add(model["w"].numpy(), 1, out=draft["w"].numpy())
        assert model["w"].tobytes() == VALUES.tobytes()
    assert reference(out)["w"].data == (VALUES + 1).tobytes()


def test_an_empty_draft_is_an_empty_file(out: Path) -> None:
    with mt.create(out, {}) as draft:
        assert len(draft) == 0
    assert reference(out) == {}


# Interrupted saves.


class Interrupted(dict[str, np.ndarray]):
    """A mapping whose items raise on the way."""

    def items(self) -> Iterator[tuple[str, np.ndarray]]:  # type: ignore[override]
        yield "a", np.zeros(3)
        raise KeyboardInterrupt("stop")


class Grudging:
    """An array that raises when it is looked at."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise KeyboardInterrupt("stop")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Interrupted(),
        lambda: Interrupted().items(),
        lambda: {"a": np.zeros(3), "b": Grudging()},
        lambda: {"a": np.zeros(3), "b": torch.zeros(3, 4).T, "c": Grudging()},
    ],
    ids=["items", "generator", "array", "after a strided one"],
)
@pytest.mark.parametrize("shards", [None, 24])
@pytest.mark.parametrize("existing", [True, False])
def test_an_interrupt_in_the_middle_of_a_save_leaves_what_was_there(
    make: Callable[[], Any], shards: int | None, existing: bool, out: Path
) -> None:
    if existing:
        mt.save({"old": np.zeros(3)}, out)
    before = {name: sha256(out.parent / name) for name in names_in(out.parent)}
    with pytest.raises(KeyboardInterrupt, match="stop"):
        mt.save(make(), out, max_shard_size=shards)
    after = {name: sha256(out.parent / name) for name in names_in(out.parent)}
    assert {name: after[name] for name in before} == before
    # Shards finished before the interrupt may stay; no index names them, and nothing is half-written.
    assert not [name for name in after if name.endswith(".json")]
    for name in set(after) - set(before):
        assert shards is not None
        reference(out.parent / name)


def test_ctrl_c_during_a_save_leaves_what_was_there(out: Path) -> None:
    mt.save({"a": np.zeros(3)}, out)
    before = sha256(out)
    code = """
import os, signal, sys, threading
import numpy
import maptensors as mt
big = {str(i): numpy.ones(1 << 22, "f4") for i in range(8)}
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    while True:
        mt.save(big, sys.argv[1] + ".big", durable=False)
except KeyboardInterrupt:
    print("interrupted")
"""
    assert succeed(code, out).strip() == "interrupted"
    assert sha256(out) == before
    assert set(names_in(out.parent)) <= {out.name, out.name + ".big"}
    if Path(f"{out}.big").exists():
        assert len(reference(Path(f"{out}.big"))) == 8


KILLED = """
import sys
import numpy
import maptensors as mt
version = 0
print("ready", flush=True)
while True:
    version += 1
    mt.save({str(i): numpy.full(1 << 16, version, "f4") for i in range(8)}, sys.argv[1], durable=False)
"""


def test_a_process_killed_while_saving_leaves_a_whole_file(out: Path) -> None:
    mt.save({str(i): np.zeros(1 << 16, "f4") for i in range(8)}, out)
    for delay in [0.0, 0.003, 0.01, 0.02, 0.05]:
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(delay)
        child.kill()
        child.wait()
        child.stdout.close()
        arrays = maptensors.numpy.load_file(out)
        assert len({float(value) for array in arrays.values() for value in (array.min(), array.max())}) == 1
        assert len(arrays) == 8
    # What the killed left is swept by the next save.
    mt.save({"a": np.zeros(3)}, out)
    assert names_in(out.parent) == [out.name]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    if os.getuid() != 0:
        pytest.skip("mounting a small file system needs root: a full disk is untested")
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"mounting a tmpfs is refused here, a full disk is untested: {done.stderr.strip()}")
    yield place
    gc.collect()
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("way", ["save", "shards", "draft", "strided"])
def test_a_full_disk_is_an_os_error_and_the_old_file_stays(way: str, tiny_disk: Path) -> None:
    out = tiny_disk / "out.safetensors"
    mt.save({"old": np.zeros(1 << 10)}, out)
    before = sha256(out)
    big = np.ones((1 << 10, 1 << 10), "f8")
    ways: dict[str, Callable[[], Any]] = {
        "save": lambda: mt.save({"a": big}, out),
        "shards": lambda: mt.save({"a": big, "b": big}, out, max_shard_size=1 << 23),
        "draft": lambda: mt.create(out, {"a": big}),
        "strided": lambda: mt.save({"a": big.T}, out),
    }
    with pytest.raises(OSError, match="No space left") as caught:
        ways[way]()
    assert str(caught.value.filename).startswith(str(tiny_disk))
    assert sha256(out) == before
    assert names_in(tiny_disk) == [out.name]
    mt.save({"small": np.zeros(1 << 10)}, out)


def test_a_draft_and_a_save_work_on_tmpfs(tiny_disk: Path) -> None:
    out = tiny_disk / "out.safetensors"
    with mt.create(out, SPEC) as draft:
        draft["w"] = VALUES
    assert reference(out)["w"].data == VALUES.tobytes()
    with mt.open(out) as model:
        model.save(out)
    assert reference(out)["w"].data == VALUES.tobytes()


def test_files_that_look_like_temporaries_of_others_are_left(out: Path) -> None:
    others = [
        out.with_name(name) for name in [".tmpAbC123", "out.safetensors.tmp", ".out.safetensors.swp", "x~"]
    ]
    for other in others:
        other.write_bytes(b"mine")
    mt.save({"a": np.zeros(3)}, out)
    assert all(other.read_bytes() == b"mine" for other in others)


def test_a_raw_file_of_the_support_module_is_what_it_says(out: Path) -> None:
    out.write_bytes(raw({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"x"))
    assert reference(out) == {"a": Read("U8", (1,), b"x")}
    assert run_python("raise SystemExit(3)").returncode == 3


def test_a_generator_fills_a_draft_holding_one_tensor_at_a_time(out: Path) -> None:
    report = succeed(
        """
import resource, sys
import numpy as np, maptensors as mt

def tensors():
    for i in range(32):
        yield f"w{i}", np.full(2 << 20, i, np.float32)

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

before, most, told = anonymous(), 0, []
def progress(done, total):
    global most
    most = max(most, anonymous())
    told.append(done / total)

with mt.create(sys.argv[1], {f"w{i}": ("F32", (2 << 20,)) for i in range(32)}) as draft:
    draft.fill(tensors(), progress=progress)
assert told[-1] == 1.0 and len(told) == 32
print((most - before) // 1024)
""",
        out,
    )
    # Of 256 MiB in tensors of 8.
    assert int(report) <= 8 + 64
    with mt.open(out) as model:
        assert all((model[f"w{i}"].numpy() == i).all() for i in range(32))


def test_a_fill_that_forgets_or_makes_up_a_tensor_is_refused(out: Path) -> None:
    with (
        pytest.raises(ValueError, match='tensor "b" of the draft was not given'),
        mt.create(out, SPEC) as draft,
    ):
        draft.fill([("w", VALUES)])
    with pytest.raises(KeyError, match="made up"), mt.create(out, SPEC) as draft:
        draft.fill({"made up": VALUES})
    assert not out.exists()
