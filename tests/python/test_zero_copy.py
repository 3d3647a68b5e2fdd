"""Arrays are the file's own pages: nothing is copied until it is written, and then only that page.

Where memory lies is read from /proc/self/maps and /proc/self/pagemap, not asked of the package.
"""

import gc
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import maptensors as mt
import maptensors.flax
import maptensors.numpy
import maptensors.torch
import numpy as np
import pytest
import safetensors.torch
import torch
from support import PAGE, entry, file_offset, mapped_from, raw, sha256, soon, succeed

SHAPES = {"weight": (256, 128), "bias": (1024,), "odd": (3, 5), "scalar": ()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of our own writing."""
    path = tmp_path / "model.safetensors"
    rng = np.random.default_rng(0)
    mt.save({name: rng.standard_normal(shape).astype("f4") for name, shape in SHAPES.items()}, path)
    return path


@pytest.fixture(autouse=True)
def no_mapping_outlives_its_test(tmp_path: Path) -> Iterator[None]:
    yield
    files = [file for file in tmp_path.iterdir() if file.is_file()]
    if any(mapped_from(file) for file in files):
        gc.collect()
    assert not any(mapped_from(file) for file in files)


def sparse(path: Path, elements: int, count: int = 1) -> Path:
    """A file of U8 zeros that takes no space."""
    header = {f"w{i}": entry("U8", [elements], i * elements, (i + 1) * elements) for i in range(count)}
    head = raw(header)
    path.write_bytes(head)
    os.truncate(path, len(head) + elements * count)
    return path


def memoryview_address(tensor: mt.Tensor) -> int:
    return np.asarray(memoryview(tensor)).__array_interface__["data"][0]


ADDRESS: dict[str, Callable[[mt.Tensor], int]] = {
    "data_ptr": lambda tensor: tensor.data_ptr(),
    "numpy": lambda tensor: tensor.numpy().__array_interface__["data"][0],
    "asarray": lambda tensor: np.asarray(tensor).__array_interface__["data"][0],
    "memoryview": memoryview_address,
    "torch": lambda tensor: tensor.torch().data_ptr(),
    "torch from_dlpack": lambda tensor: torch.from_dlpack(tensor).data_ptr(),
    "torch legacy from_dlpack": lambda tensor: torch.utils.dlpack.from_dlpack(tensor.__dlpack__()).data_ptr(),
    "numpy from_dlpack": lambda tensor: np.from_dlpack(tensor).__array_interface__["data"][0],
}


@pytest.mark.parametrize("way", ADDRESS)
@pytest.mark.parametrize("name", SHAPES)
def test_what_is_handed_out_lies_at_the_tensors_place_in_the_file(path: Path, name: str, way: str) -> None:
    with mt.open(path) as model:
        tensor = model[name]
        address = ADDRESS[way](tensor)
        assert file_offset(path, address, tensor.nbytes) == model.info(name).offset
        del tensor


def test_parts_of_a_tensor_lie_in_the_file_too(path: Path) -> None:
    with mt.open(path) as model:
        start = model.info("weight").offset
        for key, element in [
            ((3,), 3 * 128),
            ((slice(None), 5), 5),
            ((-1, -1), 255 * 128 + 127),
            ((slice(10, 20), slice(2, None, 3)), 10 * 128 + 2),
            ((slice(None, None, -1), 0), 255 * 128),
        ]:
            part = model["weight"][key]
            for address in [part.data_ptr(), part.numpy().__array_interface__["data"][0]]:
                assert file_offset(path, address, 4) == start + 4 * element
        part = model["weight"][5:, ::2].torch()
        assert file_offset(path, part.data_ptr(), 4) == start + 4 * 5 * 128
        assert part.stride() == (128, 2)
        del part


def test_whole_models_are_handed_out_without_a_copy(path: Path) -> None:
    with mt.open(path) as model:
        places = {name: model.info(name).offset for name in model}
    arrays = maptensors.numpy.load_file(path)
    found = {
        name: file_offset(path, a.__array_interface__["data"][0], a.nbytes) for name, a in arrays.items()
    }
    assert found == places
    tensors = maptensors.torch.load_file(path)
    assert {name: file_offset(path, t.data_ptr(), t.nbytes) for name, t in tensors.items()} == places


def test_jax_aliases_every_tensor_on_a_64_byte_boundary_of_files_saved_here(path: Path) -> None:
    with mt.open(path, "r") as model:
        aliased = []
        for name, tensor in model.items():
            array = tensor.jax()
            if tensor.data_ptr() % 64 == 0:
                assert array.unsafe_buffer_pointer() == tensor.data_ptr()
                assert (
                    file_offset(path, array.unsafe_buffer_pointer(), tensor.nbytes) == model.info(name).offset
                )
                aliased.append(name)
            assert np.asarray(array).tobytes() == tensor.tobytes()
            del array, tensor
        assert {"weight", "bias"} <= set(aliased)
    loaded = maptensors.flax.load_file(path)
    assert file_offset(path, loaded["weight"].unsafe_buffer_pointer(), 4) is not None


@pytest.mark.parametrize("mode", ["r", "c"])
def test_opening_touches_no_page_of_data(path: Path, mode: str) -> None:
    with mt.open(path, mode) as model:
        assert len(model) == 4
        assert {name: model.info(name).shape for name in model} == SHAPES
        held = [tensor.numpy() if mode == "r" else tensor.torch() for tensor in model.values()]
        pages = model.residency()
        assert pages.touched == pages.private == 0 < pages.pages
        assert held[0].sum() != 0
        assert model.residency().touched > 0
        del held


def test_reading_touches_the_pages_read_and_only_them(tmp_path: Path) -> None:
    # Sparse, so the kernel has nothing cached around a fault that it could map along.
    path = sparse(tmp_path / "big.safetensors", 1 << 30)
    with mt.open(path) as model:
        array = model["w0"].numpy()
        assert array[1 << 29] == 0
        assert 0 < model.residency().touched <= 1024
        del array


def test_populate_reads_everything_in_and_copies_nothing(path: Path) -> None:
    def check() -> None:
        with mt.open(path, populate=True) as model:
            pages = model.residency()
            assert pages.touched == pages.pages > 0
            assert pages.private == 0

    soon(check)


def test_with_dense_edits_a_large_tensor_becomes_private_when_it_is_taken(tmp_path: Path) -> None:
    import numpy as np

    path = tmp_path / "m.safetensors"
    large = np.arange(1 << 20, dtype=np.float32)
    mt.save({"a": large, "b": large + 1, "small": np.ones(100, np.float32)}, path)
    before = path.read_bytes()
    with mt.open(path, dense_edits=True) as model:
        assert model.residency().private == 0
        array = model["a"].numpy()
        assert model.residency().private == array.nbytes // model.residency().page_size
        array += 1
        assert np.array_equal(model["a"].numpy(), large + 1)
        small = model["small"].numpy()
        assert model.residency().private == array.nbytes // model.residency().page_size
        assert np.array_equal(model.numpy()["b"], large + 1)
        assert small.sum() == 100
        model["b"].numpy()[:] = 0
        # Taken once: what was written stays.
        assert not model["b"].numpy().any()
        assert np.array_equal(model["a"].numpy(), large + 1)
    assert path.read_bytes() == before
    with mt.open(path, mode="r", dense_edits=True) as model:
        model.numpy()
        assert model.residency().private == 0


def test_a_sparse_file_of_a_tebibyte_opens_without_touching_or_allocating(tmp_path: Path) -> None:
    path = sparse(tmp_path / "huge.safetensors", 1 << 30, count=1024)
    out = succeed(
        """
        import sys, resource
        import maptensors as mt
        import numpy
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model = mt.open(sys.argv[1])
        arrays = model.numpy()
        last = arrays["w1023"][-1]
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(len(arrays), last, after - before)
        """.replace("\n        ", "\n"),
        path,
    )
    count, last, grown_kib = map(int, out.split())
    assert (count, last) == (1024, 0)
    assert grown_kib < 64 * 1024


def test_loading_a_gibibyte_allocates_next_to_nothing(tmp_path: Path) -> None:
    path = sparse(tmp_path / "big.safetensors", 1 << 28, count=4)
    out = succeed(
        """
        import re, sys
        from pathlib import Path
        import numpy
        import maptensors.numpy
        def kib(key):
            return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        before = kib("VmHWM"), kib("RssAnon")
        arrays = maptensors.numpy.load_file(sys.argv[1])
        loaded = sum(a.nbytes for a in arrays.values())
        print(loaded, kib("VmHWM") - before[0], kib("RssAnon") - before[1])
        copy = [a.copy() for a in arrays.values()]
        copy[0][:] = 1
        print(kib("RssAnon") - before[1])
        """.replace("\n        ", "\n"),
        path,
    )
    loaded, peak, anonymous, copied = map(int, out.split())
    assert loaded == 1 << 30
    assert peak < 16 * 1024
    assert anonymous < 16 * 1024
    assert copied > 200 * 1024  # what is measured can be seen


WRITES: dict[str, Callable[[mt.Tensor], Any]] = {
    "numpy": lambda tensor: tensor.numpy().__setitem__((0, 0), 7.0),
    "torch": lambda tensor: tensor.torch()[0, :1].fill_(7.0),
    "memoryview": lambda tensor: memoryview(tensor).cast("B").cast("f").__setitem__(0, 7.0),
    "setitem": lambda tensor: tensor.__setitem__((0, 0), 7.0),
    "numpy out=": lambda tensor: np.add(7.0, 0.0, out=tensor.numpy()[0, :1]),
    "torch from_dlpack": lambda tensor: torch.from_dlpack(tensor)[0, 0].fill_(7.0),
}


@pytest.mark.parametrize("way", WRITES)
def test_a_write_is_seen_by_all_views_but_never_by_the_file(path: Path, way: str) -> None:
    before = sha256(path)
    with mt.open(path) as model, mt.open(path) as other:
        WRITES[way](model["weight"])
        assert model["weight"].numpy()[0, 0] == 7.0
        assert model["weight"].torch()[0, 0] == 7.0
        assert np.frombuffer(model["weight"].tobytes(), "f4")[0] == 7.0
        assert other["weight"].numpy()[0, 0] != 7.0
        assert model.residency().private == 1
        assert other.residency().private == 0
    assert sha256(path) == before


@pytest.mark.parametrize("pages", [1, 7, 32])
def test_as_many_pages_become_private_as_are_written(path: Path, pages: int) -> None:
    with mt.open(path) as model:
        assert model.info("weight").offset % PAGE == 0
        for write in [lambda tensor: tensor.numpy(), lambda tensor: tensor.torch()]:
            flat = write(model["weight"]).reshape(-1)
            for page in range(pages):
                flat[page * PAGE // 4] += 1
            assert model.residency().private == pages
            del flat


def test_a_read_only_model_gives_arrays_that_cannot_be_written(path: Path) -> None:
    before = sha256(path)
    with mt.open(path, "r") as model:
        tensor = model["weight"]
        assert tensor.readonly
        assert not tensor.numpy().flags.writeable
        assert memoryview(tensor).readonly
        with pytest.raises(ValueError, match="read-only"):
            tensor.numpy()[0, 0] = 1
        with pytest.raises(ValueError, match=r"WRITEABLE"):
            tensor.numpy().flags.writeable = True
        with pytest.raises(ValueError, match='mode="c"'):
            tensor[0, 0] = 1
        with pytest.raises(ValueError, match='mode="c"'):
            tensor.torch()
        with pytest.raises(ValueError, match='mode="c"'):
            model.torch()
        with pytest.raises(BufferError, match="read-only"):
            tensor.__dlpack__()
        from_dlpack = np.from_dlpack(tensor)
        assert not from_dlpack.flags.writeable
        assert tensor[1:].readonly
        assert tensor.view("U8").readonly
        del tensor, from_dlpack
    assert sha256(path) == before


def test_a_writable_array_says_so(path: Path) -> None:
    with mt.open(path) as model:
        assert not model["weight"].readonly
        assert model["weight"].numpy().flags.writeable
        assert not memoryview(model["weight"]).readonly


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
def test_read_only_memory_reaches_torch_only_by_a_copy(path: Path) -> None:
    with mt.open(path, "r") as model:
        copied = torch.from_dlpack(model["weight"].numpy().copy())
        copied[0, 0] = 5
        assert model["weight"].numpy()[0, 0] != 5


HOLDERS: dict[str, Callable[[mt.Tensor], Any]] = {
    "tensor": lambda tensor: tensor,
    "part": lambda tensor: tensor[10:20],
    "numpy": lambda tensor: tensor.numpy(),
    "numpy view": lambda tensor: tensor.numpy()[3:, ::2].T,
    "memoryview": memoryview,
    "torch": lambda tensor: tensor.torch(),
    "torch view": lambda tensor: tensor.torch()[3:].t(),
    "storage": lambda tensor: tensor.torch().untyped_storage(),
    "capsule": lambda tensor: tensor.__dlpack__(max_version=(1, 0)),
    "legacy capsule": lambda tensor: tensor.__dlpack__(),
    "numpy of torch": lambda tensor: tensor.torch().numpy(),
    "torch of numpy": lambda tensor: torch.from_numpy(tensor.numpy()),
    "jax": lambda tensor: tensor.jax(),
    "iterator": lambda tensor: iter(tensor.numpy()),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_whatever_is_handed_out_keeps_the_mapping_and_lets_it_go(path: Path, holder: str) -> None:
    model = mt.open(path)
    tensor = model["weight"]
    held = HOLDERS[holder](tensor)
    model.close()
    del model, tensor
    gc.collect()
    assert mapped_from(path)
    del held
    gc.collect()
    assert not mapped_from(path)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_references_may_be_dropped_in_any_order(path: Path, order: tuple[int, ...]) -> None:
    expected = mt.open(path)["weight"].tobytes()
    model = mt.open(path)
    held: list[Any] = [model, model["weight"], model["weight"].numpy(), model["weight"].torch()]
    del model
    for place in order:
        held[place] = None
        if held[2] is not None:
            assert held[2].tobytes() == expected
        if held[3] is not None:
            assert held[3].numpy().tobytes() == expected
    assert not mapped_from(path)


def test_arrays_made_in_threads_outlive_model_and_thread(path: Path) -> None:
    expected = mt.open(path)["weight"].tobytes()
    kept: list[np.ndarray] = []

    def work() -> None:
        with mt.open(path) as model:
            kept.append(model["weight"].numpy())
            model["weight"].torch().sum()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [array.tobytes() for array in kept] == [expected] * 8
    dropper = threading.Thread(target=kept.clear)
    dropper.start()
    dropper.join()
    assert not mapped_from(path)


def test_a_closed_model_refuses_access_and_says_so(path: Path) -> None:
    model = mt.open(path)
    model.close()
    model.close()
    assert model.closed
    for use in [
        len,
        list,
        lambda m: m["weight"],
        lambda m: m.metadata,
        lambda m: m.numpy(),
        lambda m: "a" in m,
    ]:
        with pytest.raises(ValueError, match="closed"):
            use(model)
    assert "closed" in repr(model)


@pytest.mark.parametrize("how", ["unlink", "rename over", "save over"])
def test_views_are_unaffected_when_the_file_is_replaced(path: Path, how: str) -> None:
    expected = path.read_bytes()
    model = mt.open(path)
    start = model.info("weight").offset
    array = model["weight"].numpy()
    if how == "unlink":
        path.unlink()
    elif how == "rename over":
        other = path.with_name("other")
        other.write_bytes(b"x" * 100)
        other.replace(path)
    else:
        mt.save({"weight": np.zeros((256, 128), "f4")}, path)
    assert array.tobytes() == expected[start : start + array.nbytes]
    assert model["bias"].tobytes() in expected
    array[0, 0] = 3
    assert model["weight"].numpy()[0, 0] == 3
    model.close()


def test_pread_memory_is_not_the_file_and_is_aligned(path: Path) -> None:
    with mt.open(path, backend="pread") as model:
        assert not mapped_from(path)
        for tensor in model.values():
            assert not tensor.mapped
            assert file_offset(path, tensor.data_ptr()) is None
        assert model["weight"].data_ptr() % 64 == 0
        kept = model["weight"].numpy()
    assert kept.flags.writeable
    path.write_bytes(b"")  # as the contract allows for this backend
    assert np.isfinite(kept).all()


def test_every_torch_tensor_has_a_storage_of_its_own(path: Path, tmp_path: Path) -> None:
    tensors = maptensors.torch.load_file(path)
    for tensor in tensors.values():
        storage = tensor.untyped_storage()
        assert storage.data_ptr() == tensor.data_ptr()
        assert storage.nbytes() == tensor.nbytes
        assert tensor.storage_offset() == 0
    torch.save(tensors["odd"], tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < 4096
    safetensors.torch.save_file(tensors, tmp_path / "again.safetensors")
    again = safetensors.torch.load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_capsules_that_nobody_consumes_are_freed(path: Path) -> None:
    with mt.open(path) as model:
        capsules = [model["weight"].__dlpack__(max_version=v) for v in [None, (0, 8), (1, 0), (1, 1)] * 50]
    assert '"dltensor_versioned"' in repr(capsules[2])
    assert '"dltensor"' in repr(capsules[0])
    assert mapped_from(path)
    del capsules, model
    gc.collect()
    assert not mapped_from(path)


def test_a_capsule_is_consumed_once(path: Path) -> None:
    with mt.open(path) as model:
        capsule = model["weight"].__dlpack__()
    tensor = torch.utils.dlpack.from_dlpack(capsule)
    with pytest.raises(RuntimeError, match="once"):
        torch.utils.dlpack.from_dlpack(capsule)
    del capsule
    assert tensor.shape == (256, 128)


def test_a_dlpack_copy_is_a_copy_and_another_device_is_refused(path: Path) -> None:
    with mt.open(path) as model:
        tensor = model["weight"]
        assert tensor.__dlpack_device__() == (1, 0)
        copied = np.from_dlpack(tensor, copy=True)
        assert file_offset(path, copied.__array_interface__["data"][0]) is None
        assert copied.tobytes() == tensor.tobytes()
        with pytest.raises(BufferError, match="CPU"):
            tensor.__dlpack__(dl_device=(2, 0))
        assert np.array(tensor, copy=True).flags.owndata
        assert np.shares_memory(np.asarray(tensor, copy=False), tensor.numpy())
        with pytest.raises(ValueError, match="copy"):
            np.asarray(tensor, dtype="f8", copy=False)
        del tensor


def test_jax_arrays_outlive_the_model(path: Path) -> None:
    expected = mt.open(path)["weight"].tobytes()
    arrays = maptensors.flax.load_file(path)
    gc.collect()
    path.unlink()
    assert np.asarray(arrays["weight"]).tobytes() == expected
    assert float(jax.numpy.sum(arrays["weight"] * 0)) == 0.0


@pytest.mark.parametrize("enabled", [True, False])
def test_taking_all_tensors_leaves_the_cycle_collector_as_it_was(tmp_path: Path, enabled: bool) -> None:
    import gc

    import numpy as np

    path = tmp_path / "m.safetensors"
    mt.save({"w": np.ones(3)}, path)
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with mt.open(path) as model:
            assert len(model.torch()) == len(model.numpy()) == 1
            assert gc.isenabled() is enabled
            with pytest.raises(RuntimeError):
                model.torch("no such device")
            assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()
