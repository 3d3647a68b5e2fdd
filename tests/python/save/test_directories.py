"""Directories over time: moved, read-only, saved into by another run, replaced under a reader."""

import errno
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import maptensors as mt
import numpy as np
import pytest
from maptensors.errors import MovedError, NotRemovedError, StepWarning
from support import names_in


def state_of(value: float) -> dict[str, np.ndarray]:
    return {"a": np.full(1000, value), "b": np.full(1000, value)}


def checkpoints_in(directory: Path) -> list[str]:
    return [name for name in names_in(directory) if not name.startswith(".maptensors-")]


@pytest.mark.parametrize("how", ["moved", "linked", "removed"])
def test_a_run_whose_directory_went_elsewhere_says_so(tmp_path: Path, how: str) -> None:
    (tmp_path / "one").mkdir()
    run = tmp_path / "run"
    if how == "linked":
        run.symlink_to("one")
    else:
        run = tmp_path / "one"
    with mt.Checkpointer(run, keep=2) as checkpoints:
        for step in range(1, 4):
            checkpoints.save(state_of(step), step)
        checkpoints.wait()
        there = tmp_path / "one"
        if how == "moved":
            there = run.rename(tmp_path / "archive")
        elif how == "linked":
            (tmp_path / "two").mkdir()
            run.unlink()
            run.symlink_to("two")
        else:
            shutil.rmtree(run)
        for refused in (
            lambda: checkpoints.save(state_of(4), 4),
            lambda: checkpoints.save_async(state_of(4), 4),
            lambda: checkpoints.load(),
            lambda: checkpoints.remove(3),
            checkpoints.steps,
            checkpoints.latest,
            checkpoints.path,
        ):
            expected = "was removed" if how == "removed" else f"is {there} now"
            with pytest.raises(MovedError, match=expected) as raised:
                refused()
            assert raised.value.filename == str(run)
            assert isinstance(raised.value, OSError)
    if how != "removed":
        assert checkpoints_in(there) == ["step-0000000002.safetensors", "step-0000000003.safetensors"]
    assert not run.exists() or names_in(run) == []


def test_a_draft_is_saved_where_its_directory_went_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    draft = mt.create(tmp_path / "a" / "m.safetensors", {"w": ("F32", (3,))})
    draft["w"][...] = np.ones(3, np.float32)
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(MovedError, match=f"{tmp_path / 'b'} now.*was saved in that directory, whole"):
        draft.commit()
    assert mt.open(tmp_path / "b" / "m.safetensors")["w"].numpy().tolist() == [1, 1, 1]
    # A process that goes elsewhere has moved nothing.
    monkeypatch.chdir(tmp_path / "b")
    draft = mt.create("relative.safetensors", {"w": ("F32", (3,))})
    monkeypatch.chdir(tmp_path)
    draft.commit()
    assert (tmp_path / "b" / "relative.safetensors").exists()


@pytest.fixture
def immutable(tmp_path: Path) -> Iterator[Path]:
    """A directory whose files can be made immutable, with ``chattr +i``."""
    probe = tmp_path / "probe"
    probe.write_text("")
    tool = shutil.which("chattr")
    if tool is None or subprocess.run([tool, "+i", probe], capture_output=True).returncode != 0:
        pytest.skip("files cannot be made immutable here: it takes chattr, root and a file system that can")
    subprocess.run([tool, "-i", probe], check=True)
    probe.unlink()
    yield tmp_path
    subprocess.run([tool, "-R", "-i", tmp_path], check=True)


def chattr(flag: str, path: Path) -> None:
    subprocess.run(["chattr", flag, path], check=True)


def test_what_cannot_be_removed_is_told_and_nothing_is_lost(immutable: Path) -> None:
    with mt.Checkpointer(immutable, keep=1) as checkpoints:
        first = Path(checkpoints.save(state_of(1), 1).path)
        chattr("+i", first)
        with pytest.raises(NotRemovedError, match=r"saved and visible, but .*step-0000000001") as raised:
            checkpoints.save(state_of(2), 2)
        error = raised.value
        assert error.filename == str(immutable / "step-0000000002.safetensors")
        assert error.filename2 == str(first)
        assert error.errno == errno.EPERM
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.load()["a"][0] == 2
        saving = checkpoints.save_async(state_of(3), 3)
        for _ in range(2):
            with pytest.raises(NotRemovedError):
                saving.wait()
        with pytest.raises(PermissionError, match="step-0000000001"):
            checkpoints.remove(1)
        assert checkpoints.steps() == [1, 3]
        chattr("-i", first)
        assert checkpoints.remove(1) is True
        assert checkpoints.remove(1) is False
        assert checkpoints.steps() == [3]


def test_on_a_read_only_file_system_nothing_is_removed_and_that_is_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    view = tmp_path / "view"
    view.mkdir()
    mt.Checkpointer(run).save(state_of(1), 1)
    bind = ["mount", "--bind", str(run), str(view)]
    for command in (bind, ["mount", "-o", "remount,bind,ro", str(view)]):
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("mounting a directory read-only needs root")
    try:
        checkpoints = mt.Checkpointer(view)
        with pytest.raises(OSError, match="step-0000000001") as raised:
            checkpoints.remove(1)
        assert raised.value.errno == errno.EROFS
        assert checkpoints.load()["a"][0] == 1
        assert checkpoints.remove(2) is False
    finally:
        subprocess.run(["umount", "-l", view], check=True)


