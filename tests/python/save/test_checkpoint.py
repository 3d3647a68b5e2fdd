"""Checkpoints: any training state, saved again and again, as it was."""

import asyncio
import math
import os
import threading
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import maptensors as mt
import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
from support import file_offset, names_in, succeed


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def assert_same(found: Any, expected: Any, where: str = "state") -> None:
    """Equal in value, type and structure, all the way down."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), where
    elif isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), where
        assert found.tobytes() == expected.tobytes(), where
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}.{i}")
    elif isinstance(expected, float) and math.isnan(expected):
        assert math.isnan(found), where
    else:
        assert found == expected, where


def test_a_training_run_stops_and_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    model, optimizer = trained()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3, "loss": 0.25}
    with mt.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state, 3)
        loaded = checkpoints.load()
    assert_same(loaded["optimizer"], state["optimizer"])
    assert_same(dict(loaded["model"]), dict(state["model"]))

    def go_on(state: dict[str, Any]) -> torch.Tensor:
        model, optimizer = trained()
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        optimizer.zero_grad()
        model(torch.ones(4, 8)).square().sum().backward()
        optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(go_on(loaded), go_on(state))


CONJUGATE = torch.tensor([1 + 2j, 3 - 4j])
STATES: dict[str, Any] = {
    "numbers": {"a": 1, "b": -(2**70), "c": 0.1, "d": True, "e": None, "f": "text \N{SNOWMAN} \ud800"},
    "floats": {"nan": math.nan, "inf": math.inf, "minus": -math.inf, "zero": -0.0, "tiny": 5e-324},
    "nested": {"a": {"b": [1, (2, [3.5, {"c": None}])], "empty": {}, "list": [], "tuple": ()}},
    "keys": {
        "state": {0: {"step": torch.tensor(1.0)}, 1: {"step": torch.tensor(2.0)}},
        "x": {True: 1, None: 2},
    },
    "ordered": OrderedDict(b=1, a=OrderedDict(d=np.ones(2), c=2)),
    "arrays": {"n": np.arange(6).reshape(2, 3), "t": torch.ones(2, dtype=torch.bfloat16), "s": np.float32(2)},
    "clash": {"a.b": np.ones(1), "a": {"b": np.zeros(2)}, "__metadata__": {"x": 1}},
    "flat": {"a": np.ones(3), "b": np.zeros((2, 0), ml_dtypes.bfloat16)},
    "strided": {"t": torch.arange(12.0).reshape(3, 4).T, "n": np.arange(10)[::2]},
    "nothing": {},
    "others": {"c": Counter(b=2, a=1), "s": torch.Size([2, 3]), "b": b"\x00\xff", "z": 1 - 2j},
    "lazy": {"x": CONJUGATE, "y": CONJUGATE.conj(), "i": CONJUGATE.imag, "n": CONJUGATE.conj().imag},
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_a_state_comes_back_as_it_was(tmp_path: Path, state: dict[str, Any]) -> None:
    with mt.Checkpointer(tmp_path) as checkpoints:
        saved = checkpoints.save(state, 1, metadata={"mine": "yes"})
        assert_same(checkpoints.load(), state)
        checkpoints.save_async(state, 2).wait()
        assert_same(checkpoints.load(2), state)
    # A standard file, which the reference reads.
    with safetensors.safe_open(saved.path, "np") as file:
        assert file.metadata()["mine"] == "yes"
        assert file.metadata()["maptensors.step"] == "1"


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"a": {"b": [object()]}}, r"a\.b\.0 is a builtins\.object"),
        ({"a": {1, 2}}, r"a is a builtins\.set"),
        ({"a": {"fn": len}}, r"a\.fn is a builtins\.builtin_function"),
        ({"a": {(1, 2): 3}}, r"a has a key of type tuple"),
        ({"a": np.array(["text"])}, "a"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_refused_by_name(tmp_path: Path, state: Any, where: str) -> None:
    with mt.Checkpointer(tmp_path) as checkpoints:
        with pytest.raises((TypeError, mt.MapTensorsError), match=where):
            checkpoints.save(state, 1)
        assert checkpoints.steps() == []
    assert names_in(tmp_path) == []


def test_tied_weights_are_saved_once_and_come_back_tied(tmp_path: Path) -> None:
    w = torch.randn(100, 100)
    with mt.Checkpointer(tmp_path) as checkpoints:
        saved = checkpoints.save({"in": w, "out": w, "view": w.view(100, 100), "n": 1}, 1)
        assert saved.nbytes == 40_000
        state = checkpoints.load()
    assert state["in"].data_ptr() == state["out"].data_ptr() == state["view"].data_ptr()
    assert torch.equal(state["out"], w)


def test_a_state_is_loaded_in_the_framework_asked_for_and_mapped(tmp_path: Path) -> None:
    with mt.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save({"m": {"w": torch.ones(4096)}, "step": 1}, 1)
        loaded = checkpoints.load(framework="numpy")
        assert isinstance(loaded["m"]["w"], np.ndarray)
        assert file_offset(Path(checkpoints.path()), loaded["m"]["w"].ctypes.data) is not None
        assert isinstance(checkpoints.load(framework="maptensors")["m"]["w"], mt.Tensor)
        with pytest.raises(ValueError, match="framework"):
            checkpoints.load(framework="tensorflow")
        # Edits of a loaded state stay in the process.
        loaded["m"]["w"][:] = 5
        assert checkpoints.load()["m"]["w"].sum() == 4096


def test_mutating_after_staging_does_not_reach_the_file(tmp_path: Path) -> None:
    w = np.zeros(1 << 18, np.float32)
    t = torch.zeros(512, 512)
    with mt.Checkpointer(tmp_path, keep=2) as checkpoints:
        for step in range(1, 16):
            w[:] = step
            t[:] = step
            saving = checkpoints.save_async({"w": w, "t": t.T, "step": step}, step)
            saving.wait_staged()
            w[:] = -1
            t[:] = -1
        checkpoints.wait()
        assert checkpoints.steps() == [14, 15]
        state = checkpoints.load()
        assert (state["w"] == 15).all()
        assert (state["t"] == 15).all()
        assert state["step"] == 15
    assert len(names_in(tmp_path)) == 2


def test_a_save_in_the_background_is_a_context_manager_and_can_be_awaited(tmp_path: Path) -> None:
    state = {"w": np.ones(1000)}
    with mt.Checkpointer(tmp_path) as checkpoints:
        with checkpoints.save_async(state, 1) as saving:
            assert saving.staged > 0
        assert saving.done()
        assert checkpoints.latest() == 1

        async def save() -> mt.Saved:
            return await checkpoints.save_async(state, 2)

        saved = asyncio.run(save())
        assert (saved.step, saved.durable) == (2, True)
        assert saved.finished >= saved.staged > 0
        assert saving.wait() == saving.result(timeout=1)


def test_files_are_used_again_but_not_under_a_reader(recycling: Path) -> None:
    with mt.Checkpointer(recycling, {"w": ("F32", (100_000,))}, keep=1) as checkpoints:
        checkpoints.wait()
        outputs = []
        for step in range(1, 6):
            outputs.append(checkpoints.save({"w": np.full(100_000, step, np.float32)}, step).output)
        assert outputs == ["prepared", "prepared", "recycled", "recycled", "recycled"]
        held = checkpoints.load()["w"]
        for step in range(6, 9):
            checkpoints.save({"w": np.full(100_000, step, np.float32)}, step)
            assert (held == 5).all()
        assert (checkpoints.load()["w"] == 8).all()


def test_progress_is_told_up_to_the_end(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    lock = threading.Lock()

    def progress(done: int, total: int) -> None:
        with lock:
            told.append((done, total))

    state = {"w": np.ones(1 << 20), "t": torch.ones(1000)}
    with mt.Checkpointer(tmp_path, progress=progress) as checkpoints:
        saved = checkpoints.save(state, 1)
        assert max(told) == (saved.nbytes, saved.nbytes)
        told.clear()
        checkpoints.save(state, 2)
        assert max(told) == (saved.nbytes, saved.nbytes)
    with mt.Checkpointer(tmp_path / "bar", progress=True) as checkpoints:
        checkpoints.save(state, 1)


def test_shards_are_saved_and_loaded_as_one(tmp_path: Path) -> None:
    state = {"m": {str(i): torch.full((1000,), float(i)) for i in range(10)}, "step": 1}
    with mt.Checkpointer(tmp_path, keep=1, max_shard_size="20KB") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save_async(state, step).wait()
        assert checkpoints.steps() == [3]
        assert checkpoints.path().endswith(".index.json")
        assert_same(checkpoints.load(), state)


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    checkpoints = mt.Checkpointer(tmp_path)
    with pytest.raises(mt.MapTensorsError, match="no checkpoint yet"):
        checkpoints.load()
    checkpoints.save({"w": np.ones(1)}, 1)
    with pytest.raises(mt.MapTensorsError, match="no checkpoint of step 2"):
        checkpoints.open(2)
    with pytest.raises(ValueError, match="keep is at least 1"):
        mt.Checkpointer(tmp_path, keep=0)
    with pytest.raises(TypeError, match="a state is a dict"):
        checkpoints.save([1, 2], 2)  # type: ignore[arg-type]
    checkpoints.close()
    with pytest.raises(mt.MapTensorsError, match="closed"):
        checkpoints.save({}, 3)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        mt.Checkpointer(tmp_path / "file")


def test_a_full_disk_is_an_error_and_leaves_the_old_ones(tmp_path: Path) -> None:
    succeed(
        """
