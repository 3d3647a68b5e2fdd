"""What can be handed to a save: it is refused by name, or read back bit for bit. There is no third thing."""

import contextlib
import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import maptensors as mt
import maptensors.flax
import maptensors.numpy
import maptensors.torch
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import BITS, NUMPY_NAMES, Read, ours, raw, reference
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.masked import MaskedTensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "layer.weight"
FINE = np.arange(3, dtype="f4")
FINE_TORCH = torch.from_numpy(FINE)


class Case(NamedTuple):
    """Something to be saved, and what it means; ``None``: it is to be refused."""

    value: Any
    meant: Read | None


# What has memory. Every tensor is laid out as unsigned integers, which say what its bits are.

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F4": torch.float4_e2m1fn_x2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
INTEGERS = {1: (torch.uint8, "u1"), 2: (torch.int16, "u2"), 4: (torch.int32, "u4"), 8: (torch.int64, "u8")}

TORCH_LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.mT,
    "sliced": lambda t: t[:, ::2, 1:],
    "a row": lambda t: t[1],
    "expanded": lambda t: t[:1, :1].expand(3, 4, 6),
    "overlapping": lambda t: t.as_strided((5, 4), (2, 1), 3),
    "one element many times": lambda t: t.as_strided((3, 4), (0, 0), 7),
    "zero-size": lambda t: t[:, :0],
    "zero-size strided": lambda t: t.mT[:, :, ::2][:0],
    "0-d": lambda t: t[1, 2, 3],
    "channels last": lambda t: t.reshape(1, 2, 4, 6).to(memory_format=torch.channels_last),
    "misaligned": lambda t: torch.frombuffer(
        bytearray(b"?" + t.numpy().tobytes()), dtype=t.dtype, offset=1
    ).view(t.shape),
    "misaligned and transposed": lambda t: TORCH_LAYOUTS["misaligned"](t).permute(2, 0, 1),
    "shared until written": lambda t: torch._lazy_clone(t.clone()),
}


class Subclass(torch.Tensor):
    """One that has memory."""


class Liar(torch.Tensor):
    """Answers wrongly to all that can be asked in Python."""

    shape = property(lambda self: torch.Size([1 << 20]))
    dtype = property(lambda self: torch.float64)
    layout = property(lambda self: torch.sparse_coo)
    device = property(lambda self: torch.device("meta"))
    is_meta = property(lambda self: True)
    nbytes = property(lambda self: 1 << 40)

    def data_ptr(self) -> int:
        return 8

    def stride(self, *_: Any) -> Any:
        return (1 << 40,)

    def size(self, *_: Any) -> Any:
        return self.shape

    def storage_offset(self) -> int:
        return 1 << 40

    def is_contiguous(self, *_: Any, **__: Any) -> bool:
        return True

    is_neg = is_conj = lambda self: False

    def untyped_storage(self) -> Any:
        return torch.UntypedStorage(1)

    def detach(self) -> Any:
        return torch.zeros(1)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.zeros(1)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.zeros(1)


TORCH_CLASSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda t: t,
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=t.is_floating_point() and t.itemsize > 1),
    "buffer": torch.nn.Buffer,
    "subclass": lambda t: t.as_subclass(Subclass),
    "liar": lambda t: torch.Tensor._make_subclass(Liar, t),
}


@st.composite
def torch_tensors(draw: st.DrawFn) -> Case:
    name = draw(st.sampled_from(list(TORCH_DTYPES)))
    dtype = TORCH_DTYPES[name]
    layout = draw(st.sampled_from(list(TORCH_LAYOUTS)))
    data = draw(st.binary(min_size=48 * dtype.itemsize, max_size=48 * dtype.itemsize))
    if name == "BOOL":
        data = bytes(byte & 1 for byte in data)
    integer = torch.frombuffer(bytearray(data), dtype=INTEGERS[dtype.itemsize][0]).reshape(2, 4, 6)
    laid = TORCH_LAYOUTS[layout](integer)
    value = TORCH_CLASSES[draw(st.sampled_from(list(TORCH_CLASSES)))](laid.view(dtype))
    shape = tuple(laid.shape)
    if name == "F4":
        if not shape:
            return Case(value, None)
        shape = (*shape[:-1], shape[-1] * 2)
    return Case(value, Read(name, shape, laid.contiguous().numpy().tobytes()))


