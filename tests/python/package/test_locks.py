"""Nobody waits for a lock whose holder waits for them. Each test is a process that would hang."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

QUEUE = """
import sys, warnings
import numpy as np, maptensors as mt
warnings.simplefilter("ignore", mt.errors.StepWarning)
run = mt.Checkpointer(sys.argv[1], max_shard_size=100)
large = {"a": np.zeros(80, np.uint8), "b": np.zeros(80, np.uint8)}
small = {"a": np.zeros(50, np.uint8)}
for step in range(20):
    run.save(large, step)  # in shards
    run.save_async(small, step)  # one file, which takes their place
    run.save_async(large, 1000 + step)  # locks the directory while the one before is under way
run.close()
print("done")
"""

THREADS = """
import sys, threading
import numpy as np, maptensors as mt
state = {name: np.zeros(1 << 20, np.uint8) for name in "abcd"}
def save(name):
    for _ in range(10):
        mt.save(state, sys.argv[1] + "/" + name, max_shard_size=1 << 20, durable=False)
threads = [threading.Thread(target=save, args=(f"{name}.safetensors",)) for name in "xyz"]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print("done")
"""

FORKS = """
import os, sys, threading, warnings
import numpy as np, maptensors as mt
warnings.simplefilter("ignore", DeprecationWarning)
state, over = {"a": np.zeros(10, np.uint8)}, threading.Event()
def save(name):
    while not over.is_set():
        mt.save(state, sys.argv[1] + "/" + name, durable=False)
threads = [threading.Thread(target=save, args=(name,)) for name in "xyz"]
[thread.start() for thread in threads]
for _ in range(300):
    child = os.fork()
    if child == 0:
        mt.save(state, sys.argv[1] + "/child", durable=False)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
over.set()
[thread.join() for thread in threads]
print("done")
"""

ORPHAN = """
import os, signal, sys
import numpy as np, maptensors as mt
large = {"a": np.zeros(80 << 20, np.uint8), "b": np.zeros(80 << 20, np.uint8)}
run = mt.Checkpointer(sys.argv[1], max_shard_size=100 << 20)
run.save_async(large, 1)  # the directory is locked until this is done
if os.fork() == 0:
    signal.pause()  # as a worker that outlives its trainer
os.kill(os.getpid(), signal.SIGKILL)
"""


def done(code: str, path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=100)
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr


@pytest.mark.parametrize("code", [QUEUE, THREADS, FORKS], ids=["queue", "threads", "forks"])
def test_nobody_waits_for_ever(tmp_path: Path, code: str) -> None:
    done(code, tmp_path)


def test_a_worker_that_outlives_its_trainer_keeps_no_directory_locked(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN, tmp_path], start_new_session=True) as killed:
        assert killed.wait(100) == -9
        try:
            again = QUEUE.replace("range(20)", "range(1)")
            done(again, tmp_path)
        finally:
            os.killpg(killed.pid, signal.SIGKILL)