import resource, signal, sys
import numpy as np, maptensors as mt
checkpoints = mt.Checkpointer(sys.argv[1], prepare=False)
checkpoints.save({"w": np.ones(1000)}, 1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoints.save_async({"w": np.ones(1_000_000)}, 2)
except OSError as error:
    assert "step-0000000002" in str(error), error
else:
    raise SystemExit("saved past the limit")
assert checkpoints.steps() == [1]
assert checkpoints.load()["w"].sum() == 1000
""",
        tmp_path,
    )
    assert names_in(tmp_path) == ["step-0000000001.safetensors"]


def test_a_forked_child_leaves_its_parents_checkpoints_alone(tmp_path: Path) -> None:
    succeed(
        """
import os, sys
import numpy as np, maptensors as mt
checkpoints = mt.Checkpointer(sys.argv[1], keep=1)
checkpoints.save({"w": np.ones(1000)}, 1)
checkpoints.wait()
before = sorted(os.listdir(sys.argv[1]))
assert before == ["step-0000000001.safetensors"]  # the next output has no name
child = os.fork()
if child == 0:
    for save in (checkpoints.save, checkpoints.save_async):
        try:
            save({"w": np.zeros(1000)}, 2)
        except mt.MapTensorsError as error:
            assert "another process" in str(error)
        else:
            os._exit(1)
    del checkpoints
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
assert sorted(os.listdir(sys.argv[1])) == before
assert checkpoints.save({"w": np.ones(1000)}, 2).output == "prepared"
checkpoints.close()
""",
        tmp_path,
    )
    assert os.listdir(tmp_path) == ["step-0000000002.safetensors"]


@pytest.mark.parametrize("shards", [None, "20KB"])
def test_checkpoints_carry_checksums_where_asked(tmp_path: Path, shards: str | None) -> None:
    state = {"w": np.arange(10_000.0), "t": torch.ones(100, 7).T, "step": 1}
    with mt.Checkpointer(tmp_path, keep=1, checksums=True, max_shard_size=shards) as checkpoints:
        for step in range(4):
            state["w"] += 1
            checkpoints.save_async(state, step).wait()
            mt.verify(checkpoints.path())
            assert_same(checkpoints.load(), state)


def test_a_cyclic_state_and_hostile_metadata_are_clean_errors(tmp_path: Path) -> None:
    cyclic: dict[str, Any] = {}
    cyclic["self"] = cyclic
    with mt.Checkpointer(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="contains itself"):
            checkpoints.save(cyclic, 1)
        for text in [
            "{",
            "[1]",
            '{"items":[5]}',
            '{"items":[[[],1]]}',
            '{"items":["ab"]}',
            '{"ordered":[1]}',
            '{"what":1}',
            '{"tensor":"w","as":"os.system"}',
            '{"tensor":"nowhere","as":"numpy"}',
            '{"bytes":"?"}',
            '{"complex":"x"}',
            '{"list":' * 100_000 + "[]" + "}" * 100_000,
        ]:
            path = tmp_path / "step-0000000007.safetensors"
            mt.save({"w": np.ones(1)}, path, metadata={"maptensors.state": text})
            with pytest.raises(mt.MapTensorsError):
                checkpoints.load(7)


def test_metadata_of_another_checkpoint_does_not_stand_in_for_the_state(tmp_path: Path) -> None:
    with mt.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save({"w": np.ones(1), "lr": 1}, 1, metadata={"mine": "yes"})
        checkpoints.save({"w": np.ones(1), "lr": 2, "new": 3}, 2, metadata=checkpoints.open(1).metadata)
        loaded = checkpoints.load(2)
        assert (loaded["lr"], loaded["new"]) == (2, 3)
        assert checkpoints.open(2).metadata["mine"] == "yes"
        assert checkpoints.open(2).metadata["maptensors.step"] == "2"


def test_a_dangling_link_is_no_checkpoint_and_a_changed_directory_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with mt.Checkpointer("checkpoints") as checkpoints:
        checkpoints.save({"w": np.ones(1)}, 1)
        (tmp_path / "checkpoints" / "step-0000000009.safetensors").symlink_to("archive/gone")
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert checkpoints.latest() == 1
        assert checkpoints.load()["w"] == 1
        with pytest.raises(mt.MapTensorsError, match="no checkpoint of step 9"):
            checkpoints.load(9)
        checkpoints.save({"w": np.ones(1)}, 2)
        assert checkpoints.steps() == [1, 2]
        checkpoints.remove(2)
        checkpoints.remove(2)
        assert checkpoints.steps() == [1]
    assert names_in(tmp_path / "elsewhere") == []


def test_a_save_under_way_is_finished_when_the_interpreter_ends(tmp_path: Path) -> None:
    succeed(
        """
import sys, threading, time
import numpy as np, maptensors as mt
def hold():
    checkpoints = mt.Checkpointer(sys.argv[1])
    checkpoints.save_async({"w": np.ones(10_000_000)}, 1)
    started.set()
    time.sleep(1000)
started = threading.Event()
threading.Thread(target=hold, daemon=True).start()
started.wait()
""",
        tmp_path,
    )
    assert names_in(tmp_path) == ["step-0000000001.safetensors"]


def test_an_error_is_raised_by_every_wait_and_does_not_hide_another(tmp_path: Path) -> None:
    # While it is staged a directory takes its name: found out when it is to be renamed.
    blocked = tmp_path / "step-0000000001.safetensors"
    checkpoints = mt.Checkpointer(tmp_path, prepare=False, progress=lambda *_: blocked.mkdir(exist_ok=True))
    saving = checkpoints.save_async({"w": np.ones(1000)}, 1)
    for _ in range(2):
        with pytest.raises(OSError, match="step-0000000001"):
            saving.wait()
    with pytest.raises(ZeroDivisionError), saving:
        raise ZeroDivisionError
    assert checkpoints.latest() is None
    checkpoints.close()
    assert names_in(tmp_path) == [blocked.name]


def test_what_tidies_up_or_saves_beside_does_not_disturb_the_next_output(recycling: Path) -> None:
    tmp_path = recycling
    state = {"w": np.ones(100_000)}
    with mt.Checkpointer(tmp_path, keep=1) as checkpoints:
        for step in range(4):
            checkpoints.save(state, step)
        checkpoints.wait()
        mt.save(state, tmp_path / "best.safetensors")
        assert checkpoints.save(state, 4).output == "recycled"
        checkpoints.wait()
        for name in os.listdir(tmp_path):
            if name.startswith(".maptensors-"):
                (tmp_path / name).unlink()
        assert checkpoints.save(state, 5).output == "new"
        assert (checkpoints.load()["w"] == 1).all()


def test_progress_counts_what_is_not_contiguous(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with mt.Checkpointer(tmp_path, progress=lambda *at: told.append(at)) as checkpoints:
        saved = checkpoints.save({"t": torch.ones(1000, 1000).T, "n": np.ones(5)}, 1)
    assert max(told) == (saved.nbytes, saved.nbytes)


def test_loading_and_listing_make_no_directory(tmp_path: Path) -> None:
    directory = tmp_path / "missing"
    checkpoints = mt.Checkpointer(directory)
    assert checkpoints.steps() == []
    assert checkpoints.latest() is None
    with pytest.raises(ValueError, match="no checkpoint yet"):
        checkpoints.load()
    assert not directory.exists()
    checkpoints.save({"w": np.zeros(3)}, 1)
    assert checkpoints.steps() == [1]
    mt.Checkpointer(tmp_path / "prepared", example={"w": np.zeros(3)}).close()
    assert (tmp_path / "prepared").is_dir()
