"""What is assigned fits, or is refused: nothing wraps or loses its imaginary part without a word."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import maptensors as mt
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import NUMPY_NAMES, names_in
from torch.testing._internal.two_tensor import TwoTensor

INTEGERS = ["I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"]


def zeros(dtype: str, *shape: int) -> mt.Tensor:
    name = NUMPY_NAMES[dtype]
    return mt.loads(mt.dumps({"t": np.zeros(shape, getattr(ml_dtypes, name, name))}))["t"]


@pytest.mark.parametrize(
    ("dtype", "value", "error"),
    [
        ("I8", [300, 1], OverflowError),
        ("I8", 300, OverflowError),
        ("I8", -129, OverflowError),
        ("U8", -1, OverflowError),
        ("U8", [0, -1], OverflowError),
        ("U64", -1, OverflowError),
        ("U64", 2**64, OverflowError),
        ("I64", 2**63, OverflowError),
        ("I64", [2**63, -1], OverflowError),
        ("I8", [np.int64(300), 0], OverflowError),
        ("I8", np.int64(300), OverflowError),
        ("I8", np.array([300, 1]), OverflowError),
        ("I8", np.array([200, 1], "u1"), OverflowError),
        ("U32", np.array([2**32, 1], "u8"), OverflowError),
        ("I8", torch.tensor([300, 1]), OverflowError),
        ("I8", torch.tensor([200, 1], dtype=torch.uint8), OverflowError),
        ("I64", torch.tensor([2**63, 1], dtype=torch.uint64), OverflowError),
        ("I8", torch.tensor(128), OverflowError),
        ("I8", jnp.array([300, 1]), OverflowError),
        ("I8", [1e10, 0], OverflowError),
        ("I8", 128.0, OverflowError),
        ("I32", float("inf"), OverflowError),
        ("I32", float("nan"), ValueError),
        ("I32", [float("nan"), 0], ValueError),
        ("I8", 1.5, ValueError),
        ("BOOL", 2, OverflowError),
        ("BOOL", 0.5, ValueError),
        ("BOOL", -1, OverflowError),
        ("F32", 1 + 2j, TypeError),
        ("F32", [1j, 0], TypeError),
        ("F32", np.complex64(1), TypeError),
        ("F32", np.zeros(2, "c8"), TypeError),
        ("F32", torch.zeros(2, dtype=torch.complex64), TypeError),
        ("BF16", 1j, TypeError),
        ("I32", np.zeros(2), TypeError),
        ("I32", np.float32(1), TypeError),
        ("I32", torch.zeros(2), TypeError),
        ("I32", jnp.zeros(2), TypeError),
        ("I32", np.zeros(2, ml_dtypes.bfloat16), TypeError),
        ("BOOL", np.zeros(2, "i4"), TypeError),
        ("BOOL", torch.zeros(2, dtype=torch.int32), TypeError),
        ("U8", np.zeros(2, "i1"), TypeError),
        ("I8", "5", TypeError),
        ("I8", ["5", "6"], TypeError),
        ("F32", None, TypeError),
        ("F32", [None, 1], TypeError),
        ("F32", np.array(["2026-01-01"], "M8[D]"), TypeError),
        ("F32", b"5", TypeError),
        ("F32", [[1, 2], [3]], ValueError),
        ("F32", [1, 2, 3], ValueError),
        ("F32", TwoTensor(torch.zeros(2), torch.zeros(2)), ValueError),
        ("F32", torch.zeros(2, device="meta"), ValueError),
        ("F32", torch.zeros(2).to_sparse(), ValueError),
        ("I8", torch.zeros(2, dtype=torch.uint8).view(torch.int4), TypeError),
        ("BOOL", torch.tensor([0, 2], dtype=torch.uint8).view(torch.bool), ValueError),
        ("BOOL", np.array([0, 2], "u1").view("?"), ValueError),
        ("F32", np.ma.MaskedArray([1.0, 2.0], mask=[True, False]), ValueError),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(
    dtype: str, value: Any, error: type[Exception], tmp_path: Path
) -> None:
    ours = zeros(dtype, 2)
    with pytest.raises(error, match='"t"'):
        ours[...] = value
    assert not any(ours.tobytes())
    with pytest.raises(error, match='"t"'), mt.create(tmp_path / "out", {"t": (dtype, (2,))}) as draft:
        draft["t"] = value
    with pytest.raises(error, match='"t"'), mt.create(tmp_path / "out", {"t": (dtype, (2,))}) as draft:
        draft.fill({"t": value})
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        ("I8", [127, -128], [127, -128]),
        ("U64", [2**64 - 1, 0], [2**64 - 1, 0]),
        ("U64", [2**63, 1], [2**63, 1]),
        ("I8", 3.0, [3, 3]),
        ("I8", True, [1, 1]),
        ("BOOL", [1, 0], [True, False]),
        ("F32", 10**30, [np.float32(1e30)] * 2),
        ("F32", [1, 2.5], [1, 2.5]),
        ("C64", 1 + 2j, [1 + 2j] * 2),
        ("BF16", [1, 2.5], [1, 2.5]),
        ("I8", np.array([127, -128], "i8"), [127, -128]),
        ("U8", np.array([255, 0], "u8"), [255, 0]),
        ("F32", np.array([1, 2], "i4"), [1, 2]),
        ("I16", torch.tensor([300, -300]), [300, -300]),
        ("I8", torch.tensor([127, 1], dtype=torch.uint8), [127, 1]),
        ("U64", torch.tensor([2**64 - 1, 1], dtype=torch.uint64), [2**64 - 1, 1]),
        ("F16", torch.tensor([1.0, 2.5]), [1, 2.5]),
        ("F32", torch.tensor(True), [1, 1]),
        ("I16", jnp.array([300, -300]), [300, -300]),
        ("F32", torch.tensor([1.0, 2.0]).as_subclass(type("Sub", (torch.Tensor,), {})), [1, 2]),
        ("F32", (x for x in []), None),
    ],
)
def test_what_fits_is_assigned(dtype: str, value: Any, expected: Any) -> None:
    ours = zeros(dtype, 2)
    if expected is None:
        with pytest.raises(TypeError):
            ours[...] = value
        return
    ours[...] = value
    assert ours.numpy().tolist() == expected
    ours[...] = ours
    ours[::-1][...] = ours
    assert ours.numpy().tolist() in (expected, expected[::-1])


@given(
    st.sampled_from(INTEGERS),
    st.lists(st.integers(-(2**65), 2**65) | st.integers(-300, 300), min_size=1, max_size=4),
)
def test_integers_are_assigned_as_they_are_or_not_at_all(dtype: str, values: list[int]) -> None:
    ours, info = zeros(dtype, len(values)), np.iinfo(NUMPY_NAMES[dtype])
    if all(info.min <= value <= info.max for value in values):
        ours[...] = values
        assert ours.numpy().tolist() == values
    else:
        with pytest.raises(OverflowError):
            ours[...] = values
        assert not any(ours.tobytes())


@given(
    st.sampled_from(INTEGERS),
    st.sampled_from(INTEGERS),
    st.lists(st.integers(0, 2**64 - 1), max_size=4),
    st.booleans(),
)
def test_typed_integers_are_assigned_as_they_are_or_not_at_all(
    to: str, source: str, bits: list[int], by_torch: bool
) -> None:
    array = np.array(bits, "u8").astype(NUMPY_NAMES[source])
    value: Any = torch.from_numpy(array) if by_torch else array
    ours, info = zeros(to, len(bits)), np.iinfo(NUMPY_NAMES[to])
    try:
        ours[...] = value
    except OverflowError:
        assert any(not info.min <= int(x) <= info.max for x in array)
        assert not any(ours.tobytes())
    except TypeError:
        assert not np.can_cast(array.dtype, NUMPY_NAMES[to], "same_kind")
    else:
        assert ours.numpy().tolist() == array.tolist()


@pytest.mark.parametrize(
    "make", [np.asarray, torch.as_tensor, lambda a: a.tolist()], ids=["numpy", "torch", "list"]
)
def test_a_value_is_assigned_in_any_layout(make: Callable[[Any], Any]) -> None:
    array = np.arange(6, dtype="i4").reshape(2, 3)
    ours = zeros("I32", 3, 2)
    value = make(array)
    ours[...] = value.T if hasattr(value, "T") else array.T.tolist()
    assert ours.numpy().tolist() == array.T.tolist()


def test_packed_elements_are_assigned_as_they_are() -> None:
    ours = mt.loads(mt.dumps({"t": np.zeros((2, 4), ml_dtypes.float4_e2m1fn)}))["t"]
    value = np.arange(8).reshape(2, 4).astype(ml_dtypes.float4_e2m1fn)
    ours[...] = value
    assert ours.numpy().tobytes() == value.tobytes()
    ours[...] = torch.full((2, 2), 0x21, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    assert ours.tobytes() == b"\x21" * 4
    for bad in (1, [[0] * 4] * 2, np.zeros((2, 4), "f4"), value[:1], torch.zeros(2, 4)):
        with pytest.raises((TypeError, ValueError), match='"t"'):
            ours[...] = bad
