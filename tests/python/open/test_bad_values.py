"""Bools that are neither 0 nor 1: one bad tensor is that tensor's error."""

from pathlib import Path

import maptensors as mt
import maptensors.torch
import numpy as np
import pytest
from support import entry, names_in, raw, reference

BAD = raw(
    {"bad": entry("BOOL", [2], 0, 2), "fine": entry("U8", [2], 2, 4), "worse": entry("BOOL", [1], 4, 5)},
    b"\1\2ab\xff",
)


def test_one_bad_bool_is_that_tensors_error_and_names_it(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BAD)
    model = mt.open(path)
    for load in (
        model.numpy,
        model.torch,
        model.jax,
        lambda: maptensors.torch.load_file(path),
        lambda: maptensors.torch.load(BAD),
    ):
        with pytest.raises(mt.errors.BitPatternError, match=r'"bad".* 1 more.*by name') as caught:
            load()
        assert caught.value.tensors == ["bad", "worse"]
    assert model["fine"].numpy().tolist() == [97, 98]
    with pytest.raises(mt.errors.BitPatternError) as alone:
        model["bad"].numpy()
    assert alone.value.tensors == ["bad"]
    assert model["bad"].view("U8").numpy().tolist() == [1, 2]


def test_a_state_with_a_bad_bool_says_how_the_rest_is_had(tmp_path: Path) -> None:
    with mt.Checkpointer(tmp_path, durable=False) as checkpoints:
        saved = Path(checkpoints.save({"m": np.array([True, False]), "w": np.arange(2.0)}, 1).path)
    data = bytearray(saved.read_bytes())
    data[data.rindex(b"\1\0")] = 7
    saved.write_bytes(data)
    checkpoints = mt.Checkpointer(tmp_path)
    with pytest.raises(mt.errors.BitPatternError, match=r'"m".*framework="maptensors"') as caught:
        checkpoints.load()
    assert caught.value.tensors == ["m"]
    state = checkpoints.load(framework="maptensors")
    assert state["w"].numpy().tolist() == [0, 1]
    assert state["m"].view("U8").numpy().tolist() == [7, 0]


def test_a_draft_with_a_bad_bool_is_not_committed(tmp_path: Path) -> None:
    draft = mt.create(tmp_path / "x", {"m": ("BOOL", (2,))})
    draft["m"].view("U8")[...] = [0, 2]
    with pytest.raises(mt.errors.BitPatternError, match='"m"'):
        draft.commit()
    draft["m"].view("U8")[...] = [0, 1]
    draft.commit()
    assert reference(tmp_path / "x")["m"].data == b"\0\1"
    with pytest.raises(mt.errors.BitPatternError), mt.create(tmp_path / "y", {"m": ("BOOL", (2,))}) as draft:
        draft["m"].view("U8")[...] = [0, 2]
    assert names_in(tmp_path) == ["x"]
