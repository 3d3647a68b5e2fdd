"""Live weights: published by one process, held by others."""

import dataclasses
import doctest
import errno
import importlib
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import maptensors as mt
import numpy as np
import pytest
import torch
from support import PAGE, ROOT, file_offset

PRELUDE = """
import sys, time, os, hashlib, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # also as a job in a shell's background
import numpy as np, maptensors as mt
place = sys.argv[1]
"""


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "policy")


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where names stand for directories."""
    monkeypatch.setenv("MAPTENSORS_SHARE_DIR", str(tmp_path / "names"))
    return tmp_path / "names"


def child(code: str, place: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PRELUDE + code, place]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def state_of(value: float, size: int = 5000) -> dict[str, np.ndarray]:
    return {"a": np.full(size, value, np.float32), "b": np.full(size, -value, np.float32)}


def where(weights: mt.Subscriber, name: str) -> tuple[int, int]:
    """The inode and the offset at which a tensor lies."""
    info = weights.model.info(name)
    return os.stat(info.path).st_ino, info.offset


def test_every_process_holds_what_one_publishes(place: str) -> None:
    publisher = mt.publish(place, state_of(1.0))
    code = """
weights = mt.attach(place)
for expected in (1, 2):
    model = weights.model
    assert (model["a"].numpy() == expected).all() and (model["b"].numpy() == -expected).all()
    print(weights.generation, flush=True)
    if expected == 1:
        assert weights.wait(60) and weights.refresh() == {"a", "b"}
