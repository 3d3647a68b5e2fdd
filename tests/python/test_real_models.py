"""Published models are read, edited, saved and sharded exactly as the reference sees them."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import maptensors as mt
import maptensors.numpy
import maptensors.torch
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
from conftest import PUBLISHED
from support import Read, names_in, ours, reference, sha256, torch_bytes

Fetch = Callable[[str], Path]
MISALIGNED = "minilm-fp16-misaligned"
every_model = pytest.mark.parametrize("key", PUBLISHED)


@functools.lru_cache(maxsize=2)
def read_by_reference(path: Path) -> dict[str, Read]:
    return reference(path)


def reference_metadata(path: Path) -> dict[str, str] | None:
    with safetensors.safe_open(path, framework="np") as file:
        return file.metadata()


@every_model
@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_every_tensor_has_the_dtype_shape_and_bytes_the_reference_reads(
    fetch: Fetch, key: str, backend: str
) -> None:
    path = fetch(key)
    with mt.open(path, backend=backend) as model:
        assert ours(model) == read_by_reference(path)
        for tensor in model.values():
            assert tensor.numpy().tobytes() == tensor.tobytes()
            assert torch_bytes(tensor.torch()) == tensor.tobytes()
        assert (model.metadata if model.has_metadata else None) == reference_metadata(path)


@every_model
def test_numpy_load_file_gives_what_the_references_gives(fetch: Fetch, key: str) -> None:
    path = fetch(key)
    expected, found = safetensors.numpy.load_file(path), maptensors.numpy.load_file(path)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes(), name
        assert found[name].flags.aligned
        assert found[name].flags.writeable


@every_model
def test_torch_load_file_gives_what_the_references_gives(fetch: Fetch, key: str) -> None:
    path = fetch(key)
    expected, found = safetensors.torch.load_file(path), maptensors.torch.load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch_bytes(found[name]) == torch_bytes(tensor), name
        assert found[name].data_ptr() % found[name].element_size() == 0


@every_model
def test_a_saved_copy_is_the_same_model_aligned_and_deterministic(
    fetch: Fetch, key: str, tmp_path: Path
) -> None:
    path = fetch(key)
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    with mt.open(path) as model:
        mt.save(model, first)
        model.save(second, durable=False)
        assert mt.dumps(model) == first.read_bytes()
    assert sha256(first) == sha256(second)
    assert reference(first) == read_by_reference(path)
    assert reference_metadata(first) == reference_metadata(path)
    with mt.open(first) as saved:
        places = [saved.info(name) for name in saved]
    assert all(place.offset % 64 == 0 for place in places if place.nbytes % 64 == 0)
    aligned = sum(place.nbytes for place in places if place.offset % 64 == 0)
    # The format has no gaps: of tensors that all have odd sizes, hardly any can be aligned.
    if any(place.nbytes % 64 == 0 for place in places):
        assert aligned >= 0.99 * sum(place.nbytes for place in places)
    else:
        assert key in {"wldetect", "sd-keymap-ssd", "sd-keymap-sd1", "sd-keymap-vega"}


@every_model
def test_a_sharded_copy_is_the_same_model(fetch: Fetch, key: str, tmp_path: Path) -> None:
    path = fetch(key)
    with mt.open(path) as model:
        total = sum(tensor.nbytes for tensor in model.values())
        largest = max((tensor.nbytes for tensor in model.values()), default=0)
        limit = total // 3 + 1
        model.save(tmp_path / "model.safetensors", max_shard_size=limit)
    shards = [name for name in names_in(tmp_path) if name.endswith(".safetensors")]
    index = tmp_path / "model.safetensors.index.json"
    assert (len(shards) > 1) == (total > limit) == index.exists()
    for shard in shards:
        held = reference(tmp_path / shard)
        assert sum(len(read.data) for read in held.values()) <= max(limit, largest)
    for place in [tmp_path, *([index] if index.exists() else [])]:
        with mt.open(place) as model:
            assert ours(model) == read_by_reference(path)
            assert len(model.paths) == len(shards)
            assert model.metadata == (reference_metadata(path) or {})


@pytest.mark.parametrize("key", ["minilm", MISALIGNED, "sd-keymap-sd2"])
@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_a_sharded_set_derived_with_the_reference_writer_opens_as_one_model(
    fetch: Fetch, key: str, backend: str, tmp_path: Path
) -> None:
    arrays = safetensors.numpy.load_file(fetch(key))
    weight_map = {}
    for part in range(3):
        shard = f"model-{part + 1:05}-of-00003.safetensors"
        held = dict(list(arrays.items())[part::3])
        safetensors.numpy.save_file(held, tmp_path / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(held, shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    with mt.open(index, backend=backend) as model:
        assert ours(model) == read_by_reference(fetch(key))
        assert model.metadata == {"format": "pt"}
        for name, shard in weight_map.items():
            assert Path(model.info(name).path) == tmp_path / shard


def test_tensors_misaligned_in_their_file_are_aligned_private_copies(fetch: Fetch) -> None:
    path = fetch(MISALIGNED)
    expected = read_by_reference(path)
    with mt.open(path) as model:
        assert len(model) == 104
        for name, tensor in model.items():
            assert model.info(name).offset % 2 == 1
            assert tensor.mapped is False
            assert tensor.data_ptr() % {"F16": 2, "I64": 8}[tensor.dtype] == 0
            assert tensor.numpy().flags.aligned
            assert tensor.numpy().tobytes() == expected[name].data
        # The same copy every time.
        first, second = ({t.name: t.data_ptr() for t in model.values()} for _ in range(2))
        assert first == second


def test_edits_of_a_misaligned_tensor_are_seen_again_and_saved(fetch: Fetch, tmp_path: Path) -> None:
    path = fetch(MISALIGNED)
    before = sha256(path)
    expected = read_by_reference(path)
    with mt.open(path) as model:
        name = next(name for name in model if model[name].dtype == "F16" and model[name].ndim == 2)
        model[name].numpy()[0, :3] = [1.0, 2.0, 3.0]
        model[name].torch()[1, 0] = 4.0
        model[name][1, 1] = 5.0
        edited = model[name].numpy()
        assert edited[0, :3].tolist() == [1.0, 2.0, 3.0]
        assert edited[1, :2].tolist() == [4.0, 5.0]
        assert np.shares_memory(model.numpy()[name], edited)
        out = tmp_path / "edited.safetensors"
        model.save(out)
        after = edited.tobytes()
    saved = reference(out)
    assert saved[name].data == after != expected[name].data
    assert {n: r for n, r in saved.items() if n != name} == {n: r for n, r in expected.items() if n != name}
    assert sha256(path) == before


def test_a_published_file_opens_without_reading_its_data(fetch: Fetch) -> None:
    with mt.open(fetch("minilm")) as model:
        pages = model.residency()
        assert pages.touched == pages.private == 0 < pages.pages
        model["embeddings.LayerNorm.bias"].numpy().sum()
        assert 0 < model.residency().touched < pages.pages
