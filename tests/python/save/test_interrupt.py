"""Ctrl-C in what takes long: seen soon, nothing unfinished left, the old file as it was.

Each save is in a process of its own, which is sent SIGINT while it copies, or in fsync(2).
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import maptensors as mt
import numpy as np
import pytest
from support import ROOT, names_in

#: Many times the same memory: long to write, and little to hold.
SETUP = """
import os, signal, sys, threading, time
import numpy as np
import maptensors as mt
import maptensors.numpy

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
directory = sys.argv[1]
path = os.path.join(directory, "model.safetensors")
same = np.ones(16 << 20, "float32")
large = {f"t{i:02}": same[i:] for i in range(16)}  # each another tensor, also to a Checkpointer
small = {"w": np.ones(8 << 20, "float32")}


def interrupted(work):
    print("ready", flush=True)
    try:
        work()
    except KeyboardInterrupt:
        print(*sorted(os.listdir(directory)), flush=True)
    else:
        print("went on to its end", flush=True)
    os._exit(0)  # what is still in fsync(2) is not waited for
"""


def child(code: str, directory: Path, *, under: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*under, sys.executable, "-c", SETUP + textwrap.dedent(code), str(directory)],
        cwd=ROOT,
        env=os.environ | {"PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(check: Callable[[], object], process: subprocess.Popen[str]) -> None:
    for _ in range(60_000):
        if check():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    pytest.fail("it never came so far")


def listed(process: subprocess.Popen[str]) -> list[str]:
    """What the child found in its directory when it was interrupted."""
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, ""), out
    return out.split("\n")[-2].split()


def old_file(directory: Path) -> Path:
    path = directory / "model.safetensors"
    mt.save({"old": np.arange(5)}, path)
    return path


def is_unfinished(directory: Path, process: subprocess.Popen[str]) -> bool:
    """Whether a process has a file of a directory open that has no name yet, or not its own."""
    names = []
    for fd in os.listdir(f"/proc/{process.pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(f"/proc/{process.pid}/fd/{fd}"))
    inside = [name for name in names if name.startswith(f"{directory}/")]
    return any(name.endswith("(deleted)") or "/.maptensors-" in name for name in inside)


#: Each is interrupted while it copies.
SAVES = {
    "save": "mt.save(large, path)",
    "not mapped": "mt.save(large, path, mapped=False)",
    "save_file": "maptensors.numpy.save_file({k: v.copy() for k, v in list(large.items())[:12]}, path)",
    "in shards": "mt.save(large, path, max_shard_size='500MB')",
    "checkpoint": "mt.Checkpointer(directory).save(large, 1)",
    "async": "mt.Checkpointer(directory).save_async(large, 1)",
}


@pytest.mark.parametrize("way", SAVES)
def test_ctrl_c_while_copying_raises_and_leaves_the_old_file_alone(
    tmp_path: Path, at_random: random.Random, way: str
) -> None:
    old = old_file(tmp_path)
    before = old.read_bytes()
    process = child(f"interrupted(lambda: {SAVES[way]})", tmp_path)
    until(lambda: is_unfinished(tmp_path, process), process)
    time.sleep(at_random.uniform(0, 0.1))
    process.send_signal(signal.SIGINT)
    assert listed(process) == ["model.safetensors"]
    assert old.read_bytes() == before
    assert names_in(tmp_path) == ["model.safetensors"]


needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


def in_fsync(code: str, directory: Path, trace: Path) -> tuple[subprocess.Popen[str], int]:
    """A tracer whose child's first fsync(2) takes 20 seconds, and the child's id, once it does."""
    delayed = ("-e", "trace=fsync", "-e", "inject=fsync:delay_enter=20000000:when=1")
    process = child(code, directory, under=("strace", "-f", "-qq", "-o", str(trace), *delayed))
    until(lambda: trace.exists() and "fsync(" in trace.read_text(), process)
    thread = Path(f"/proc/{trace.read_text().split()[0]}/status").read_text()
    return process, int(next(line.split()[1] for line in thread.splitlines() if line.startswith("Tgid")))


@needs_strace
@pytest.mark.parametrize(
    "work",
    [
        "mt.save(small, path)",
        "mt.save({'w': small['w'].reshape(2, -1).T}, path)",
        "mt.save(small, path, max_shard_size='32MB')",
        "draft_of_small().commit()",
        "mt.Checkpointer(directory).save(small, 1)",
    ],
    ids=["save", "strided", "in shards", "draft", "checkpoint"],
)
def test_ctrl_c_in_fsync_is_not_kept_waiting(tmp_path: Path, work: str) -> None:
    directory = tmp_path / "models"
    directory.mkdir()
    old = old_file(directory)
    before = old.read_bytes()
    code = f"""
    def draft_of_small():
        draft = mt.create(path, small)
        draft.fill(small)
        return draft

    interrupted(lambda: {work})
    """
    process, leader = in_fsync(code, directory, tmp_path / "trace")
    os.kill(leader, signal.SIGINT)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    os.kill(leader, signal.SIGKILL)
    process.kill()  # the tracer, which would wait
    assert lines == ["ready\n", "model.safetensors\n"]
    process.communicate(timeout=120)
    assert old.read_bytes() == before
    assert names_in(directory) == ["model.safetensors"]


@needs_strace
@pytest.mark.parametrize("work", ["saving.wait()", "checkpoints.wait()", "checkpoints.close()"])
def test_a_save_in_the_background_goes_on_when_waiting_for_it_is_interrupted(
    tmp_path: Path, work: str
) -> None:
    directory = tmp_path / "checkpoints"
    code = f"""
    checkpoints = mt.Checkpointer(directory, prepare=False)
    saving = checkpoints.save_async(small, 1)
    try:
        {work}
    except KeyboardInterrupt:
        print(saving.done(), flush=True)
    assert saving.wait().step == 1
    print(*checkpoints.steps(), flush=True)
    """
    process, leader = in_fsync(code, directory, tmp_path / "trace")
    os.kill(leader, signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "False\n"
    process.kill()  # the tracer alone: the call goes on at once
    out, err = process.communicate(timeout=120)
    assert (out, err) == ("1\n", "")


def test_what_was_interrupted_can_be_saved_again(tmp_path: Path) -> None:
    """Staging is stalled by who is told how far it is, who presses Ctrl-C as well."""
    process = child(
        """
        told = []

        def stall(done, total):
            told.append(done)
            if len(told) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

        checkpoints = mt.Checkpointer(directory, progress=stall)
        for save in (checkpoints.save, checkpoints.save_async):
            told.clear()
            try:
                save({"w": same, "v": same}, 1)
                print("went on to its end")
            except KeyboardInterrupt:
                assert max(told) < same.nbytes, told  # not half of it
                print(*os.listdir(directory))
        told[:] = range(9)
        checkpoints.save({"w": same}, 2)
        print(*checkpoints.steps())
        """,
        tmp_path,
    )
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, ""), out
    assert out == "\n\n2\n"


@pytest.mark.parametrize("work", ["mt.verify(path)", "mt.diff(path, other)", "mt.open(path, verify='all')"])
def test_ctrl_c_in_what_only_reads_is_seen(tmp_path: Path, at_random: random.Random, work: str) -> None:
    """Stalled by reading the same long file again and again."""
    size = 8 << 20
    mt.save({"w": np.ones(size, "float32")}, tmp_path / "other.safetensors", checksums=True)
    shutil.copy(tmp_path / "other.safetensors", tmp_path / "model.safetensors")
    process = child(
        f"""
        other = os.path.join(directory, "other.safetensors")

        def work():
            while True:
                {work}

        interrupted(work)
        """,
        tmp_path,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(at_random.uniform(0.05, 0.2))
    process.send_signal(signal.SIGINT)
    assert listed(process) == ["model.safetensors", "other.safetensors"]