"""
    others = [child(code, place) for _ in range(3)]
    for other in others:
        assert other.stdout is not None
        assert other.stdout.readline() == "1\n"
    assert publisher.publish(state_of(2.0)) == 2
    for other in others:
        assert other.communicate(timeout=60)[0] == "2\n"
        assert other.returncode == 0


def test_a_state_arrives_as_it_was_numbers_and_structure_and_all(place: str) -> None:
    weight = torch.randn(4, 6, dtype=torch.bfloat16)
    state = {
        "model": {"w": weight, "tied": weight, "t": torch.randn(3, 5).T},
        "optimizer": [{"lr": 0.1, "m": np.arange(6)[::2]}],
        "step": 7,
    }
    with mt.publish(place, state, metadata={"run": "x"}) as publisher:
        weights = mt.attach(place)
        assert weights.model.metadata["run"] == "x"
        found = weights.state()
        assert torch.equal(found["model"]["w"], weight)
        assert found["model"]["w"].dtype == torch.bfloat16
        assert torch.equal(found["model"]["t"], state["model"]["t"])
        assert found["optimizer"][0]["lr"] == 0.1
        assert found["optimizer"][0]["m"].tolist() == [0, 2, 4]
        assert found["step"] == 7
        publisher.publish(state | {"step": 8}, changed=[])
        assert weights.refresh() == frozenset()
        assert weights.state()["step"] == 8
        assert isinstance(weights.state(framework="numpy")["model"]["t"], np.ndarray)
        with pytest.raises(ValueError, match="framework is one of"):
            weights.state(framework="tensorflow")


def test_only_what_changed_is_copied_and_the_rest_is_the_same_pages(place: str) -> None:
    with mt.publish(place, state_of(1.0)) as publisher, mt.attach(place, "r") as weights:
        a, b = where(weights, "a"), where(weights, "b")
        publisher.publish(state_of(2.0), changed=["a"])
        assert weights.refresh() == {"a"}
        assert where(weights, "b") == b
        assert where(weights, "a") != a
        # The caller's word counts: b was said to be as it was.
        assert (weights.model["b"].numpy() == -1).all()
        assert (weights.model["a"].numpy() == 2).all()
        with pytest.raises(KeyError):
            publisher.publish(state_of(3.0), changed=["a", "nowhere"])
        with pytest.raises(TypeError, match="several names"):
            publisher.publish(state_of(3.0), changed="a")
        assert publisher.generation == 2


def test_comparing_finds_out_what_changed(place: str) -> None:
    state = state_of(1.0) | {"strided": np.ones((4, 4), np.float32).T[::2]}
    with mt.publish(place, state) as publisher, mt.attach(place) as weights:
        b = where(weights, "b")
        state["a"] = state["a"].copy()
        state["a"][-1] += 1
        publisher.publish(state, changed="compare")
        names = weights.refresh()
        assert names is not None
        assert "a" in names
        assert "b" not in names
        assert where(weights, "b") == b
        assert weights.model["a"].numpy()[-1] == 2


def test_of_a_mapped_model_only_its_edits_are_published_and_taken_back(tmp_path: Path, place: str) -> None:
    path = tmp_path / "base.safetensors"
    mt.save(state_of(1.0), path)
    model = mt.open(path)
    with mt.publish(place, model) as publisher, mt.attach(place) as weights:
        b = where(weights, "b")
        for value in (5.0, 1.0):  # 1.0: as it is in the file again
            model["a"].numpy()[0] = value
            model.mark()  # what else the model is asked to remember makes no difference
            publisher.publish(model)
            assert weights.refresh() == {"a"}
            assert weights.model["a"].numpy()[0] == value
            assert where(weights, "b") == b
        publisher.publish(model)
        assert weights.refresh() == frozenset()
        # Another model's edits are not known to what was published.
        other = mt.open(path)
        other["b"].numpy()[0] = 9
        publisher.publish(other)
        weights.refresh()
        assert weights.model["b"].numpy()[0] == 9
        assert weights.model["a"].numpy()[0] == 1


def test_a_generation_held_never_changes(place: str) -> None:
    with mt.publish(place, state_of(0.0)) as publisher:
        held = mt.attach(place)
        taken = held.model["a"].numpy()
        for value in range(1, 60):
            publisher.publish(state_of(float(value)), changed=["a"] if value % 3 else None)
        assert (held.model["b"].numpy() == 0).all()
        assert held.generation == 1
        assert held.latest == 60
        assert held.refresh() == {"a", "b"}
        held.close()
        assert (taken == 0).all()
        files = list(Path(place).iterdir())
        assert len(files) < 10, files


def test_edits_of_a_reader_stay_its_own_and_a_read_only_one_makes_none(place: str) -> None:
    with mt.publish(place, state_of(1.0)) as publisher:
        one, other = mt.attach(place), mt.attach(place, "r")
        one.model["a"].numpy()[:] = 7
        assert (other.model["a"].numpy() == 1).all()
        with pytest.raises(ValueError, match="read-only"):
            other.model["a"].numpy()[0] = 1
        publisher.publish(state_of(2.0), changed=["b"])
        one.refresh()
        # The next generation is what was published, not what was made of the one before.
        assert (one.model["a"].numpy() == 1).all()
        with pytest.raises(ValueError, match="mode"):
            mt.attach(place, "r+")  # type: ignore[arg-type]


def test_waiting_sleeps_until_something_is_published(place: str) -> None:
    with mt.publish(place, state_of(1.0)) as publisher, mt.attach(place) as weights:
        assert not weights.changed
        assert not weights.wait(0)
        assert not weights.wait(0.05)
        later = threading.Timer(0.2, lambda: publisher.publish(state_of(2.0)))
        later.start()
        used = time.process_time()
        assert weights.wait(60)
        assert time.process_time() - used < 0.1  # asleep, not spinning
        later.join()
        assert weights.changed
        assert weights.wait(0)
        assert weights.refresh() is not None
        assert weights.refresh() is None
        seen = []
        for value in (3.0, 4.0):
            publisher.publish(state_of(value))
            seen.append(next(weights.updates(timeout=60)))
        assert seen == [{"a", "b"}, {"a", "b"}]
        assert list(weights.updates(timeout=0.01)) == []


def test_ctrl_c_ends_waiting(place: str) -> None:
    with mt.publish(place, state_of(1.0)):
        other = child(
            "weights = mt.attach(place)\nprint('waiting', flush=True)\n"
            "try:\n    weights.wait()\nexcept KeyboardInterrupt:\n    print('interrupted')\n",
            place,
        )
        assert other.stdout is not None
        assert other.stdout.readline() == "waiting\n"
        time.sleep(0.3)
        other.send_signal(signal.SIGINT)
        assert other.communicate(timeout=30)[0] == "interrupted\n"


def test_who_comes_before_the_publisher_may_wait_for_it(place: str) -> None:
    for timeout in (0, 0.05):
        with pytest.raises(mt.errors.PublicationError, match="nothing is published"):
            mt.attach(place, timeout=timeout)
    publishers: list[mt.Publisher] = []
    later = threading.Timer(0.2, lambda: publishers.append(mt.publish(place, state_of(1.0))))
    later.start()
    assert mt.attach(place, timeout=60).generation == 1
    later.join()


def test_a_killed_publisher_leaves_its_last_generation_and_its_place(place: str) -> None:
    other = child(
        """
