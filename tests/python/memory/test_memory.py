"""What saving takes beyond the state that is saved."""

import subprocess
import sys
from pathlib import Path

import pytest
from support import in_group, limit, limited

MIB = 1 << 20
STATE = 256

CODE = f"""
import sys
import numpy as np, maptensors as mt, maptensors.numpy

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

how, out = sys.argv[1:]
count = 16
state = {{f"w{{i}}": np.full({STATE} * {MIB} // count // 4, i, np.float32) for i in range(count)}}
sys.stdout.write(f"{{anonymous()}}\\n")
sys.stdout.flush()
sys.stdin.readline()  # from now on there is a limit
if how == "save":
    mt.save(state, out)
elif how == "unmapped":
    mt.save(state, out, mapped=False)
elif how == "sharded":
    mt.save(state, out, max_shard_size={STATE * MIB // 4})
elif how == "drop-in":
    maptensors.numpy.save_file(state, out)
elif how == "generator":
    spec = {{name: ("F32", array.shape) for name, array in state.items()}}
    with mt.create(out, spec) as draft:
        draft.fill((name, array + 1) for name, array in state.items())
elif how == "checkpoints":
    with mt.Checkpointer(out, keep=1, durable=False) as checkpoints:
        for step in range(4):
            checkpoints.save(state, step)
            checkpoints.save_async(state, step + 10).wait()
elif how == "twice":
    # Shows that the limit bites: a serializer's copy of the state.
    copy = b"".join(array.tobytes() for array in state.values())
print("done")
"""


def run(how: str, out: Path) -> subprocess.CompletedProcess[str]:
    """Save a state in a process that has the state's memory and 64 MiB, and not a byte more."""
    with limited() as group:
        command = (sys.executable, "-c", CODE, how, str(out))
        child = subprocess.Popen(
            in_group(group, *command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        anonymous = int(child.stdout.readline())
        assert anonymous > STATE * MIB
        extra = 64 + (STATE // 16 if how == "generator" else 0)
        # Kernel memory (page tables, inodes) is charged as well.
        limit(group, anonymous + extra * MIB)
        output, errors = child.communicate("\n", timeout=300)
        return subprocess.CompletedProcess(child.args, child.returncode, output, errors)


@pytest.mark.parametrize("how", ["save", "unmapped", "sharded", "drop-in", "generator", "checkpoints"])
def test_no_save_takes_more_than_64_mib_beyond_the_state(tmp_path: Path, how: str) -> None:
    done = run(how, tmp_path / ("run" if how == "checkpoints" else "out.safetensors"))
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_serializers_copy_would_not_fit(tmp_path: Path) -> None:
    assert run("twice", tmp_path / "out").returncode == -9