def test_a_new_run_in_an_old_directory_is_resumed_and_warned_of_once(tmp_path: Path) -> None:
    with mt.Checkpointer(tmp_path) as old:
        for step in (400, 500):
            old.save(state_of(step), step)
    with mt.Checkpointer(tmp_path) as new:
        with pytest.warns(StepWarning, match=r"step 100 is below step 500.*remove\(500\)") as told:
            assert new.save(state_of(100), 100).below == 500
        assert [warning.filename for warning in told] == [__file__]
        # Once, and pytest has made errors of warnings.
        saving = new.save_async(state_of(110), 110)
        assert saving.wait().below == 500
        assert new.latest() == 110
    # Killed, and begun again.
    with mt.Checkpointer(tmp_path) as again:
        assert (again.latest(), again.steps()) == (110, [100, 110, 400, 500])
        assert again.load()["a"][0] == 110
        with pytest.warns(StepWarning, match="step 120 is below step 500"):
            again.save_async(state_of(120), 120).wait()
        assert again.load()["a"][0] == 120
        assert again.remove(500)
        assert again.remove(400)
        assert again.save(state_of(130), 130).below is None
    with mt.Checkpointer(tmp_path) as last, warnings.catch_warnings(record=True) as told_now:
        last.save(state_of(140), 140)
    assert told_now == []


@pytest.mark.parametrize("shards", [None, "8KB"])
def test_the_latest_is_loaded_beside_a_process_that_saves_it_over_and_over(
    tmp_path: Path, shards: str | None
) -> None:
    code = """
import sys, numpy as np, maptensors as mt
options = {"max_shard_size": sys.argv[2]} if sys.argv[2] else {}
with mt.Checkpointer(sys.argv[1], keep=1, durable=False, **options) as checkpoints:
    for step in range(200):
        checkpoints.save({"a": np.full(1000, float(step)), "b": np.full(1000, float(step))}, step)
        if step == 0:
            print("begun", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path, shards or ""], stdout=subprocess.PIPE, text=True
    ) as saver:
        assert saver.stdout is not None
        assert saver.stdout.readline() == "begun\n"
        checkpoints = mt.Checkpointer(tmp_path)
        loads, before = 0, -1.0
        while saver.poll() is None or loads == 0:
            assert checkpoints.steps() != []
            loaded = checkpoints.load()
            assert len(set(loaded["a"]) | set(loaded["b"])) == 1
            assert loaded["a"][0] >= before
            before = loaded["a"][0]
            loads += 1
    assert saver.returncode == 0
    assert checkpoints.load()["a"][0] == 199


def test_a_sharded_model_is_opened_beside_a_process_that_saves_it_over_and_over(tmp_path: Path) -> None:
    code = """
import sys, numpy as np, maptensors as mt
for value in range(250):
    state = {str(i): np.full(100, float(value)) for i in range(8)}
    mt.save(state, sys.argv[1] + "/model.safetensors", max_shard_size=800, durable=False)
    if value == 0:
        print("begun", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as saver:
        assert saver.stdout is not None
        assert saver.stdout.readline() == "begun\n"
        while saver.poll() is None:
            for place in (tmp_path, tmp_path / "model.safetensors.index.json"):
                model = mt.open(place)
                assert len({value for tensor in model.values() for value in tensor.numpy()}) == 1
    assert saver.returncode == 0


def test_a_first_publication_that_fails_is_not_listed_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAPTENSORS_SHARE_DIR", str(tmp_path / "names"))
    with pytest.raises(TypeError, match="w is a builtins"):
        mt.publish("policy", {"w": object()})
    with pytest.raises((TypeError, mt.MapTensorsError)):
        mt.publish("policy", {"w": np.array(["text"])})
    with pytest.raises(ZeroDivisionError), mt.publish("policy") as publisher:
        publisher.publish({"w": np.ones(3) * (1 // 0)})
    assert mt.publications() == []
    assert names_in(tmp_path / "names") == []
    with pytest.raises((TypeError, mt.MapTensorsError)):
        mt.publish(tmp_path / "a/b", {"w": np.array(["text"])})
    assert names_in(tmp_path) == ["names"]
    # What is there stays as it was.
    mt.publish("policy", {"w": np.ones(3)}).close()
    before = mt.publications()
    with pytest.raises((TypeError, mt.MapTensorsError)):
        mt.publish("policy", {"w": np.array(["text"])})
    assert mt.publications() == before
    assert mt.attach("policy").model["w"].numpy().tolist() == [1, 1, 1]


def test_permissions_open_a_directory_that_is_there(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir(mode=0o700)
    mt.publish(place, {"w": np.ones(3)}, permissions=0o644).close()
    assert place.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in place.iterdir()} == {0o644}