@st.composite
def lazy_torch_tensors(draw: st.DrawFn) -> Case:
    """Conjugated and negated when they are read."""
    floats = st.floats(-1e6, 1e6, width=32)
    base = torch.tensor(draw(st.lists(floats, min_size=12, max_size=12))).view(2, 6)
    made = torch.complex(base, base.flip(0))
    make: Callable[[torch.Tensor], torch.Tensor] = draw(
        st.sampled_from(
            [lambda t: t.conj(), lambda t: t.mH, lambda t: t.conj().imag, lambda t: t.mH.imag[::2]]
        )
    )
    value = make(made)
    meant = value.clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
    if draw(st.booleans()):
        value = value.as_subclass(Subclass)
    name = "C64" if meant.is_complex() else "F32"
    return Case(value, Read(name, tuple(meant.shape), meant.numpy().tobytes()))


NUMPY_LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "contiguous": lambda a: a,
    "transposed": lambda a: a.swapaxes(0, 2),
    "Fortran": lambda a: np.asfortranarray(a),
    "sliced": lambda a: a[:, ::2, 1:],
    "backwards": lambda a: a[::-1, ::-2],
    "expanded": lambda a: np.broadcast_to(a[:1, :1], (3, 4, 6)),
    "overlapping": lambda a: np.lib.stride_tricks.sliding_window_view(a.reshape(-1), 5),
    "one element many times": lambda a: np.broadcast_to(a[1, 1, 1], (3, 4)),
    "zero-size": lambda a: a[:, :0],
    "0-d": lambda a: a[1, 2, 3:4].reshape(()),
    "misaligned": lambda a: np.frombuffer(b"?" + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
    "misaligned and backwards": lambda a: NUMPY_LAYOUTS["misaligned"](a)[:, ::-1],
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
}


class Array(np.ndarray):
    """A subclass."""


class LyingArray(np.ndarray):
    """Answers wrongly to all that can be asked in Python."""

    shape = property(lambda self: (1 << 30,))  # type: ignore[assignment]
    dtype = property(lambda self: np.dtype("f8"))  # type: ignore[assignment]
    strides = property(lambda self: (8,))  # type: ignore[assignment]
    nbytes = size = itemsize = property(lambda self: 1 << 40)
    flags = property(lambda self: {"C_CONTIGUOUS": True})
    __array_interface__ = property(
        lambda self: {"version": 3, "shape": (1 << 20,), "typestr": "<f8", "data": (4096, False)}
    )
    __array_struct__ = property(lambda self: None)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return np.zeros(1)

    def tobytes(self, *_: Any) -> bytes:
        return b""