publisher = mt.publish(place, {"a": np.full(9, 1.0)})
publisher.publish({"a": np.full(9, 2.0)})
print("published", flush=True)
time.sleep(600)
""",
        place,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "published\n"
    weights = mt.attach(place)
    with pytest.raises(mt.errors.BusyError, match=str(other.pid)):
        mt.publish(place)
    other.kill()
    other.communicate()
    assert (weights.model["a"].numpy() == 2).all()
    with mt.publish(place) as publisher:
        assert publisher.generation == 2
        assert publisher.publish({"a": np.full(9, 3.0)}) == 3
    assert weights.wait(60)
    assert weights.refresh() == {"a"}


def test_a_publication_taken_away_is_told_and_what_is_held_stays(place: str) -> None:
    publisher = mt.publish(place, state_of(1.0))
    weights = mt.attach(place)
    publisher.remove()
    assert not os.path.exists(place)
    for ask in (weights.wait, weights.refresh):
        with pytest.raises(mt.MapTensorsError, match="removed"):
            ask()
    assert (weights.model["a"].numpy() == 1).all()
    with pytest.raises(mt.MapTensorsError, match="closed"):
        publisher.publish(state_of(2.0))
    weights.close()
    with pytest.raises(mt.MapTensorsError, match="closed"):
        weights.refresh()


def test_only_its_owner_may_look_unless_asked(names: Path, place: str) -> None:
    def bits(path: os.PathLike[str] | str) -> int:
        return stat.S_IMODE(os.stat(path).st_mode)

    with mt.publish("private", state_of(1.0)) as publisher:
        assert Path(publisher.path) == names / "private"
        assert bits(publisher.path) == 0o700
        assert {bits(entry) for entry in Path(publisher.path).iterdir()} == {0o600}
        assert mt.attach("private").generation == 1
    with mt.publish(place, state_of(1.0), permissions=0o640) as publisher:
        assert bits(place) == 0o750
        assert {bits(entry) for entry in Path(place).iterdir()} == {0o640}
        publisher.publish(state_of(2.0))
        publisher.publish(state_of(3.0))
        assert {bits(entry) for entry in Path(place).iterdir() if "tmp" not in entry.name} == {0o640}


@pytest.mark.parametrize("name", ["", "..", ".", ".hidden", "a\0b", "x" * 300, "new\nline"])
def test_a_name_cannot_lead_out_of_its_directory(names: Path, name: str) -> None:
    for call in (lambda: mt.publish(name), lambda: mt.attach(name)):
        with pytest.raises((ValueError, OSError)):
            call()
    assert not names.exists() or not any(names.iterdir())


@pytest.mark.parametrize("damage", ["control", "head", "missing"])
def test_a_damaged_publication_is_an_error_and_no_crash(place: str, damage: str) -> None:
    with mt.publish(place, state_of(1.0)):
        pass
    [head] = Path(place).glob("*.safetensors")
    match damage:
        case "control":
            control = Path(place, "control")
            control.write_bytes(os.urandom(control.stat().st_size))
        case "head":
            head.write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
        case "missing":
            head.unlink()
    with pytest.raises((mt.MapTensorsError, OSError)):
        mt.attach(place)
    with pytest.raises((mt.MapTensorsError, OSError)):
        mt.publish(place)


def test_the_example_runs(names: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "live_weights.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, *steps, last = done.stdout.splitlines()
    assert first.startswith("step  ")
    assert steps, "generations arrive one after another"
    assert all(line.startswith("step ") and line.endswith(" weights.fc2.weight") for line in steps)
    assert last == "the trainer has ended"
    assert not any(names.iterdir())


def test_a_path_is_never_a_name(names: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with mt.publish(Path("policy"), state_of(1.0)) as publisher:
        assert publisher.path == str(tmp_path / "policy")
        assert mt.attach(Path("./policy")).generation == 1
    assert not names.exists()


def test_permissions_for_others_want_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAPTENSORS_SHARE_DIR", raising=False)
    with pytest.raises(mt.MapTensorsError, match="publish to a path"):
        mt.publish("test-of-permissions", permissions=0o640)


def test_torch_in_mode_r_is_refused_for_what_it_is(place: str) -> None:
    with mt.publish(place, {"w": torch.ones(3)}), mt.attach(place, "r") as weights:
        with pytest.raises(Exception, match=r"^tensor \"w\" is read-only, and torch"):
            weights.state()
        assert weights.state(framework="numpy")["w"].tolist() == [1, 1, 1]


def test_what_was_published_is_found_and_removed_also_after_a_kill(names: Path) -> None:
    assert mt.publications() == []
    with pytest.raises(mt.errors.PublicationError, match="nothing is published"):
        mt.publications("policy")
    assert not names.exists(), "only looked"
    code = """
