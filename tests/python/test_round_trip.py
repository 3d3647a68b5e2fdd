"""Every bit of every dtype survives, whichever way it goes in and out."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import maptensors as mt
import maptensors.errors
import maptensors.flax
import maptensors.numpy
import maptensors.torch
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import BITS, GOLDEN, NUMPY_NAMES, Read, entry, names_in, ours, raw, reference, torch_bytes

PACKED = {"F4", "F6_E2M3", "F6_E3M2"}
TORCH_NAMES = {name: NUMPY_NAMES[name] for name in NUMPY_NAMES} | {"F4": "float4_e2m1fn_x2"}
SHAPE = (3, 8, 32)  # 768 elements: every byte occurs


def numpy_dtype(name: str) -> np.dtype:
    own = NUMPY_NAMES[name]
    return np.dtype(getattr(ml_dtypes, own) if hasattr(ml_dtypes, own) else own)


def bits_of(dtype: str) -> bytes:
    """Data that holds every byte at every place; for wide floats also NaNs with payloads and -0.0."""
    nbytes = 3 * 8 * 32 * BITS[dtype] // 8
    if dtype == "BOOL":
        return bytes(i % 2 for i in range(nbytes))
    data = bytearray((i * 7 + i // 256) % 256 for i in range(nbytes))
    if dtype in {"F16", "BF16", "F32", "F64", "C64"}:
        special = {
            "F16": "0080 017e 017c fffe ff7b 0100",
            "BF16": "0080 c17f 817f c1ff 7f7f 0100",
            "F32": "00000080 0100c07f 0100807f 0100c0ff ffff7f7f 01000000",
            "C64": "00000080 0100c07f 0100807f 0100c0ff ffff7f7f 01000000",
            "F64": "0000000000000080 010000000000f87f 010000000000f07f 010000000000f8ff",
        }[dtype]
        special_bytes = bytes.fromhex(special)
        data[: len(special_bytes)] = special_bytes
    return bytes(data)


def one(dtype: str) -> bytes:
    """A file with one tensor of this dtype."""
    data = bits_of(dtype)
    return raw({"t": entry(dtype, list(SHAPE), 0, len(data))}, data)


def keep(tensor: Any, path: Path, **options: Any) -> mt.Model:
    mt.save({"t": tensor}, path, **options)
    return mt.open(path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def test_the_table_of_dtypes_is_complete() -> None:
    with mt.open(GOLDEN / "all-dtypes.safetensors") as model, mt.open(GOLDEN / "f6.safetensors") as f6:
        assert {t.dtype for t in [*model.values(), *f6.values()]} == set(BITS)


@pytest.mark.parametrize("file", json.loads((GOLDEN / "expected.json").read_text()))
@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_golden_files_survive_and_the_reference_agrees(file: str, backend: str, out: Path) -> None:
    path = GOLDEN / file
    with mt.open(path, backend=backend) as model:
        assert ours(model) == reference(path)
        model.save(out)
        assert mt.dumps(model) == out.read_bytes()
        with mt.open(out) as again:
            assert (again.metadata, again.has_metadata) == (model.metadata, model.has_metadata)
    assert reference(out) == reference(path)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize(
    "way", ["file", "bytes", "pread", "model", "shards", "draft", "slice", "assignment", "pairs"]
)
def test_tensors_keep_every_bit(dtype: str, way: str, tmp_path: Path) -> None:
    source = one(dtype)
    with mt.loads(source) as model:
        tensor = model["t"]
        expected = {"t": Read(dtype, SHAPE, bits_of(dtype))}
        out = tmp_path / "out.safetensors"
        match way:
            case "file" | "pread":
                mt.save({"t": tensor}, out)
                found = mt.open(out, backend="mmap" if way == "file" else "pread")
            case "bytes":
                found = mt.loads(mt.dumps({"t": tensor}))
            case "model":
                model.save(out)
                found = mt.open(out)
            case "shards":
                mt.save({"t": tensor, "u": tensor}, out, max_shard_size=1)
                found = mt.open(tmp_path / "out.safetensors.index.json")
                expected["u"] = expected["t"]
                assert len(found.paths) == 2
            case "draft":
                with mt.create(out, {"t": (dtype, SHAPE)}) as draft:
                    draft["t"].view("U8")[...] = tensor.view("U8").numpy()
                found = mt.open(out)
            case "slice":
                mt.save({"t": tensor[1:, :, :16], "u": tensor[...], "v": tensor[2]}, out)
                found = mt.open(out)
                whole = np.frombuffer(bits_of(dtype), "u1").reshape(3, 8, -1)
                half = whole.shape[2] // 2
                expected = {
                    "t": Read(dtype, (2, 8, 16), whole[1:, :, :half].tobytes()),
                    "u": expected["t"],
                    "v": Read(dtype, (8, 32), whole[2].tobytes()),
                }
            case "assignment":
                mt.save({"t": tensor}, out)
                found = mt.open(out)
                found["t"].view("U8")[...] = np.uint8(0)
                found["t"].view("U8")[...] = tensor.view("U8")
            case "pairs":
                mt.save(iter([("t", tensor)]), out)
                found = mt.open(out)
        assert ours(found) == expected


@pytest.mark.parametrize("dtype", NUMPY_NAMES)
def test_numpy_arrays_keep_every_bit(dtype: str, out: Path) -> None:
    array = mt.loads(one(dtype))["t"].numpy()
    assert (array.dtype, array.shape) == (numpy_dtype(dtype), SHAPE)
    if dtype not in PACKED:
        assert array.tobytes() == bits_of(dtype)
    for kept in [array, np.asfortranarray(array), array[::-1].copy()[::-1], array[:, :, :]]:
        maptensors.numpy.save_file({"t": kept}, out)
        assert reference(out) == {"t": Read(dtype, SHAPE, bits_of(dtype))}
        assert maptensors.numpy.load_file(out)["t"].tobytes() == array.tobytes()
        assert maptensors.numpy.load(maptensors.numpy.save({"t": kept}))["t"].tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", TORCH_NAMES)
def test_torch_tensors_keep_every_bit(dtype: str, out: Path) -> None:
    tensor = mt.loads(one(dtype))["t"].torch()
    assert tensor.dtype == getattr(torch, TORCH_NAMES[dtype])
    assert tuple(tensor.shape) == (SHAPE if dtype != "F4" else (3, 8, 16))
    assert torch_bytes(tensor) == bits_of(dtype)
    maptensors.torch.save_file({"t": tensor}, out)
    assert reference(out) == {"t": Read(dtype, SHAPE, bits_of(dtype))}
    assert torch_bytes(maptensors.torch.load_file(out)["t"]) == bits_of(dtype)
    data = maptensors.torch.save({"t": tensor})
    assert data == out.read_bytes()
    assert torch_bytes(maptensors.torch.load(data)["t"]) == bits_of(dtype)


@pytest.mark.parametrize("dtype", sorted(set(NUMPY_NAMES) - {"F4"}))
def test_jax_arrays_keep_every_bit(dtype: str, out: Path) -> None:
    with jax.enable_x64(True):
        array = mt.loads(one(dtype))["t"].jax()
        assert (array.dtype, array.shape) == (numpy_dtype(dtype), SHAPE)
        maptensors.flax.save_file({"t": array}, out)
        assert reference(out) == {"t": Read(dtype, SHAPE, bits_of(dtype))}
        assert np.asarray(maptensors.flax.load_file(out)["t"]).tobytes() == bits_of(dtype)
        data = maptensors.flax.save({"t": array})
        assert data == out.read_bytes()
        assert np.asarray(maptensors.flax.load(data)["t"]).tobytes() == bits_of(dtype)


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F6_E3M2"])
def test_a_dtype_that_no_framework_has_is_refused_by_name_and_readable_as_bytes(dtype: str) -> None:
    tensor = mt.loads(one(dtype))["t"]
    for convert in [tensor.numpy, tensor.torch, tensor.jax]:
        with pytest.raises(mt.errors.DTypeError, match=dtype):
            convert()
    assert bytes(tensor.view("U8")) == tensor.tobytes() == bits_of(dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F4"])
def test_bytes_of_any_dtype_go_through_the_buffer_protocol_untyped(dtype: str) -> None:
    tensor = mt.loads(one(dtype))["t"]
    assert hashlib.sha256(tensor).digest() == hashlib.sha256(bits_of(dtype)).digest()
    with pytest.raises(BufferError, match=dtype):
        memoryview(tensor)


# Slicing against numpy.

INDEXED = np.arange(5 * 4 * 3 * 2, dtype="i2").reshape(5, 4, 3, 2)


@st.composite
def keys(draw: st.DrawFn, *, backwards: bool = True) -> tuple[Any, ...]:
    """Basic indices that suit INDEXED: integers, slices and at most one Ellipsis."""
    rank = draw(st.integers(0, INDEXED.ndim))
    dims = draw(st.permutations(INDEXED.shape)) if rank == 0 else INDEXED.shape
    parts: list[Any] = []
    split = draw(st.integers(0, rank) | st.none())
    # With an Ellipsis, what follows it indexes the last axes.
    axes = (
        list(range(rank))
        if split is None
        else [*range(split), *range(INDEXED.ndim - rank + split, INDEXED.ndim)]
    )
    for axis in axes:
        n = dims[axis]
        steps = st.integers(-4, 4).filter(bool) if backwards else st.integers(1, 4)
        bound = st.integers(-n - 2, n + 2) | st.none()
        parts.append(draw(st.integers(-n, n - 1) | st.builds(slice, bound, bound, steps | st.none())))
    if split is not None:
        parts.insert(split, ...)
    return tuple(parts)


@pytest.fixture(scope="module")
def indexed() -> Iterator[mt.Tensor]:
    with mt.loads(mt.dumps({"t": INDEXED})) as model:
        yield model["t"]


@given(key=keys())
@example(key=(...,))
@example(key=())
@example(key=(slice(4, None, -3), ..., -1))
@settings(deadline=None, max_examples=300)
def test_slicing_is_numpys(indexed: mt.Tensor, key: tuple[Any, ...]) -> None:
    part, expected = indexed[key], INDEXED[key]
    assert part.shape == np.shape(expected)
    assert part.tobytes() == expected.tobytes()
    np.testing.assert_array_equal(part.numpy(), expected)
    np.testing.assert_array_equal(np.asarray(memoryview(part)), expected)
    assert mt.loads(mt.dumps({"x": part}))["x"].tobytes() == expected.tobytes()
    if len(key) == 1:
        assert indexed[key[0]].tobytes() == expected.tobytes()


@given(first=keys(), second=st.integers(-2, 1) | st.builds(slice, st.integers(-3, 3), st.none(), st.just(-1)))
@settings(deadline=None, max_examples=150)
def test_slices_of_slices_are_numpys(indexed: mt.Tensor, first: tuple[Any, ...], second: Any) -> None:
    part, expected = indexed[first], INDEXED[first]
    try:
        expected = expected[second]
    except IndexError:
        with pytest.raises(IndexError):
            part[second]
    else:
        np.testing.assert_array_equal(part[second].numpy(), expected)


@given(key=keys(backwards=False))
@settings(deadline=None, max_examples=200)
def test_slicing_for_torch_is_torchs(indexed: mt.Tensor, key: tuple[Any, ...]) -> None:
    part, expected = indexed[key].torch(), torch.from_numpy(INDEXED)[key]
    assert part.shape == expected.shape
    assert torch.equal(part, expected)


def test_torch_is_refused_for_negative_steps(indexed: mt.Tensor) -> None:
    with pytest.raises(ValueError, match="negative"):
        indexed[::-1].torch()


@pytest.mark.parametrize(
    ("key", "error"),
    [
        (5, IndexError),
        (-6, IndexError),
        ((0, 4), IndexError),
        ((0, 0, 0, 0, 0), IndexError),
        ((..., ...), IndexError),
        (2**70, (IndexError, OverflowError)),
        (None, TypeError),
        ("a", TypeError),
        (1.0, TypeError),
        ([0, 1], TypeError),
        (slice(None, None, 0), ValueError),
        (slice("a"), TypeError),
    ],
    ids=repr,
)
def test_other_indices_are_refused(indexed: mt.Tensor, key: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        indexed[key]


def test_a_bool_is_not_taken_for_the_index_0_or_1(indexed: mt.Tensor) -> None:
    # For numpy and torch a bool is a mask: [True] adds an axis. The same result or a refusal, not row 1.
    with pytest.raises((TypeError, IndexError)):
        indexed[True]


@pytest.mark.parametrize("key", [(slice(0, 3),), (..., slice(1, 4)), (0, 1), (..., 3)])
def test_packed_elements_are_not_cut_inside_a_byte(key: tuple[Any, ...]) -> None:
    data = bytes(range(8))
    tensor = mt.loads(raw({"t": entry("F4", [4, 4], 0, 8)}, data))["t"]
    if key == (slice(0, 3),):
        assert tensor[key].tobytes() == data[:6]
    else:
        with pytest.raises(mt.errors.AlignError):
            tensor[key]
    assert tensor[1:3, 2:].tobytes() == bytes([3, 5])


# What numpy may hold.

BASE = np.arange(2 * 3 * 4, dtype="f4").reshape(2, 3, 4)
ODD_LAYOUTS: dict[str, np.ndarray] = (
    {
        "transposed": BASE.T,
        "fortran": np.asfortranarray(BASE),
        "strided": BASE[:, ::2, ::3],
        "backwards": BASE[::-1, :, ::-1],
        "broadcast": np.broadcast_to(np.float32(3), (4, 5)),
        "broadcast axis": np.broadcast_to(BASE[0, 0], (6, 4)),
        "0-d": np.float32(2.5).reshape(()),
        "0-d view": BASE[1, 2, 3, ...],
        "scalar": np.float64(-0.0),
        "empty": np.zeros((0,), "i8"),
        "empty in the middle": np.zeros((3, 0, 2), "f2"),
        "empty strided": BASE[:0:2, ::2],
        "read-only": np.frombuffer(BASE.tobytes(), "f4"),
        "unaligned": np.frombuffer(b"x" + BASE.tobytes(), "f4", offset=1, count=24),
        "field of a record": np.zeros(5, [("a", "u1"), ("b", "f4")])["b"] + np.float32(1),
        "strided field": np.ones(5, [("a", "u1"), ("b", "f4")])["b"],
        "matrix": np.arange(6, dtype="i4").reshape(2, 3).view(np.ndarray),
        "ones of stride": BASE[:, :1, :][:, ::-1],
    }
    | {
        f"big-endian {kind}": np.arange(-3 if kind[0] in "if" else 0, 7).astype(f">{kind}")
        for kind in ["i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8"]
    }
    | {
        "big-endian strided": np.arange(12).astype(">f8").reshape(3, 4)[::-1, ::2],
        "big-endian 0-d": np.array(7, ">i4"),
        "big-endian empty": np.zeros((0, 2), ">i4"),
    }
)


@pytest.mark.parametrize("layout", ODD_LAYOUTS)
@pytest.mark.parametrize("way", ["file", "bytes", "draft", "shards"])
def test_arrays_of_any_layout_are_saved_as_what_they_mean(layout: str, way: str, tmp_path: Path) -> None:
    array = ODD_LAYOUTS[layout]
    out = tmp_path / "out.safetensors"
    match way:
        case "file":
            maptensors.numpy.save_file({"t": array}, out)
        case "bytes":
            out.write_bytes(maptensors.numpy.save({"t": array}))
        case "shards":
            mt.save({"t": array}, out, max_shard_size="1 KB")
        case "draft":
            with mt.create(out, {"t": array}) as draft:
                draft["t"] = array
    [[_, read]] = reference(out).items()
    native = array.astype(array.dtype.newbyteorder("="))
    assert read.shape == array.shape
    assert read.data == native.tobytes()
    found = maptensors.numpy.load_file(out)["t"]
    assert found.dtype == native.dtype
    np.testing.assert_array_equal(found, array)


@given(
    array=hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)
@settings(deadline=None, max_examples=200)
def test_arrays_of_any_dtype_are_saved_right_or_refused(array: np.ndarray) -> None:
    native = array.dtype.newbyteorder("=")
    if native.name in NUMPY_NAMES.values():
        found = maptensors.numpy.load(mt.dumps({"t": array}))["t"]
        assert (found.dtype, found.shape) == (native, array.shape)
        assert found.tobytes() == array.astype(native).tobytes()
    else:
        with pytest.raises(mt.errors.DTypeError):
            mt.dumps({"t": array})


REFUSED_ARRAYS: dict[str, Any] = {
    "object": np.array([1, "a", None], object),
    "structured": np.zeros(3, [("a", "i4"), ("b", "f4")]),
    "complex128": np.zeros(3, "c16"),
    "datetime": np.zeros(3, "M8[s]"),
    "timedelta": np.zeros(3, "m8[s]"),
    "longdouble": np.zeros(3, np.longdouble),
    "text": np.array(["a", "b"]),
    "bytes": np.array([b"a", b"b"]),
    "void": np.zeros(3, "V4"),
    "string dtype": np.array(["a"], np.dtypes.StringDType()),
    "int4": np.zeros(4, ml_dtypes.int4),
    "float8_e4m3": np.zeros(4, ml_dtypes.float8_e4m3),
    "torch complex128": torch.zeros(3, dtype=torch.complex128),
}


@pytest.mark.parametrize("what", REFUSED_ARRAYS)
@pytest.mark.parametrize("way", ["file", "bytes", "shards", "spec"])
def test_dtypes_the_format_does_not_have_are_refused_and_leave_nothing(
    what: str, way: str, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    tensors = {"fine": np.zeros(3), "wrong": REFUSED_ARRAYS[what]}
    save: Callable[[], Any] = {
        "file": lambda: mt.save(tensors, out),
        "bytes": lambda: mt.dumps(tensors),
        "shards": lambda: mt.save(tensors, out, max_shard_size=24),
        "spec": lambda: mt.create(out, tensors),
    }[way]
    with pytest.raises(mt.errors.DTypeError, match="wrong") as caught:
        save()
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ValueError)
    assert names_in(tmp_path) == []


def test_a_masked_array_is_not_saved_as_if_nothing_were_masked() -> None:
    masked = np.ma.MaskedArray([1.0, 2.0], mask=[True, False])
    with pytest.raises((TypeError, ValueError)):
        mt.dumps({"t": masked})


# What torch may hold.


def test_torch_tensors_of_any_layout_are_saved_as_what_they_mean(out: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    complex_base = torch.complex(base, -base)
    tensors = {
        "transposed": base.permute(2, 0, 1),
        "strided": base[:, ::2, 1::2],
        "expanded": base[0, :1].expand(5, 4),
        "channels last": torch.arange(48.0).reshape(1, 3, 4, 4).to(memory_format=torch.channels_last),
        "conjugate": complex_base.conj(),
        "conjugate transposed": complex_base.mH,
        "negative": complex_base.conj().imag,
        "real": complex_base.real,
        "parameter": torch.nn.Parameter(base.clone()),
        "parameter strided": torch.nn.Parameter(base.clone())[0].T,
        "requires grad": (base.clone().requires_grad_() * 2),
        "buffer": torch.nn.Buffer(base.clone()),
        "0-d": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "bf16 strided": base.to(torch.bfloat16).mT,
        "f8 strided": base.to(torch.float8_e4m3fn).mT,
        "bool strided": (base > 5).mT,
        "u16 strided": base.to(torch.uint16).mT,
    }
    assert tensors["conjugate"].is_conj()
    assert tensors["negative"].is_neg()
    mt.save(tensors, out)
    assert mt.dumps(tensors) == out.read_bytes()
    read = reference(out)
    for name, tensor in tensors.items():
        meant = tensor.detach().resolve_conj().resolve_neg().contiguous()
        assert read[name].shape == tuple(meant.shape), name
        assert read[name].data == torch_bytes(meant), name


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: torch.eye(3).to_sparse(), ValueError, "sparse"),
        (lambda: torch.zeros(3, device="meta"), ValueError, "meta"),
        (lambda: torch.zeros(3, 4, device="meta").T, ValueError, "meta"),
    ],
    ids=["sparse", "meta", "meta strided"],
)
def test_torch_tensors_without_plain_memory_are_refused(
    make: Callable[[], torch.Tensor], error: type[Exception], text: str, tmp_path: Path
) -> None:
    for save in [lambda t: mt.save(t, tmp_path / "out"), mt.dumps]:
        with pytest.raises(error, match=text):
            save({"fine": torch.zeros(2), "t": make()})
    assert names_in(tmp_path) == []


def test_a_torch_tensor_in_float4_counts_its_elements_not_its_pairs(out: Path) -> None:
    pairs = torch.arange(8, dtype=torch.uint8).reshape(2, 4).view(torch.float4_e2m1fn_x2)
    with keep(pairs, out) as model:
        assert (model["t"].dtype, model["t"].shape) == ("F4", (2, 8))
        assert torch_bytes(model["t"].torch()) == bytes(range(8))
    assert reference(out)["t"] == Read("F4", (2, 8), bytes(range(8)))


# What else may be saved.


def test_jax_arrays_of_any_dtype_and_layout_are_saved(out: Path) -> None:
    base = jnp.arange(12.0).reshape(3, 4)
    tensors = {
        "plain": base,
        "transposed": base.T,
        "bf16": base.astype(jnp.bfloat16),
        "f8": base.astype(jnp.float8_e4m3fn),
        "0-d": jnp.float32(2),
        "empty": jnp.zeros((0, 2)),
        "bool": base > 3,
    }
    maptensors.flax.save_file(tensors, out)
    for name, read in reference(out).items():
        assert read.shape == tensors[name].shape
        assert read.data == np.asarray(tensors[name]).tobytes()


class Exotic:
    """An array by protocol only."""

    def __init__(self, array: np.ndarray, protocol: str) -> None:
        self._array = array
        if protocol == "__array__":
            self.__class__ = type(
                "ByArray", (Exotic,), {"__array__": lambda s, dtype=None, copy=None: s._array}
            )
        else:
            self.__class__ = type(
                "ByDLPack",
                (Exotic,),
                {
                    "__dlpack__": lambda s, **options: s._array.__dlpack__(**options),
                    "__dlpack_device__": lambda s: s._array.__dlpack_device__(),
                },
            )


def test_a_mixed_dict_is_saved(out: Path) -> None:
    array = np.arange(6, dtype="f4").reshape(2, 3)
    source = mt.loads(mt.dumps({"x": array}))
    tensors = {
        "numpy": array,
        "torch": torch.from_numpy(array.copy()),
        "jax": jnp.asarray(array),
        "tensor": source["x"],
        "part": source["x"][:, ::-1],
        "array protocol": Exotic(array, "__array__"),
        "dlpack protocol": Exotic(array, "__dlpack__"),
        "numpy scalar": np.float32(3),
    }
    mt.save(tensors, out)
    read = reference(out)
    for name in ["numpy", "torch", "jax", "tensor", "array protocol", "dlpack protocol"]:
        assert read[name] == Read("F32", (2, 3), array.tobytes())
    assert read["part"].data == array[:, ::-1].tobytes()
    assert read["numpy scalar"] == Read("F32", (), np.float32(3).tobytes())


def test_pairs_may_come_from_a_generator_and_keep_their_order(out: Path) -> None:
    mt.save(((str(i), np.full(16, i, "f4")) for i in [3, 1, 2]), out)
    with mt.open(out) as model:
        assert list(model) == ["3", "1", "2"]


def test_a_model_is_saved_with_metadata_and_edits(out: Path, tmp_path: Path) -> None:
    mt.save({"w": np.zeros(4, "f4"), "v": np.ones(4, "f4")}, out, metadata={"format": "pt", "": "é\n\0"})
    with mt.open(out) as model:
        model["w"].numpy()[1] = 5
        for save in [
            lambda p: mt.save(model, p),
            lambda p: model.save(p),
            lambda p: mt.save(model, p, max_shard_size=16),
        ]:
            where = tmp_path / "copy.safetensors"
            save(where)
            index = tmp_path / "copy.safetensors.index.json"
            with mt.open(index if index.exists() else where) as copy:
                assert copy.metadata == {"format": "pt", "": "é\n\0"}
                assert copy["w"].numpy().tolist() == [0, 5, 0, 0]
        assert model.metadata == {"format": "pt", "": "é\n\0"}
        model.save(tmp_path / "other", metadata={"a": "b"})
        mt.save(model, tmp_path / "none", metadata={})
    assert mt.open(tmp_path / "other").metadata == {"a": "b"}
    assert mt.open(tmp_path / "none").metadata == {}


def test_saving_onto_the_mapped_source_is_exact(out: Path) -> None:
    rng = np.random.default_rng(1)
    arrays = {f"{i}": rng.standard_normal(1000 + i).astype("f4") for i in range(20)}
    mt.save(arrays, out)
    for _ in range(3):
        with mt.open(out) as model:
            model["3"].numpy()[:] += 1
            arrays["3"] = arrays["3"] + np.float32(1)
            view = model["5"].numpy()
            model.save(out)
            assert view.tobytes() == arrays["5"].tobytes()
        assert {n: r.data for n, r in reference(out).items()} == {n: a.tobytes() for n, a in arrays.items()}


@pytest.mark.parametrize(
    "tensors",
    [
        {"t": [1.0, 2.0]},
        {"t": 1.0},
        {"t": "text"},
        {"t": None},
        {"t": {"nested": np.zeros(2)}},
        {"t": b"bytes"},
        {1: np.zeros(2)},
        {b"t": np.zeros(2)},
        {None: np.zeros(2)},
        [np.zeros(2)],
        [("t",)],
        [("t", np.zeros(2), 3)],
        np.zeros(2),
        None,
        3,
    ],
    ids=repr,
)
@pytest.mark.parametrize("way", ["file", "bytes", "shards"])
def test_what_is_no_dict_of_arrays_is_refused_and_leaves_nothing(
    tensors: Any, way: str, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    save: Callable[[], Any] = {
        "file": lambda: mt.save(tensors, out),
        "bytes": lambda: mt.dumps(tensors),
        "shards": lambda: mt.save(tensors, out, max_shard_size=1),
    }[way]
    with pytest.raises((ValueError, TypeError)):
        save()
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    "metadata", [{"a": 1}, {1: "a"}, {"a": None}, {"a": {"b": "c"}}, "text", 3], ids=repr
)
def test_metadata_that_is_not_text_is_refused(metadata: Any, out: Path) -> None:
    with pytest.raises((TypeError, ValueError)):
        mt.save({"t": np.zeros(2)}, out, metadata=metadata)
    assert names_in(out.parent) == []


def test_the_same_name_twice_is_refused(out: Path) -> None:
    with pytest.raises(mt.errors.DuplicateError):
        mt.save([("t", np.zeros(2)), ("t", np.zeros(2))], out)
    assert names_in(out.parent) == []


@pytest.mark.parametrize("name", ["__metadata__", "\ud800", "a\udfffb"], ids=ascii)
def test_a_name_the_file_cannot_hold_is_refused(name: str, out: Path) -> None:
    with pytest.raises(ValueError, match=r".+"):
        mt.save({name: np.zeros(2)}, out)
    assert names_in(out.parent) == []


@pytest.mark.parametrize(
    "name",
    ["", "\0", "../x", "é漢\U0001f600", "\u202e", '"\\', "x" * (1 << 20), "\x1b[31m"],
    ids=lambda n: ascii(n)[:12],
)
def test_any_other_name_survives(name: str, out: Path) -> None:
    maptensors.numpy.save_file({name: np.arange(3, dtype="u1")}, out)
    assert reference(out) == {name: Read("U8", (3,), b"\0\1\2")}
    with mt.open(out) as model:
        assert list(model) == [name]
        assert model[name].name == name
    assert names_in(out.parent) == [out.name]


def test_saving_is_deterministic_and_keeps_the_callers_order_among_equals(out: Path) -> None:
    arrays = [(f"{i}", np.full((64, 64), i, "f4")) for i in (2, 0, 1)]
    files = []
    for tensors in [dict(arrays), iter(arrays), {n: torch.from_numpy(a) for n, a in arrays}]:
        mt.save(tensors, out, metadata={"b": "1", "a": "2"})
        files.append(out.read_bytes())
    mt.save(dict(arrays), out, metadata={"a": "2", "b": "1"})
    files.append(out.read_bytes())
    assert len(set(files)) == 1
    assert list(mt.open(out)) == ["2", "0", "1"]
    with safetensors.safe_open(out, framework="np") as file:
        assert file.metadata() == {"a": "2", "b": "1"}


@pytest.mark.parametrize(
    ("size", "files"),
    [(16384, 3), (32768, 2), ("16.384KB", 3), ("32 KiB", 2), (1, 3), ("1TB", 1), (10**30, 1)],
)
def test_shards_hold_at_most_max_shard_size(size: int | str, files: int, out: Path) -> None:
    arrays = {f"{i}": np.full((64, 64), i, "f4") for i in range(3)}
    mt.save(arrays, out, max_shard_size=size)
    written = [name for name in names_in(out.parent) if name.endswith(".safetensors")]
    assert len(written) == files
    with mt.open(out.parent) as model:
        assert {n: r.data for n, r in ours(model).items()} == {n: a.tobytes() for n, a in arrays.items()}


@pytest.mark.parametrize("size", [0, -1, "0", "lots", "5 XB", "", "-5GB", 2.5, [], "1e3"], ids=repr)
def test_a_shard_size_that_is_none_is_refused(size: Any, out: Path) -> None:
    with pytest.raises((ValueError, TypeError)):
        mt.save({"t": np.zeros(2)}, out, max_shard_size=size)
    assert names_in(out.parent) == []


@pytest.mark.parametrize("before", [b"\0", b"\x01"])
def test_bools_are_checked_before_a_framework_sees_them(before: bytes) -> None:
    tensor = mt.loads(raw({"t": entry("BOOL", [2, 2], 0, 4)}, before + b"\2\0\1"))["t"]
    for use in [tensor.numpy, tensor.torch, tensor.jax, tensor.__dlpack__, lambda: memoryview(tensor)]:
        with pytest.raises(mt.errors.BitPatternError, match=r"view\(\"U8\"\)"):
            use()
    assert tensor.view("U8").numpy().tolist() == [[before[0], 2], [0, 1]]
    assert tensor[1].numpy().tolist() == [False, True]
    assert tensor[:, 0].numpy().tolist() == [bool(before[0]), False]


@pytest.mark.parametrize(
    ("source", "to", "shape"),
    list(
        itertools.chain(
            [("F32", "U8", (2, 16)), ("F32", "I32", (2, 4)), ("F32", "F64", (2, 2)), ("F32", "F4", (2, 32))],
            [("U8", "F16", (2, 2)), ("BF16", "float16", (2, 4)), ("BF16", torch.int16, (2, 4))],
            [("BF16", np.uint16, (2, 4)), ("F4", "U8", (2, 2)), ("C64", "F32", (2, 8))],
        )
    ),
)
def test_a_view_is_the_same_bytes_as_another_dtype(source: str, to: Any, shape: tuple[int, ...]) -> None:
    data = bytes(range(8 * BITS[source] // 8))
    tensor = mt.loads(raw({"t": entry(source, [2, 4], 0, len(data))}, data))["t"]
    view = tensor.view(to)
    assert view.shape == shape
    assert (view.data_ptr(), view.tobytes()) == (tensor.data_ptr(), data)


@pytest.mark.parametrize("to", ["F64", "C64", "F7", None, 3, "f32"])
def test_a_view_that_does_not_fit_is_refused(to: Any) -> None:
    tensor = mt.loads(raw({"t": entry("U8", [3], 0, 3)}, b"abc"))["t"]
    with pytest.raises((ValueError, TypeError)):
        tensor.view(to)


@pytest.mark.parametrize(
    "value",
    [
        2.0,
        np.float64(2),
        [2, 2, 2, 2],
        np.full(4, 2, "i2"),
        torch.full((4,), 2.0),
        jnp.full(4, 2.0),
        torch.tensor(2),
        np.full(4, 2.0)[::-1],
        torch.full((4,), 2, dtype=torch.float16),
    ],
    ids=lambda value: type(value).__name__,
)
def test_assignment_takes_what_frameworks_take(value: Any) -> None:
    tensor = mt.loads(mt.dumps({"t": np.zeros((3, 4), "f4")}))["t"]
    tensor[1] = value
    assert tensor.numpy().tolist() == [[0] * 4, [2] * 4, [0] * 4]
    tensor[::-1][0, ::2] = 1
    assert tensor.numpy()[2].tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("dtype", ["U8", "U16", "I8", "F16", "BF16", "BOOL", "F8_E4M3", "C64"])
@pytest.mark.parametrize("value", [1, [0, 1, 1, 0], True])
def test_python_numbers_may_be_assigned_whatever_the_dtype(dtype: str, value: Any) -> None:
    tensor = mt.loads(mt.dumps({"t": np.zeros(4, numpy_dtype(dtype))}))["t"]
    expected = tensor.numpy().copy()
    expected[...] = value
    tensor[...] = value
    assert tensor.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "value",
    [np.zeros(3), np.zeros((4, 1)), torch.zeros(1), "text", None, np.zeros(4, "c8"), object()],
    ids=repr,
)
def test_assignment_refuses_what_does_not_fit(value: Any) -> None:
    tensor = mt.loads(mt.dumps({"t": np.ones(4, "f4")}))["t"]
    with pytest.raises((TypeError, ValueError)):
        tensor[...] = value
    assert tensor.numpy().tolist() == [1] * 4