class Offers:
    """Has ``__array__``."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return self.array


class OffersAndLies(Offers):
    """Has ``__array__``, which is believed, and more, which is not asked."""

    __array_interface__ = LyingArray.__array_interface__
    shape, dtype, nbytes = (1 << 40,), np.dtype("f8"), 1 << 50

    @property
    def __class__(self) -> type:
        return torch.Tensor


NUMPY_CLASSES: dict[str, Callable[[np.ndarray], Any]] = {
    "plain": lambda a: a,
    "subclass": lambda a: a.view(Array),
    "liar": lambda a: a.view(LyingArray),
    "object": Offers,
    "object that offers a subclass": lambda a: Offers(a.view(Array)),
    "lying object": OffersAndLies,
}


@st.composite
def numpy_arrays(draw: st.DrawFn) -> Case:
    name = draw(st.sampled_from([name for name in NUMPY_NAMES if name != "F4"]))
    dtype = np.dtype(getattr(ml_dtypes, NUMPY_NAMES[name], NUMPY_NAMES[name]))
    data = draw(st.binary(min_size=48 * dtype.itemsize, max_size=48 * dtype.itemsize))
    if name == "BOOL":
        data = bytes(byte & 1 for byte in data)
    layout = NUMPY_LAYOUTS[draw(st.sampled_from(list(NUMPY_LAYOUTS)))]
    # As bytes that are not looked into: no operation on the way makes a signalling NaN a quiet one.
    laid = layout(np.frombuffer(bytearray(data), f"V{dtype.itemsize}").reshape(2, 4, 6))
    meant = laid.tobytes()
    value = np.lib.stride_tricks.as_strided(laid, laid.shape, laid.strides).view(dtype)
    if dtype.isbuiltin == 1 and draw(st.booleans()):
        value = value.astype(dtype.newbyteorder(">")) if name != "C64" else value
        meant = value.astype(dtype).tobytes()
        if name[0] == "F":
            # Converting may quiet a NaN: what was made is what is meant.
            meant = value.byteswap().tobytes()
    made = NUMPY_CLASSES[draw(st.sampled_from(list(NUMPY_CLASSES)))](value)
    return Case(made, Read(name, laid.shape, meant))


@st.composite
def numpy_scalars(draw: st.DrawFn) -> Case:
    value = draw(st.sampled_from([np.float32(1.5), np.int8(-3), np.bool_(True), np.complex64(1 - 2j)]))
    [name] = [n for n, numpy_name in NUMPY_NAMES.items() if numpy_name == value.dtype.name]
    return Case(value, Read(name, (), value.tobytes()))


@st.composite
def jax_arrays(draw: st.DrawFn) -> Case:
    name = draw(st.sampled_from([name for name in NUMPY_NAMES if BITS[name] in (8, 16, 32)]))
    dtype = np.dtype(getattr(ml_dtypes, NUMPY_NAMES[name], NUMPY_NAMES[name]))
    numbers = np.arange(12).reshape(3, 4) % 2 if name == "BOOL" else np.arange(12).reshape(3, 4)
    array = numbers.astype(dtype)
    value = jnp.asarray(array)
    make: Any = draw(st.sampled_from([lambda a: a, lambda a: a.T, lambda a: a[:, ::2], lambda a: a[1, 1]]))
    return Case(make(value), Read(name, make(array).shape, np.ascontiguousarray(make(array)).tobytes()))


@st.composite
def our_tensors(draw: st.DrawFn) -> Case:
    name = draw(st.sampled_from([name for name in BITS if BITS[name] >= 8]))
    size = BITS[name] // 8
    data = draw(st.binary(min_size=12 * size, max_size=12 * size))
    if name == "BOOL":
        data = bytes(byte & 1 for byte in data)
    rows = np.frombuffer(data, f"V{size}").reshape(3, 4)
    header = {"t": {"dtype": name, "shape": [3, 4], "data_offsets": [0, len(data)]}}
    value = mt.loads(raw(header, data))["t"]
    key: Any = draw(st.sampled_from([..., 1, (1, 2), slice(None, None, -1), (..., slice(1, 3))]))
    return Case(value[key], Read(name, rows[key].shape, rows[key].tobytes()))


# What is to be refused.


def caught(transform: Callable[[Any], Any]) -> torch.Tensor:
    """What a transform of torch.func sees, also after it is over."""
    seen: list[torch.Tensor] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x.sum()

    transform(look)(torch.arange(6.0).reshape(2, 3))
    return seen[0]


def resized(size: int, *, strided: bool = False) -> torch.Tensor:
    tensor = torch.arange(1000.0).reshape(20, 50)
    tensor = tensor.T if strided else tensor
    tensor.untyped_storage().resize_(size)
    return tensor


def jax_tracer() -> Any:
    seen: list[Any] = []
    jax.jit(lambda x: (seen.append(x), x)[1])(jnp.zeros(3))
    return seen[0]


def deleted() -> Any:
    array = jnp.arange(3)
    array.delete()
    return array


class Raises:
    """Has a protocol that raises."""

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise ZeroDivisionError("no array today")


class Wrong:
    """Has a protocol that gives something else."""

    def __array__(self, *_: Any, **__: Any) -> Any:
        return [1, 2]


M = torch.arange(6.0).reshape(2, 3)
REFUSED: dict[str, Callable[[], Any]] = {
    "wrapper": lambda: TwoTensor(M, M),
    "strided wrapper": lambda: TwoTensor(M, M).t(),
    "empty wrapper": lambda: TwoTensor(M[:0], M[:0]),
    "masked tensor": lambda: MaskedTensor(M, M > 2),
    "strided masked tensor": lambda: MaskedTensor(M, M > 2).t(),
    "fake": lambda: FakeTensorMode().from_tensor(M),
    "strided fake": lambda: FakeTensorMode().from_tensor(M.t()),
    "meta": lambda: M.to("meta"),
    "strided meta": lambda: M.to("meta").t(),
    "empty meta": lambda: M[:0].to("meta"),
    "sparse": M.to_sparse,
    "sparse rows": M.to_sparse_csr,
    "mkldnn": M.to_mkldnn,
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
    "quantized": lambda: torch.quantize_per_tensor(M, 0.1, 0, torch.qint8),
    "quantized and strided": lambda: torch.quantize_per_tensor(M, 0.1, 0, torch.quint8).t(),
    "zeros without memory": lambda: torch._efficientzerotensor(2, 3),
    "functional": lambda: torch._to_functional_tensor(M),
    "batched": lambda: caught(torch.func.vmap),
    "tracked": lambda: caught(torch.func.grad),
    "not initialized": lambda: torch.nn.LazyLinear(3).weight,
    "freed": lambda: resized(0),
    "shrunk": lambda: resized(16),
    "shrunk and strided": lambda: resized(3999, strided=True),
    "complex32": lambda: M.to(torch.complex32),
    "complex128": lambda: M.to(torch.complex128),
    **{
        f"torch {name}": lambda name=name: torch.zeros(4, dtype=torch.uint8).view(getattr(torch, name))
        for name in [*(f"{u}int{n}" for u in ("", "u") for n in range(1, 8)), "bits8", "bits4x2", "bits1x8"]
    },
    "4-bit scalar": lambda: torch.zeros((), dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "objects": lambda: np.array([None]),
    "text": lambda: np.array(["a"]),
    "text of any length": lambda: np.array(["a"], dtype=np.dtypes.StringDType()),
    "bytes": lambda: np.array([b"ab"]),
    "dates": lambda: np.array(["2026-01-01"], "M8[D]"),
    "times": lambda: np.array([1], "m8[s]"),
    "records": lambda: np.zeros(2, [("a", "f4")]),
    "raw": lambda: np.zeros(2, "V4"),
    "longdouble": lambda: np.zeros(2, "g"),
    "double complex": lambda: np.zeros(2, "c16"),
    "int4": lambda: np.zeros(4, ml_dtypes.int4),
    "uint2": lambda: np.zeros(4, ml_dtypes.uint2),
    "float6": lambda: np.zeros(4, ml_dtypes.float6_e2m3fn),
    "e3m4": lambda: np.zeros(4, ml_dtypes.float8_e3m4),
    "odd 4-bit floats": lambda: np.zeros(3, ml_dtypes.float4_e2m1fn),
    "masked array": lambda: np.ma.MaskedArray([1.0, 2.0], mask=[True, False]),
    "jax int4": lambda: jnp.zeros(4, jnp.int4),
    "jax key": lambda: jax.random.key(0),
    "jax tracer": jax_tracer,
    "jax deleted": deleted,
    "raises": Raises,
    "no array": Wrong,
    "number": lambda: 1.5,
    "list": lambda: [1.0, 2.0],
    "none": lambda: None,
    "buffer": lambda: memoryview(b"abcd"),
    "a bool of 2": lambda: torch.tensor([0, 2], dtype=torch.uint8).view(torch.bool),
    "a bool of 2, strided": lambda: torch.tensor([[0, 2], [1, 1]], dtype=torch.uint8).view(torch.bool).t(),
    "a numpy bool of 3": lambda: np.array([0, 3], "u1").view("?"),
    "a numpy bool of 3, backwards": lambda: np.array([0, 3], "u1").view("?")[::-1],
    "a bool of 255": lambda: mt.loads(mt.dumps({"t": np.array([255], "u1")}))["t"].view("BOOL"),
}


@st.composite
def refused(draw: st.DrawFn) -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Case(REFUSED[draw(st.sampled_from(list(REFUSED)))](), None)


# What may be going on meanwhile.


class Zeros(TorchDispatchMode):
    """Answers every operation with zeros."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.zeros(())