publisher = mt.publish("policy", {"a": np.full(10_000, 1.0), "b": np.zeros(10_000)})
publisher.publish({"a": np.full(10_000, 2.0), "b": np.zeros(10_000)}, changed=["a"])
print("published", flush=True)
time.sleep(600)
"""
    began = time.time()
    other = child(code, "")
    assert other.stdout is not None
    assert other.stdout.readline() == "published\n"
    [found] = mt.publications()
    assert (found.name, found.path) == ("policy", str(names / "policy"))
    assert (found.generation, found.tensors, found.nbytes) == (2, 2, 160_000)
    assert found.allocated == sum(512 * path.stat().st_blocks for path in Path(found.path).iterdir())
    assert (found.publishing, found.process, found.damage) == (True, other.pid, None)
    assert found.published is not None
    assert began - 1 < found.published < time.time() + 1
    with pytest.raises(mt.errors.BusyError, match=str(other.pid)):
        found.remove()
    other.kill()
    other.communicate()
    assert mt.publications("policy", names / "policy") == [
        dataclasses.replace(found, publishing=False),
        dataclasses.replace(found, publishing=False, name=None),
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.name = "other"  # type: ignore[misc]
    assert found.remove() == found.allocated
    assert not any(names.iterdir())
    with pytest.raises(mt.errors.PublicationError, match="nothing is published"):
        found.remove()


@pytest.mark.parametrize("damage", ["control", "missing"])
def test_damage_is_told_to_who_waits_for_ever_and_found(names: Path, damage: str) -> None:
    mt.publish("policy", state_of(1.0)).close()
    [head] = (names / "policy").glob("*.safetensors")
    if damage == "control":
        (names / "policy/control").write_bytes(b"")
    else:
        head.unlink()
    with pytest.raises(mt.errors.PublicationError, match="damaged"):
        mt.attach("policy", timeout=None)
    [found] = mt.publications()
    assert "damaged" in (found.damage or "")
    assert found.remove() == found.allocated > 0
    assert mt.publications() == []


def test_ctrl_c_ends_waiting_for_a_publication(place: str) -> None:
    code = """
