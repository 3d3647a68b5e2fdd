"""What a child of fork(2) has of what its parent is writing: nothing that it could change until it is done.

Each test is a process of its own, which forks.
"""

from pathlib import Path

import pytest
from support import names_in, succeed

#: What every child may ask: which memory reaches a file, and which files of a directory it has open.
SETUP = """
import contextlib, os, signal, sys, time
import numpy as np
import maptensors as mt

directory = sys.argv[1]
path = os.path.join(directory, "model.safetensors")

def shared():
    with open("/proc/self/maps") as maps:
        return [line for line in maps if line.split()[1] == "rw-s" and directory in line]

def opened():
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    inside = [name for name in found if name.startswith(directory + "/")]
    return [name for name in inside if not name.endswith(("/control", "/p"))]

def forked(work):
    '''The status of a child that does this.'''
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def refused(work):
    try:
        work()
    except mt.MapTensorsError as error:
        assert "belongs to another process" in str(error), error
    else:
        raise AssertionError("done in a fork's child")
"""


def test_a_childs_writes_to_a_drafts_array_do_not_reach_the_committed_file(tmp_path: Path) -> None:
    succeed(
        SETUP
        + """
draft = mt.create(path, {"w": ("F32", (100_000,)), "t": ("U8", (3, 1000))})
array = draft["w"].numpy()
array[:] = 1
start, go = os.pipe()
child = os.fork()
if child == 0:
    os.close(go)
    signal.alarm(60)
    # What the child maps from now on must not come to lie there.
    others = [np.full(n, 9, "uint8") for n in range(100_000, 3_000_000, 50_000)]
    os.read(start, 1)
    array[:] = 2
    os._exit(0)
draft.commit()
reader = mt.open(path)["w"].numpy()
os.write(go, b".")
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV
assert (reader == 1).all() and (array == 1).all()
assert (mt.open(path)["w"].numpy() == 1).all()
""",
        tmp_path,
    )


def test_after_the_commit_a_child_has_the_arrays_and_its_writes_stay_its_own(tmp_path: Path) -> None:
    succeed(
        SETUP
        + """
draft = mt.create(path, {"w": ("F32", (100_000,))})
array = draft["w"].numpy()
array[:] = 1
assert shared()
draft.commit()
assert not shared()

def child():
    assert not shared()
    assert (array == 1).all()
    array[:] = 2
    assert (array == 2).all()
    assert (mt.open(path)["w"].numpy() == 1).all()

assert forked(child) == 0
assert (array == 1).all()
assert (mt.open(path)["w"].numpy() == 1).all()
""",
        tmp_path,
    )


@pytest.mark.parametrize("mapped", [True, False])
def test_a_draft_is_committed_by_the_process_that_made_it(tmp_path: Path, mapped: bool) -> None:
    succeed(
        SETUP
        + f"""
draft = mt.create(path, {{"w": ("F32", (1000,))}}, mapped={mapped})
array = draft["w"].numpy()
array[:] = 1

def child():
    assert not shared() and not opened(), (shared(), opened())
    refused(draft.commit)
    refused(lambda: draft["w"])
    refused(lambda: draft.fill({{"w": np.zeros(1000, "float32")}}))

    def assign():
        draft["w"] = np.zeros(1000, "float32")

    refused(assign)
    draft.close()

def leave():
    global draft
    del draft

assert forked(child) == 0
assert forked(leave) == 0
assert os.listdir(directory) == []
draft.commit()
assert (mt.open(path)["w"].numpy() == 1).all()
""",
        tmp_path,
    )
    assert names_in(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("shards", [None, 1_000_000])
def test_a_child_of_a_save_that_brings_its_tensors_has_nothing_of_the_output(
    tmp_path: Path, shards: int | None
) -> None:
    """Strided arrays are written by numpy, straight into the output: a child is forked meanwhile."""
    succeed(
        SETUP
        + f"""
shards = {shards}
"""
        + """
statuses = []

def told(done, total):
    def child():
        assert not shared() and not opened(), (shared(), opened())
    if not statuses:
        assert shared() and opened()
        statuses.append(forked(child))

state = {"a": np.ones((300, 1000)).T, "b": np.ones((1000, 300)).T}
with mt.Checkpointer(directory, keep=1, progress=told, max_shard_size=shards) as checkpoints:
    for step in range(1, 4):
        statuses.clear()
        checkpoints.save(state, step)
        assert statuses == [0], statuses
        checkpoints.wait()
""",
        tmp_path,
    )
    assert len(names_in(tmp_path)) == (1 if shards is None else 3)


def test_a_save_under_way_is_waited_for_by_the_process_that_began_it(tmp_path: Path) -> None:
    succeed(
        SETUP
        + """
checkpoints = mt.Checkpointer(directory, keep=1)
state = {"w": np.ones(1_000_000)}
saving = checkpoints.save_async(state, 1)

def child():
    refused(saving.wait)
    refused(checkpoints.wait)
    refused(lambda: checkpoints.save(state, 2))
    refused(lambda: checkpoints.remove(1))
    assert not saving.done()
    checkpoints.close()

assert forked(child) == 0
assert saving.wait().step == 1
assert forked(child) == 0
checkpoints.close()
assert checkpoints is not None and mt.Checkpointer(directory).steps() == [1]
""",
        tmp_path,
    )


def test_checkpoints_are_used_again_while_workers_live(recycling: Path) -> None:
    succeed(
        SETUP
        + """
import multiprocessing

def work(ready):
    assert not shared() and not opened(), (shared(), opened())
    ready.send(True)
    time.sleep(1000)

context = multiprocessing.get_context("fork")
with mt.Checkpointer(directory, keep=1) as checkpoints:
    state = {"w": np.ones(100_000)}
    checkpoints.save(state, 1)
    checkpoints.wait()
    workers = []
    for _ in range(2):
        answer, ready = context.Pipe(False)
        workers.append(context.Process(target=work, args=(ready,), daemon=True))
        workers[-1].start()
        ready.close()
        assert answer.recv()
    outputs = [checkpoints.save(state, step).output for step in range(2, 7)]
    assert outputs == ["prepared", *["recycled"] * 4], outputs
    for worker in workers:
        worker.kill()
        worker.join()
""",
        recycling,
    )


def test_a_publisher_is_the_process_that_opened_it(tmp_path: Path) -> None:
    succeed(
        SETUP
        + """
place = os.path.join(directory, "p")
state = {"w": np.ones(100_000, "float32")}
publisher = mt.publish(place, state)

def child():
    assert not shared() and not opened(), (shared(), opened())
    refused(lambda: publisher.publish(state))
    refused(publisher.remove)

assert forked(child) == 0
publisher.publish(state)
publisher.remove()
""",
        tmp_path,
    )
