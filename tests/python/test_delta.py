"""What changed, checksums and deltas, as Python sees them."""

import itertools
import json
from pathlib import Path

import maptensors as mt
import numpy as np
import pytest
from maptensors import errors
from support import BITS, ROOT

DIGITS = ROOT / "models" / "digits.safetensors"


def contents(model: mt.Model) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in model.items()}


def misaligned(path: Path, values: np.ndarray) -> None:
    """Write a file whose only tensor starts at an odd offset: older writers made such."""
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": list(values.shape), "data_offsets": [0, values.nbytes]}}
    ).encode()
    header += b" " * ((7 - len(header)) % 8)
    assert (8 + len(header)) % 4
    path.write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())


def test_changes_are_exact_and_false_when_there_are_none(tmp_path):
    model = mt.open(DIGITS)
    assert not model.changed()
    bias, weight = model["fc1.bias"].numpy(), model["fc2.weight"].torch()
    bias[3] += 1
    weight[0, :2] = 7.0
    weight[1, 1] = weight[1, 1].clone()
    changed = model.changed()
    assert changed
    assert list(changed) == list(changed.keys()) == ["fc2.weight", "fc1.bias"] or set(changed) == {
        "fc2.weight",
        "fc1.bias",
    }
    assert changed["fc1.bias"] == mt.Change(elements=1, bytes=4, pages=1, nbytes=256)
    assert changed["fc2.weight"].elements == 2
    assert (changed.elements, changed.bytes) == (3, 12)
    assert changed.private_pages >= 1
    assert "fc1.weight" not in changed
    assert changed.get("fc1.weight") is None
    with pytest.raises(KeyError):
        changed["fc1.weight"]
    assert "3 elements" in repr(changed)
    model.mark()
    assert not model.changed()
    bias[3] -= 1
    assert list(model.changed()) == ["fc1.bias"]


def test_a_misaligned_tensors_copy_is_compared_and_marked(tmp_path):
    path = tmp_path / "odd.safetensors"
    misaligned(path, np.arange(3000, dtype="f4").reshape(30, 100))
    model = mt.open(path)
    array = model["w"].numpy()
    assert not model["w"].mapped
    assert not model.changed()
    array[5, 5] = -1
    array[29, 99] = -1
    assert model.changed()["w"] == mt.Change(elements=2, bytes=8, pages=2, nbytes=12000)
    mt.save_delta(model, tmp_path / "d")
    assert contents(mt.apply_delta(path, tmp_path / "d")) == contents(model)
    model.mark()
    assert not model.changed()
    array[5, 5] = 505
    assert model.changed()["w"].elements == 1


@pytest.mark.parametrize("how", ["pread", "bytes"])
def test_memory_of_its_own_says_that_it_cannot_tell(how):
    model = mt.open(DIGITS, backend="pread") if how == "pread" else mt.loads(DIGITS.read_bytes())
    with pytest.raises(errors.MapTensorsError, match="open it mapped"):
        model.changed()


def test_a_read_only_model_has_not_changed():
    assert not mt.open(DIGITS, mode="r").changed()


def test_checksums_are_written_verified_and_never_copied_stale(tmp_path):
    path = tmp_path / "m.safetensors"
    model = mt.open(DIGITS)
    mt.save(model, path, checksums=True)
    mt.verify(path)
    sums = json.loads(mt.open(path).metadata["maptensors.checksums"])
    assert set(sums) == set(model)
    assert all(len(text) == 32 for text in sums.values())
    assert contents(mt.open(path, verify="all")) == contents(model)
    # An edited model is saved with new ones; by every way of saving.
    edited = mt.open(path)
    edited["fc1.bias"].numpy()[0] = 5
    arrays = {name: array.T if array.ndim == 2 else array for name, array in edited.numpy().items()}
    ways = {
        "save": lambda out: edited.save(out),
        "unmapped": lambda out: edited.save(out, mapped=False),
        "arrays": lambda out: mt.save(edited.numpy(), out, metadata=edited.metadata),
        "strided": lambda out: mt.save(arrays, out, checksums=True),
        "bytes": lambda out: out.write_bytes(mt.dumps(edited)),
    }
    for way, save in ways.items():
        out = tmp_path / way
        save(out)
        mt.verify(out)
        assert json.loads(mt.open(out).metadata["maptensors.checksums"]).keys() == sums.keys(), way
    edited.save(tmp_path / "set.safetensors", max_shard_size=17_000)
    assert len(mt.open(tmp_path / "set.safetensors.index.json", verify="all").paths) == 2
    with mt.create(tmp_path / "draft", {"w": ("F32", (1000,))}, checksums=True) as draft:
        draft["w"][...] = 3
        held = draft["w"].numpy()
    held[:] = 4  # no longer reaches the file
    mt.verify(tmp_path / "draft")