try:
    print("waiting", flush=True)
    mt.attach(place, timeout=None)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    other = child(code, place)
    assert other.stdout is not None
    assert other.stdout.readline() == "waiting\n"
    time.sleep(0.3)
    other.send_signal(signal.SIGINT)
    assert other.communicate(timeout=30)[0] == "interrupted\n"


@pytest.fixture
def little_memory(tmp_path: Path) -> Iterator[Path]:
    """4 MiB of memory to publish to."""
    if os.geteuid() != 0:
        pytest.skip("mounting memory needs root: publishing what does not fit is untested")
    place = tmp_path / "memory"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"mounting memory is refused here, what does not fit is untested: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_what_does_not_fit_says_what_it_takes_and_what_to_do(little_memory: Path) -> None:
    with mt.publish(little_memory / "p", {"a": np.zeros(1000)}) as publisher:
        with pytest.raises(OSError, match="No space left") as caught:
            publisher.publish({"a": np.zeros(1 << 20)})
        assert caught.value.errno == errno.ENOSPC
        assert str(caught.value.filename).startswith(str(little_memory))
        [note] = caught.value.__notes__
        for word in [f"room for {8 << 20} bytes", "are free", "maptensors publications", "--shm-size"]:
            assert word in note
        assert publisher.publish({"a": np.ones(1000)}) == 2


def test_the_docstrings_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = doctest.testmod(importlib.import_module("maptensors._share"))
    assert result.failed == 0
    assert result.attempted > 10


# torch has no read-only tensors.
@pytest.mark.parametrize(("framework", "mode"), [("jax", "r"), ("jax", "c"), ("torch", "c")])
def test_arrays_held_over_generations_and_removal_stay_and_nothing_is_written_under_them(
    place: str, framework: str, mode: Literal["r", "c"]
) -> None:
    """Values alone would not tell an alias from a copy; addresses would not tell what was written there."""

    def address(array: Any) -> int:
        return array.unsafe_buffer_pointer() if framework == "jax" else array.data_ptr()

    # No page of the file is shared with a neighbour, and each starts at a multiple of 64.
    size = 3 * PAGE
    publisher = mt.publish(place, state_of(0.0, size))
    weights = mt.attach(place, mode)
    held: list[tuple[float, int, int, Any]] = []
    for value in map(float, range(6)):
        if value:
            publisher.publish(state_of(value, size))
            assert weights.refresh() == {"a", "b"}
        model = weights.model
        taken = [weights.state(framework=framework)["a"], getattr(model["a"], framework)()]
        path, offset = model.info("a").path, model.info("a").offset
        inode = os.stat(path).st_ino
        for array in taken:
            assert address(array) == model["a"].data_ptr()
            assert file_offset(Path(path), address(array), array.nbytes) == offset
            held.append((value, inode, address(array), array))
        del model, taken, array
    # A file that is held is never used again: each generation has its own.
    assert len({inode for _, inode, _, _ in held}) == 6

    def check() -> None:
        for value, inode, at, array in held:
            assert (np.asarray(array) == value).all()
            assert address(array) == at
            assert inode_at(at) == inode

    check()
    # Who writes to the generation that comes next writes to pages of its own.
    publisher.publish(state_of(6.0, size))
    weights.refresh()
    if mode == "c":
        weights.model["a"].numpy()[:] = 99.0
    check()
    weights.close()
    publisher.remove()
    assert not os.path.exists(place)
    check()
    with mt.publish(place, state_of(7.0, size)):  # another of that name
        check()


def inode_at(address: int) -> int:
    """The file that is mapped at an address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, _, _, _, inode = line.split()[:5]
        start, end = (int(bound, 16) for bound in bounds.split("-"))
        if start <= address < end:
            return int(inode)
    raise AssertionError(f"nothing is mapped at {address:#x}")


def test_another_process_may_hold_nothing_but_a_jax_array(place: str) -> None:
    code = """
