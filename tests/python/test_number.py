"""A tensor as a number, in comparisons and in iteration: as numpy's arrays, never as text or by identity."""

import math
import operator
from collections.abc import Callable
from typing import Any

import maptensors as mt
import ml_dtypes
import numpy as np
import pytest
from support import BITS, NUMPY_NAMES, entry, raw


def tensor(array: Any) -> mt.Tensor:
    return mt.loads(mt.dumps({"t": np.asarray(array)}))["t"]


def test_numbers_are_values_and_not_bytes_read_as_text() -> None:
    assert int(tensor(np.uint8(55))) == 55  # b"7"
    assert float(tensor(np.int32(875770417))) == 875770417.0  # b"1234"
    assert bool(tensor(np.zeros(1, "u1"))) is False
    assert bool(tensor(np.ones((1, 1), "f4"))) is True
    assert complex(tensor(np.complex64(1 - 2j))) == 1 - 2j
    assert operator.index(tensor(np.int8(-3))) == -3
    assert [10, 20, 30][tensor(np.uint16(1))] == 20
    assert math.floor(tensor(np.float32(2.5))) == 2
    assert f"{tensor(np.float32(2.5)):.2f}" == "2.50"
    assert f"{tensor(np.zeros(3))}".startswith("Tensor(")


@pytest.mark.parametrize("name", [name for name in NUMPY_NAMES if BITS[name] >= 8])
def test_every_bit_pattern_is_the_number_that_numpy_reads(name: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, NUMPY_NAMES[name], NUMPY_NAMES[name]))
    count = {1: 256, 2: 65536}.get(dtype.itemsize, 0)
    if count:
        array = np.arange(count, dtype=f"u{dtype.itemsize}").view(dtype)[:: max(1, count // 1024)]
        array = array[:2] if name == "BOOL" else array
    else:
        array = np.frombuffer(np.random.default_rng(0).bytes(64 * dtype.itemsize), dtype)
    kind = complex if name == "C64" else float
    for element, found in zip(array, tensor(array), strict=True):
        with np.errstate(all="ignore"):
            expected = kind(element)
        assert np.array_equal(kind(found), expected, equal_nan=True), element.tobytes()
        if name != "C64" and math.isfinite(expected):
            # The int() of ml_dtypes wraps at 2**63.
            assert int(found) == int(element if dtype.kind in "iu" else expected)
            assert bool(found) is (expected != 0)


@pytest.mark.parametrize(
    "how", [int, float, complex, operator.index, round, lambda t: f"{t:.2f}", math.trunc], ids=str
)
@pytest.mark.parametrize(
    "array", [np.zeros(2), np.zeros(0), np.zeros((2, 3), "i1")], ids=lambda a: str(a.shape)
)
def test_more_or_less_than_one_element_is_no_number(how: Callable[[Any], Any], array: np.ndarray) -> None:
    with pytest.raises(TypeError):
        how(tensor(array))


@pytest.mark.parametrize(
    "array", [np.float32(1), np.ones(1, "i4"), np.bool_(True), np.complex64(1)], ids=repr
)
def test_only_scalars_of_integers_are_indices(array: Any) -> None:
    with pytest.raises(TypeError, match='"t"'):
        operator.index(tensor(array))
    with pytest.raises(TypeError):
        int(tensor(np.complex64(1j)))


@pytest.mark.parametrize("array", [np.zeros(2), np.ones(0)], ids=["two", "none"])
def test_the_truth_of_several_elements_is_ambiguous(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r'"t".*ambiguous'):
        bool(tensor(array))


def test_a_bool_of_2_is_no_number() -> None:
    bad = mt.loads(raw({"t": entry("BOOL", [1], 0, 1)}, b"\2"))["t"]
    for how in (bool, int, float):
        with pytest.raises(mt.errors.BitPatternError):
            how(bad)


def test_packed_elements_are_no_numbers() -> None:
    packed = mt.loads(raw({"t": entry("F4", [2], 0, 1), "u": entry("F6_E2M3", [4], 1, 4)}, b"abcd"))
    for one in packed.values():
        with pytest.raises(TypeError):
            float(one)


@pytest.mark.parametrize(
    "how", [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]
)
def test_comparisons_are_numpys_element_by_element(how: Callable[[Any, Any], Any]) -> None:
    array = np.array([[1, 55], [3, 55]], "i2")
    ours = tensor(array)
    for other in (55, array, array.T, tensor(array.T), np.float64(2.5)):
        plain = other.numpy() if isinstance(other, mt.Tensor) else other
        assert how(ours, other).tolist() == how(array, plain).tolist()
        assert how(other, ours).tolist() == how(plain, array).tolist()
    assert (tensor(np.uint8(55)) == 55).item() is True
    assert (ours == None).tolist() == [[False] * 2] * 2  # noqa: E711


def test_a_tensor_is_not_hashed_by_identity_and_compared_by_value() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(tensor(np.zeros(1)))


def test_what_is_in_a_tensor_and_what_it_iterates_over_is_as_in_numpy() -> None:
    array = np.arange(6, dtype="f4").reshape(3, 2)
    ours = tensor(array)
    assert [row.numpy().tolist() for row in ours] == array.tolist()
    assert (5 in ours, 7 in ours, np.float32(0) in ours) == (True, False, True)
    assert [float(x) for x in ours[:, 1]] == [1, 3, 5]
    scalar = tensor(np.float32(1))
    for how in (iter, len, list):
        with pytest.raises(TypeError):
            how(scalar)
    assert 1 in scalar


def test_numbers_are_read_through_slices_of_any_step() -> None:
    ours = tensor(np.arange(24, dtype="i4").reshape(4, 6))
    assert int(ours[::-1][0, ::-2][0]) == 23
    assert int(ours[-1:, 2:3]) == 20


def test_copies_that_were_wrong_are_right() -> None:
    array = np.arange(3, dtype="u1")
    assert bytes(tensor(array)) == bytearray(tensor(array)) == b"\0\1\2"
    assert bytes(tensor(np.uint8(3))) == b"\3"