def test_damage_is_named_and_a_file_without_checksums_is_an_error(tmp_path):
    path = tmp_path / "m.safetensors"
    mt.save(mt.open(DIGITS), path, checksums=True)
    raw = bytearray(path.read_bytes())
    info = mt.open(path).info("fc1.bias")
    raw[info.offset + 3] ^= 1
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(errors.ChecksumError, match="damaged") as caught:
        mt.verify(path)
    assert sorted(caught.value.tensors) == ["fc1.bias", "fc2.bias"]
    with pytest.raises(errors.ChecksumError):
        mt.open(path, verify="all")
    mt.open(path)
    for verify in (lambda: mt.verify(DIGITS), lambda: mt.open(DIGITS, verify="all")):
        with pytest.raises(errors.MapTensorsError, match="nothing to verify"):
            verify()
    with pytest.raises(ValueError, match="verify"):
        mt.open(DIGITS, verify="some")


@pytest.mark.parametrize("checksums", [False, True])
@pytest.mark.parametrize("dtype", BITS)
def test_a_chain_of_deltas_brings_back_every_bit(tmp_path, dtype, checksums):
    base = tmp_path / "base"
    rng = np.random.default_rng(len(dtype))
    count = 48_000 * 8 // BITS[dtype]
    with mt.create(base, {"w": (dtype, (count,)), "v": (dtype, (24,))}, checksums=checksums) as draft:
        for name in draft:
            raw = draft[name].view("U8").numpy()
            raw[...] = rng.integers(0, 2 if dtype == "BOOL" else 256, raw.shape, dtype="u1")
    model = mt.open(base)
    raw = model["w"].view("U8").numpy()
    deltas, states = [], [contents(model)]
    for step in range(3):
        places = rng.integers(0, raw.size, 1 + 300 * step)
        raw[places] ^= 1
        if step == 2:
            raw[5000:15_000] ^= 1
        deltas.append(tmp_path / f"d{step}")
        mt.save_delta(model, deltas[-1], durable=False)
        states.append(contents(model))
        model.mark()
    for n in range(1, 4):
        assert contents(mt.apply_delta(base, deltas[:n])) == states[n]
        assert contents(mt.apply_delta(base, deltas[:n], "r", backend="pread")) == states[n]
        mt.materialize(base, deltas[:n], tmp_path / "out", durable=False)
        out = mt.open(tmp_path / "out", verify="all" if checksums else "never")
        assert contents(out) == states[n]
    with pytest.raises(errors.BaseMismatchError):
        mt.apply_delta(base, deltas[1])
    with pytest.raises(errors.DeltaError):
        mt.apply_delta(base, base)
    # Two files, or models, compared.
    mt.save_diff(base, model, tmp_path / "both", metadata={"by": "test"})
    assert contents(mt.apply_delta(base, tmp_path / "both")) == states[3]
    found = mt.diff(base, tmp_path / "out")
    assert not found.equal
    assert list(found.changed) == ["w"]
    assert not mt.diff(model, tmp_path / "out").changed


def test_what_differs_is_told_in_every_respect(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    mt.save({"a": np.zeros(3), "b": np.zeros((2, 3), "f4"), "c": np.ones(2)}, one, metadata={"k": "1"})
    mt.save({"a": np.zeros(3), "b": np.zeros((3, 2), "f4"), "d": np.ones(2)}, two, metadata={"k": "2"})
    found = mt.diff(one, two)
    assert found._replace(changed=dict(found.changed)) == mt.Differences(
        equal=False,
        changed={},
        added=["d"],
        removed=["c"],
        reshaped={"b": (("F32", (2, 3)), ("F32", (3, 2)))},
        metadata=["k"],
        compared=1,
    )
    assert mt.diff(one, one).equal
    mt.save_diff(one, two, tmp_path / "d")
    mt.materialize(one, [tmp_path / "d"], tmp_path / "again")
    assert mt.diff(two, tmp_path / "again").equal
    assert mt.apply_delta(one, tmp_path / "d").metadata == {"k": "2"}


def test_an_applied_model_is_like_any_other(tmp_path):
    model = mt.open(DIGITS)
    model["fc1.weight"].torch().mul_(2)
    mt.save_delta(model, tmp_path / "d")
    applied = mt.apply_delta(DIGITS, tmp_path / "d")
    assert list(applied.changed()) == ["fc1.weight"]
    applied["fc1.bias"].numpy()[0] = 9
    assert sorted(applied.changed()) == ["fc1.bias", "fc1.weight"]
    assert mt.apply_delta(DIGITS, tmp_path / "d", mode="r")["fc1.bias"].readonly
    for argument, value in itertools.product(["mode", "backend"], ["w"]):
        with pytest.raises(ValueError, match=argument):
            mt.apply_delta(DIGITS, tmp_path / "d", **{argument: value})