import jax
model = mt.attach(place, "r").model
held, at = model["a"].jax(), model["a"].data_ptr()
assert held.unsafe_buffer_pointer() == at
del model
print("held", flush=True)
sys.stdin.readline()
assert (np.asarray(held) == 0).all() and held.unsafe_buffer_pointer() == at
assert float(jax.numpy.abs(held).max()) == 0
print("same", flush=True)
"""
    publisher = mt.publish(place, state_of(0.0))
    other = child(code, place)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    for value in map(float, range(1, 9)):
        publisher.publish(state_of(value))
    publisher.remove()
    assert other.communicate("\n", timeout=60)[0] == "same\n"
    assert other.returncode == 0


def test_what_changed_may_be_named_by_any_place_of_a_tied_tensor(place: str) -> None:
    tied, alone = torch.ones(4, 4), torch.zeros(3)
    state = {
        "model": {"embed": {"weight": tied}, "head": {"weight": tied}, "norm": alone},
        "parts": [alone, {1: tied}],
        "a~b": torch.ones(2),
    }
    publisher = mt.publish(place, state)
    with mt.attach(place) as weights:
        for name in ("model.embed.weight", "model.head.weight", "parts.1.1"):
            tied.add_(1)
            publisher.publish(state, changed=[name])
            assert weights.refresh() == {"model.embed.weight"}, name
            assert torch.equal(weights.state()["model"]["head"]["weight"], tied)
        alone.add_(1)
        publisher.publish(state, changed=["parts.0", "a~b"])
        assert weights.refresh() == {"model.norm"}
        with pytest.raises(mt.errors.MissingError, match=r'no tensor "model\.tail"'):
            publisher.publish(state, changed=["model.tail"])
    publisher.remove()


def test_two_places_of_one_name_have_both_tensors_published(place: str) -> None:
    state: dict[str, Any] = {"a": {"b": np.zeros(3)}, "a.b": np.zeros(3)}
    publisher = mt.publish(place, state)
    with mt.attach(place) as weights:
        state["a.b"][:] = 1
        publisher.publish(state, changed=["a.b"])
        weights.refresh()
        assert weights.state()["a.b"][0] == 1
    publisher.remove()


def test_comparing_looks_at_the_values_of_tensors_that_are_strided(place: str) -> None:
    state: dict[str, Any] = {
        "torch": torch.arange(6.0).reshape(2, 3).t(),
        "numpy": np.arange(20.0)[::2],
        "swapped": np.arange(4.0).astype(">f8"),
        "conjugated": torch.tensor([1 + 2j]).conj(),
        "plain": torch.zeros(3),
    }
    publisher = mt.publish(place, state)
    with mt.attach(place) as weights:
        inodes = {name: where(weights, name) for name in state}
        publisher.publish(state, changed="compare")
        assert weights.refresh() == frozenset()
        assert {name: where(weights, name) for name in state} == inodes, "nothing is copied"
        for name in state:
            state[name][-1] = 9
            publisher.publish(state, changed="compare")
            assert weights.refresh() == {name}
        assert weights.model["torch"].numpy().tolist() == [[0, 3], [1, 4], [9, 9]]
    publisher.remove()


def test_refresh_names_what_differs_whatever_was_said_to_have_changed(place: str) -> None:
    state = state_of(1.0)
    publisher = mt.publish(place, state)
    with mt.attach(place) as weights:
        publisher.publish(state)
        assert weights.refresh() == frozenset()
        state["b"][-1] = np.nan
        publisher.publish(state)
        assert weights.refresh() == {"b"}
        publisher.publish(state, changed=["a"])
        assert weights.refresh() == frozenset()
        # There and back, while nobody looked.
        for value in (5.0, 1.0):
            state["a"][0] = value
            publisher.publish(state)
        assert weights.refresh() == frozenset()
        # The same bytes in another shape, or of another dtype, are others.
        state["a"] = state["a"].reshape(50, 100)
        state["b"] = state["b"].view(np.int32)
        publisher.publish(state)
        assert weights.refresh() == {"a", "b"}
        del state["a"]
        publisher.publish(state)
        assert weights.refresh() == {"a"}
    publisher.remove()
