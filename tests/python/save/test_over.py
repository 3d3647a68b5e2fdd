"""What can be written over what: refused, and nothing has happened; or done, and right."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import maptensors as mt
import maptensors.numpy
import maptensors.torch
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

INDEX = "set/model.safetensors.index.json"
SHARDS = ["set/model-00001-of-00002.safetensors", "set/model-00002-of-00002.safetensors"]
OTHERS = [
    "other.safetensors", "other.delta.safetensors", "notes.txt", "fifo", "dir", "new", "new.safetensors",
    "new.safetensors.index.json", "new.gguf", "new.npz", "set/model.safetensors", "more/model.safetensors",
    "more/model.safetensors.index.json", "more/model-00001-of-00002.safetensors",
]  # fmt: skip


def tensors(value: int) -> dict[str, Any]:
    return {"a": np.full(3000, value, np.uint8), "b": np.full(50, value, np.uint8)}


def make(root: Path) -> None:
    for name, value in [("base", 1), ("tuned", 2), ("other", 3)]:
        mt.save(tensors(value), root / f"{name}.safetensors", durable=False)
    for new, name in [("tuned", "one"), ("other", "other")]:
        base = root / "base.safetensors"
        mt.save_diff(base, root / f"{new}.safetensors", root / f"{name}.delta.safetensors", durable=False)
    for name, value in [("set", 4), ("more", 5)]:
        (root / name).mkdir()
        mt.save(tensors(value), root / name / "model.safetensors", max_shard_size=3000, durable=False)
    (root / "notes.txt").write_text("mine")
    (root / "dir").mkdir()
    (root / "links").mkdir()
    os.mkfifo(root / "fifo")


def edited(root: Path) -> mt.Model:
    model = mt.open(root / "base.safetensors")
    for tensor in model.values():
        tensor.numpy()[:] = 2
    return model


def module(value: int) -> torch.nn.Module:
    made = torch.nn.Module()
    for name, array in tensors(value).items():
        made.register_buffer(name, torch.from_numpy(array))
    return made


def delta_of(base: str) -> Callable[[Path, Path], dict[str, Any]]:
    def applied(root: Path, out: Path) -> dict[str, Any]:
        return mt.apply_delta(root / base, out).numpy()

    return applied


def whole(root: Path, out: Path) -> dict[str, Any]:
    return mt.open(out).numpy()


BASE = "base.safetensors"

#: For each way to write: how, what it reads, of that what it may be written over, what then is there, and how
#: to read it.
WRITERS: dict[str, tuple[Callable[[Path, Path], Any], list[str], list[str], int, Callable[..., Any]]] = {
    "save": (lambda root, out: mt.save(tensors(9), out), [], [], 9, whole),
    "save_file of torch": (
        lambda root, out: maptensors.torch.save_file(module(9).state_dict(), out), [], [], 9, whole,
    ),
    "save_file of numpy": (lambda root, out: maptensors.numpy.save_file(tensors(9), out), [], [], 9, whole),
    "save_model": (lambda root, out: maptensors.torch.save_model(module(9), out), [], [], 9, whole),
    "create": (lambda root, out: draft(out), [], [], 9, whole),
    "save of a model": (lambda root, out: mt.save(mt.open(root / BASE), out), [BASE], [BASE], 1, whole),
    "save of an edited model": (lambda root, out: edited(root).save(out), [BASE], [BASE], 2, whole),
    "save of a model that was read": (
        lambda root, out: mt.open(root / BASE, backend="pread").save(out), [BASE], [BASE], 1, whole,
    ),
    "save of a set": (lambda root, out: mt.open(root / "set").save(out), [INDEX, *SHARDS], [], 4, whole),
    "save of files": (
        lambda root, out: mt.open([root / name for name in SHARDS]).save(out), SHARDS, [], 4, whole,
    ),
    "save_delta": (lambda root, out: mt.save_delta(edited(root), out), [BASE], [], 2, delta_of(BASE)),
    "save_diff of paths": (
        lambda root, out: mt.save_diff(root / BASE, root / "tuned.safetensors", out),
        [BASE, "tuned.safetensors"], [], 2, delta_of(BASE),
    ),
    "save_diff of models": (
        lambda root, out: mt.save_diff(mt.open(root / "set"), mt.open(root / "tuned.safetensors"), out),
        [INDEX, *SHARDS, "tuned.safetensors"], [], 2, delta_of("set"),
    ),
    "materialize": (
        lambda root, out: mt.materialize(root / BASE, [root / "one.delta.safetensors"], out),
        [BASE, "one.delta.safetensors"], [], 2, whole,
    ),
}  # fmt: skip


def draft(out: Path) -> None:
    with mt.create(out, {"a": ("U8", (3000,)), "b": ("U8", (50,))}, durable=False) as made:
        made.fill(tensors(9))


def spelled(root: Path, name: str, how: str) -> Path | str:
    match how:
        case "link":
            (root / "links/link.safetensors").symlink_to(root / name)
            return root / "links/link.safetensors"
        case "hard link" if (root / name).is_file():
            os.link(root / name, root / "links/link.safetensors")
            return root / "links/link.safetensors"
        case "dots":
            return f"{root}/dir/../links/.././{name}"
        case "relative":
            return os.path.relpath(root / name)
        case "bytes":
            return os.path.join(root, "", name)
    return root / name


def snapshot(root: Path) -> dict[str, bytes | str]:
    found: dict[str, bytes | str] = {}
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            is_file = path.is_file() and not path.is_symlink()
            found[str(path.relative_to(root))] = path.read_bytes() if is_file else repr(path.lstat().st_mode)
    return found


@pytest.fixture(scope="module")
def prepared() -> Iterator[Path]:
    # Where nothing waits for a disk.
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        root = Path(directory, "root")
        root.mkdir()
        make(root)
        yield root


def attempt(prepared: Path, writer: str, name: str, how: str) -> Exception | None:
    """Write; what it was refused with."""
    write, inputs, meant, value, read = WRITERS[writer]
    root = prepared.parent / "tried"
    # A FIFO is made anew: copying would wait for what comes out of it.
    shutil.copytree(prepared, root, ignore=lambda _, names: [name for name in names if name == "fifo"])
    os.mkfifo(root / "fifo")
    try:
        out = Path(spelled(root, name, how))
        before = snapshot(root)
        refused: Exception | None = None
        try:
            write(root, out)
        except (mt.MapTensorsError, OSError) as error:
            refused = error
        after = snapshot(root)
        if refused is not None:
            assert after == before, refused
            return refused
        for key, array in read(root, out).items():
            np.testing.assert_array_equal(array, np.full_like(array, value), err_msg=key)
        changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
        # A set is saved over itself by its own name.
        if not (writer in ("save of a set", "save of files") and name == "set/model.safetensors"):
            assert not changed & set(inputs) - set(meant)
        stem = out.name.removesuffix(".safetensors")
        assert all(Path(key).name.startswith(stem) for key in changed), changed
        return None
    finally:
        shutil.rmtree(root)


SPELLINGS = ["plain", "link", "hard link", "dots", "relative", "bytes"]


@settings(max_examples=150, deadline=None)
@given(
    writer=st.sampled_from(sorted(WRITERS)),
    name=st.sampled_from(OTHERS),
    how=st.sampled_from(SPELLINGS),
)
def test_what_is_written_over_anything_is_refused_or_right(
    prepared: Path, writer: str, name: str, how: str
) -> None:
    attempt(prepared, writer, name, how)


@pytest.mark.parametrize("writer", sorted(WRITERS))
def test_no_writer_writes_over_an_input_unless_that_is_its_meaning(prepared: Path, writer: str) -> None:
    _, inputs, meant, _, _ = WRITERS[writer]
    assert attempt(prepared, writer, "new.safetensors", "plain") is None
    for name in inputs:
        for how in SPELLINGS:
            refused = attempt(prepared, writer, name, how)
            assert (refused is None) == (name in meant), f"{name} {how}: {refused}"


def test_names_that_say_another_kind_of_file_are_refused_with_what_to_do(tmp_path: Path) -> None:
    for write in (
        lambda path: mt.save(tensors(1), path),
        lambda path: mt.create(path, {"a": ("U8", (1,))}),
        lambda path: maptensors.torch.save_file(module(1).state_dict(), path),
        lambda path: maptensors.torch.save_model(module(1), path),
    ):
        with pytest.raises(mt.MapTensorsError, match=r"save to .*/model\.safetensors; with max_shard_size"):
            write(tmp_path / "model.safetensors.index.json")
        for name in ("config.json", "m.GGUF", "m.pt", "m.npz"):
            with pytest.raises(mt.MapTensorsError, match="is the name of"):
                write(tmp_path / name)
    with pytest.raises(mt.MapTensorsError, match="edit the files that it names"):
        mt.edit(tmp_path / "model.safetensors.index.json", metadata={"a": "b"})
    for place in (mt.Checkpointer, mt.publish):
        with pytest.raises(mt.MapTensorsError, match="name a directory"):
            place(tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_saving_a_whole_model_has_the_set_of_its_name_go(tmp_path: Path) -> None:
    writers: list[Callable[[Path], Any]] = [
        lambda path: mt.save(tensors(9), path),
        lambda path: mt.save(tensors(9), path, max_shard_size="1GB"),
        lambda path: maptensors.torch.save_file(module(9).state_dict(), path),
        lambda path: maptensors.torch.save_model(module(9), path),
        draft,
    ]
    for i, write in enumerate(writers):
        directory = tmp_path / str(i)
        directory.mkdir()
        mt.save(tensors(4), directory / "model.safetensors", max_shard_size=3000)
        (directory / "config.json").write_text("{}")
        write(directory / "model.safetensors")
        assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]
        assert mt.open(directory)["a"].numpy()[0] == 9


def test_a_sharded_model_is_saved_over_itself_by_the_name_of_its_shards(tmp_path: Path) -> None:
    mt.save(tensors(4), tmp_path / "model.safetensors", max_shard_size=3000)
    for options, names in [({"max_shard_size": 3000}, 3), ({}, 1)]:
        model = mt.open(tmp_path)
        model["b"].numpy()[:] = names
        with pytest.raises(mt.MapTensorsError, match="save to"):
            model.save(tmp_path / "model.safetensors.index.json", **options)
        model.save(tmp_path / "model.safetensors", **options)
        assert len(os.listdir(tmp_path)) == names
        assert mt.open(tmp_path)["b"].numpy()[0] == names
        assert model["a"].numpy()[0] == 4  # what is held stays


def test_a_file_and_an_index_of_one_name_are_ambiguous(tmp_path: Path) -> None:
    mt.save(tensors(4), tmp_path / "model.safetensors", max_shard_size=3000)
    other = tmp_path / "other"
    mt.save(tensors(1), other)
    os.rename(other, tmp_path / "model.safetensors")
    with pytest.raises(mt.MapTensorsError, match=r"model\.safetensors and model\.safetensors\.index\.json"):
        mt.open(tmp_path)
    assert mt.open(tmp_path / "model.safetensors")["a"].numpy()[0] == 1
    assert mt.open(tmp_path / "model.safetensors.index.json")["a"].numpy()[0] == 4
    # The next save leaves one.
    mt.save(tensors(2), tmp_path / "model.safetensors")
    assert mt.open(tmp_path)["a"].numpy()[0] == 2