class Nonsense(TorchFunctionMode):
    """Answers every function with a number."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 7


@contextlib.contextmanager
def level(name: str, *args: Any) -> Iterator[None]:
    """Inside of a transform of torch.func."""
    getattr(torch._C._functorch, f"_{name}_increment_nesting")(*args)
    try:
        yield
    finally:
        getattr(torch._C._functorch, f"_{name}_decrement_nesting")()


@contextlib.contextmanager
def defaults() -> Iterator[None]:
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


MODES: dict[str, Callable[[], Any]] = {
    "none": contextlib.nullcontext,
    "fake": FakeTensorMode,
    "fake, but not strictly": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "zeros": Zeros,
    "nonsense": Nonsense,
    "functional": FunctionalTensorMode,
    "python dispatcher": enable_python_dispatcher,
    "vmap": lambda: level("vmap", 2, "error"),
    "grad": lambda: level("grad"),
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu"),
    "on meta": lambda: torch.device("meta"),
    "other defaults": defaults,
}


# The ways in, each of which gives what can be read of what it wrote.


def by_save(tensors: dict[str, Any], directory: Path) -> list[Path | bytes]:
    mt.save(tensors, directory / "out.safetensors")
    return [directory / "out.safetensors"]


def by_shards(tensors: dict[str, Any], directory: Path) -> list[Path | bytes]:
    mt.save(tensors, directory / "out.safetensors", max_shard_size=1)
    return sorted(directory.glob("*.safetensors"))


def by_bytes(tensors: dict[str, Any], directory: Path) -> list[Path | bytes]:
    return [mt.dumps(tensors)]


def by_save_file(tensors: dict[str, Any], directory: Path) -> list[Path | bytes]:
    path = directory / "out.safetensors"
    if isinstance(tensors[NAME], torch.Tensor):
        maptensors.torch.save_file(tensors | {"fine": FINE_TORCH}, path)
    elif isinstance(tensors[NAME], jax.Array):
        maptensors.flax.save_file(tensors, path)
    else:
        maptensors.numpy.save_file(tensors, path)
    return [path]


def by_checkpoint(tensors: dict[str, Any], directory: Path) -> list[Path | bytes]:
    with mt.Checkpointer(directory, durable=False, prepare=False) as checkpoints:
        return [Path(checkpoints.save_async(tensors, 1).wait().path)]


def by_publishing(tensors: dict[str, Any], directory: Path) -> list[Path | bytes]:
    with mt.publish(directory / "published", tensors), mt.attach(directory / "published") as attached:
        return [Path(path) for path in attached.model.paths]


def by_draft(tensors: dict[str, Any], directory: Path) -> list[Path | bytes]:
    with mt.create(directory / "out.safetensors", tensors, durable=False) as draft:
        draft.fill(tensors)
    return [directory / "out.safetensors"]


WAYS = [by_save, by_shards, by_bytes, by_save_file, by_checkpoint, by_publishing, by_draft]

CASES = st.one_of(
    torch_tensors(),
    lazy_torch_tensors(),
    numpy_arrays(),
    numpy_scalars(),
    jax_arrays(),
    our_tensors(),
    refused(),
)

# torch.func and jax keep what a transform saw, and warn of it.
QUIET = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")


def is_refused_or_read_back(way: Callable[..., list[Path | bytes]], case: Case, mode: str) -> None:
    tensors = {NAME: case.value, "fine": FINE}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as directory:
        error: Exception | None = None
        try:
            with MODES[mode]():
                written = way(tensors, Path(directory))
        except (mt.MapTensorsError, TypeError, ValueError) as raised:
            error = raised
        if error is not None:
            # What safetensors' own functions raise is ValueError; a state says where what is no tensor is.
            assert isinstance(error, mt.MapTensorsError) or way in (
                by_save_file,
                by_checkpoint,
                by_publishing,
            )
            assert NAME in str(error), error
            strided = way is by_save_file and "contiguous" in str(error)
            # A state is of arrays, not of whatever could give one.
            no_state = way in (by_checkpoint, by_publishing) and type(case.value) in (Offers, OffersAndLies)
            assert case.meant is None or strided or no_state, error
            return
        if way in (by_checkpoint, by_publishing) and not is_array(case.value):
            return
        assert case.meant is not None, f"{case.value!r:.100} was saved"
        ours_, theirs = {}, {}
        for source in written:
            ours_ |= ours(mt.loads(source) if isinstance(source, bytes) else mt.open(source))
            theirs |= reference(source)
        assert ours_[NAME] == theirs[NAME] == case.meant
        assert theirs["fine"] == Read("F32", (3,), FINE.tobytes())


def is_array(value: Any) -> bool:
    """Whether a state takes it for an array: numbers, lists and None it holds as what they are."""
    return not (value is None or isinstance(value, float | list))


@QUIET
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(case=CASES, mode=st.sampled_from(list(MODES)))
def test_what_is_handed_to_a_save_is_refused_by_name_or_read_back_bit_for_bit(
    way: Callable[..., list[Path | bytes]], case: Case, mode: str
) -> None:
    is_refused_or_read_back(way, case, mode)


@QUIET
@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_values_of_its_own_is_refused_by_name_by_every_way(what: str) -> None:
    for way, mode in itertools.product(WAYS, ("none", "fake, but not strictly")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case = Case(REFUSED[what](), None)
        is_refused_or_read_back(way, case, mode)


@QUIET
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strided", [False, True])
def test_no_mode_stands_between_a_tensor_and_its_bytes(mode: str, strided: bool) -> None:
    integer = torch.arange(48, dtype=torch.int32).reshape(2, 4, 6)
    laid = integer.mT if strided else integer
    for make in TORCH_CLASSES.values():
        meant = Read("F32", tuple(laid.shape), laid.contiguous().numpy().tobytes())
        for way in WAYS:
            is_refused_or_read_back(way, Case(make(laid.view(torch.float32)), meant), mode)
