"""Headers edited without their data."""

import os
from pathlib import Path

import maptensors as mt
import maptensors.errors
import numpy as np
import pytest
from safetensors import safe_open

W = np.arange(600, dtype="f4").reshape(20, 30)
B = np.arange(3, dtype="f4")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    mt.save({"w": W, "b": B}, path, metadata={"format": "pt", "step": "1"})
    return path


def test_a_small_edit_is_in_place_and_the_data_stays(path: Path) -> None:
    inode = os.stat(path).st_ino
    assert mt.edit(path, metadata={"step": "200"}, remove=["format"], rename={"b": "c"}) == "in place"
    assert os.stat(path).st_ino == inode
    with safe_open(path, "numpy") as file:  # the reference
        assert file.metadata() == {"step": "200"}
        assert sorted(file.keys()) == ["c", "w"]
        np.testing.assert_array_equal(file.get_tensor("w"), W)
        np.testing.assert_array_equal(file.get_tensor("c"), B)
    assert mt.edit(path, metadata={"step": "200"}) == "unchanged"
    assert mt.edit(path) == "unchanged"


def test_a_file_that_is_mapped_is_replaced_and_the_mapping_sees_nothing(path: Path) -> None:
    with mt.open(path) as model:
        array = model["w"].numpy()
        assert mt.edit(path, metadata={"step": "2"}, durable=False) == "rewritten"
        assert model.metadata["step"] == "1"
        np.testing.assert_array_equal(array, W)
    del array
    with mt.open(path) as model:
        assert model.metadata == {"format": "pt", "step": "2"}


def test_what_cannot_be_is_an_error_and_changes_nothing(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(maptensors.errors.BY_KIND["Missing"], match="no tensor"):
        mt.edit(path, rename={"x": "y"})
    with pytest.raises(maptensors.errors.BY_KIND["Duplicate"], match="twice"):
        mt.edit(path, rename={"w": "b"})
    with pytest.raises(ValueError, match="no metadata key"):
        mt.edit(path, remove=["x"])
    with pytest.raises(ValueError, match="reserves"):
        mt.edit(path, rename={"w": "__metadata__"})
    with pytest.raises(ValueError, match="set and removed"):
        mt.edit(path, metadata={"step": "2"}, remove=["step"])
    with pytest.raises(TypeError, match="several keys"):
        mt.edit(path, remove="format")
    with pytest.raises(FileNotFoundError):
        mt.edit(path.parent / "gone", metadata={"a": "b"})
    assert path.read_bytes() == before
