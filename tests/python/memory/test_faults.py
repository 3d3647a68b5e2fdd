"""What becomes of a model whose file is changed under it: every documented outcome, in a process of its own.

The table is the one in the documentation of ``OpenOptions::guard``.
"""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import maptensors as mt
import pytest
from support import ROOT, run_python

#: What the file holds, and what each change leaves: 1 old, 2 overwritten, 3 of the file renamed over it,
#: 4 edited, 0 a hole.
CHILD = """
import os, sys
import numpy as np
import maptensors as mt

stage, event, directory = sys.argv[1:]
path, other, target = (os.path.join(directory, name) for name in ("model", "other", "target"))
COUNT = 1 << 18

for name, value in ((path, 1), (other, 3), (target, 7)):
    same = np.full(COUNT, value, "float32")
    mt.save({"a": same, "b": same}, name, durable=False)
os.utime(path, ns=(10**18, 10**18))  # long ago: a change within a tick of the clock shows
START = mt.open(path).info("a").offset
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2


def change():
    if event == "truncate":
        os.truncate(path, START)
    elif event == "punch":
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        fd = os.open(path, os.O_WRONLY)
        mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        assert libc.fallocate(fd, mode, START, 8 * COUNT) == 0, os.strerror(ctypes.get_errno())
    elif event == "overwrite":
        with open(path, "r+b") as file:
            file.seek(START)
            file.write(np.full(2 * COUNT, 2, "float32"))
    elif event == "rename":
        os.rename(other, path)
    elif event == "unlink":
        os.unlink(path)
    else:
        assert event == "nothing"


NAMES = {0: "zeros", 1: "old", 2: "new", 3: "other", 4: "edited", 7: "untouched"}


def values(array):
    return " ".join(NAMES[int(value)] for value in array)


def far(array):
    \"\"\"Elements that no edit is near.\"\"\"
    return values([array[COUNT // 2], array[-1]]).split()[0]


def say(*words):
    print("->", *words, flush=True)
    sys.exit()


options = {"guard": True} if "guard" in stage else {}
options |= {"backend": name for name in ("pread", "memfd") if name in stage}
options |= {"mode": "r+"} if "r+" in stage else {}
try:
    if stage == "before opening":
        change()
        say(far(mt.open(path)["a"].numpy()))
    model = mt.open(path, **options)
    if "save" in stage:
        # One tensor is written, then the file changes, then the other is taken.
        def tensors():
            yield "a", model["a"]
            change()
            yield "b", model["b"]

        with mt.create(target, {name: model[name] for name in model}) as draft:
            draft.fill(tensors())
        saved = mt.open(target)
        say(far(saved["a"].numpy()), far(saved["b"].numpy()))
    if "Tensor" in stage:
        tensor = model["a"]
        change()
        say(far(tensor.numpy()))
    if "untouched" in stage:
        change()
        say(far(model["a"].numpy()))
    view = model["a"].numpy()
    assert far(view) == "old"
    if "edited" in stage:
        view[:10] = 4
        change()
        say(values([view[0], view[20]]), far(view))  # an edit, its neighbour in the page, another page
    if stage == "written with r+":
        view[:10] = 4
        change()
        # The file is the memory; what has its path now is another one, or none.
        here = far(view)
        view[-1] = 4
        found = os.path.exists(path) and far(mt.open(path, "r")["a"].numpy()[:-1])
        last = os.path.exists(path) and values(mt.open(path, "r")["a"].numpy()[-1:])
        say(values(view[:1]), here, "at the path:", found or "nothing", last or "nothing")
    change()
    if "view" in stage:
        say(far(view))
    say(far(model["a"].numpy()))
except Exception as error:
    say(type(error).__name__)
"""

EVENTS = ("truncate", "punch", "overwrite", "rename", "unlink")
OLD = ("old",) * 5

OUTCOMES = {
    "before opening": ("TruncatedError", "zeros", "new", "other", "FileNotFoundError"),
    # Opened, and never touched.
    "untouched": ("SIGBUS", "zeros", "new", "old", "old"),
    # A view that was read before.
    "view": ("SIGBUS", "zeros", "new", "old", "old"),
    # A view that was written before: an edit, an element of the same page, an element far away.
    "edited": (
        "SIGBUS",
        "edited old zeros",
        "edited old new",
        "edited old old",
        "edited old old",
    ),
    "untouched, guard": ("ChangedError", "ChangedError", "ChangedError", "old", "old"),
    "touched, guard": ("ChangedError", "ChangedError", "ChangedError", "old", "old"),
    # Not yet an array: it asks when it becomes one.
    "Tensor": ("SIGBUS", "zeros", "new", "old", "old"),
    "Tensor, guard": ("ChangedError", "ChangedError", "ChangedError", "old", "old"),
    # What is out is out.
    "view, guard": ("SIGBUS", "zeros", "new", "old", "old"),
    "untouched, pread": OLD,
    "view, pread": OLD,
    "edited, pread": ("edited old old",) * 5,
    "untouched, memfd": OLD,
    "view, memfd": OLD,
    "edited, memfd": ("edited old old",) * 5,
    "untouched, r+": ("SIGBUS", "zeros", "new", "old", "old"),
    "view, r+": ("SIGBUS", "zeros", "new", "old", "old"),
    # An edit, an element far away, and what a reader of the path sees of both.
    "written with r+": (
        "SIGBUS",
        "zeros zeros at the path: zeros edited",
        "new new at the path: new edited",
        "edited old at the path: other other",
        "edited old at the path: nothing nothing",
    ),
    "untouched, r+, guard": ("ChangedError", "zeros", "new", "old", "old"),
    # The first tensor was saved before, the second after.
    "save": ("SIGBUS", "old zeros", "old new", "old old", "old old"),
    "save, guard": ("ChangedError", "ChangedError", "ChangedError", "old old", "old old"),
    "save, pread": ("old old",) * 5,
    "save, memfd": ("old old",) * 5,
}


def outcome(stage: str, event: str, directory: Path) -> str:
    done = run_python(CHILD, stage, event, directory)
    if done.returncode == -signal.SIGBUS:
        return "SIGBUS"
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    [said] = re.findall(r"^-> (.*)$", done.stdout, re.MULTILINE)
    return said


@pytest.fixture
def disk(tmp_path_factory):
    """A directory on the disk the tests are on: the default one may be a tmpfs."""
    directory = ROOT / "target" / "faults" / tmp_path_factory.mktemp("x").name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    yield directory
    shutil.rmtree(directory)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("stage", OUTCOMES)
def test_a_file_changed_under_a_model_does_what_the_documentation_says(stage, event, disk):
    assert outcome(stage, event, disk) == OUTCOMES[stage][EVENTS.index(event)]
    if stage.startswith("save") and (disk / "target").exists():
        # A save that did not come to its end left the file before, whole.
        saved = mt.open(disk / "target")
        if OUTCOMES[stage][EVENTS.index(event)] in ("SIGBUS", "ChangedError"):
            assert {float(value) for name in saved for value in saved[name].numpy()[::1000]} == {7.0}


def test_the_table_in_the_documentation_is_the_one_tested_here():
    text = (ROOT / "src/model/guard.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    assert rows[0][1:] == ["truncated", "hole punched", "overwritten", "renamed over", "unlinked"]
    documented = {row[0]: tuple(row[1:]) for row in rows[1:]}
    plain = {"TruncatedError": "`Truncated`", "FileNotFoundError": "not found", "ChangedError": "`Changed`"}
    plain |= {"SIGBUS": "`SIGBUS`", "other": "the other's bytes", "zeros": "zeros"}
    plain |= {"old": "old bytes", "new": "new bytes"}
    for row, stage in {
        "before opening": "before opening",
        "opened, not touched": "untouched",
        "a view that is out": "view",
        "guarded, at the next access": "touched, guard",
        "guarded, a `Tensor` of Python's that is out": "Tensor, guard",
        "guarded, a view that is out": "view, guard",
        "`pread`, `memfd`": "view, pread",
        "`r+`": "untouched, r+",
        "`r+`, guarded, at the next access": "untouched, r+, guard",
    }.items():
        assert documented.pop(row) == tuple(plain[said] for said in OUTCOMES[stage]), row
    assert {row for row in documented if not row.startswith("edit")} == set()
    assert documented == {
        "edited pages": ("`SIGBUS`, edits lost", *("edits and old bytes",) * 4),
        "edited, other pages": tuple(plain[said] for said in OUTCOMES["view"]),
    }


#: What a `Tensor` is taken for, each an access; the file is cut off before.
WAYS = """
import os, sys
import jax, numpy as np, torch
import maptensors as mt

path = sys.argv[1]
saved = {name: np.ones((512, 512), "float32") for name in "ab"}
mt.save(saved, path, durable=False)
whole = os.stat(path).st_size
ways = {
    "numpy": lambda tensor: tensor.numpy(),
    "torch": lambda tensor: tensor.torch(),
    "jax": lambda tensor: tensor.jax(),
    "array": np.asarray,
    "from_dlpack": np.from_dlpack,
    "torch.from_dlpack": torch.from_dlpack,
    "buffer": memoryview,
    "tobytes": lambda tensor: tensor.tobytes(),
    "bytes": bytes,
    "assignment": lambda tensor: tensor.__setitem__(..., 2),
    "assignment of a part": lambda tensor: tensor.__setitem__(0, 2),
    "assigned": lambda tensor: other["a"].__setitem__(slice(len(tensor)), tensor),
    "a part": lambda tensor: tensor[1].numpy(),
    "a part backwards": lambda tensor: tensor[::-1, ::2].numpy(),
    "another dtype": lambda tensor: tensor.view("I32").numpy(),
    "saved": lambda tensor: mt.save({"a": tensor}, path + ".saved", durable=False),
    "serialized": lambda tensor: mt.dumps({"a": tensor}),
}
other = mt.loads(open(path, "rb").read())
for guard, mode in ((True, "c"), (True, "r+")):
    for how, use in ways.items():
        model = mt.open(path, mode, guard=guard)
        tensors = [model["a"], model.rank_view(0, 2, {"*": "column"})["a"], next(model.stream())[1]]
        assert all(tensor.mapped for tensor in tensors)
        # Of a model that is edited in its file there is none.
        gathered = model.rank_view(0, 2, {"*": "row"})["a"] if mode == "c" else None
        for tensor in tensors:
            use(tensor)  # as long as nothing has changed
        del model
        os.truncate(path, 4096)
        for tensor in tensors:
            try:
                use(tensor)
                print(how, mode, "raised nothing")
            except mt.errors.ChangedError as error:
                assert path in str(error), error
        # Memory of the rank's own has nothing to do with the file.
        assert gathered is None or gathered.numpy().size == 512 * 256
        mt.save(saved, path, durable=False)
        assert os.stat(path).st_size == whole
print("done")
"""


def test_a_tensor_of_a_guarded_model_asks_again_however_it_is_taken(disk):
    done = run_python(WAYS, disk / "model")
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.splitlines() == ["done"]


def test_an_unreadable_page_is_an_error_under_a_guard_and_when_populating(tmp_path):
    """On a loop device whose backing file has been cut short: its blocks are EIO."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("mounting an image takes root and mkfs.ext4: no unreadable page was tested")
    image, mount = tmp_path / "image", tmp_path / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    mounted = subprocess.run(["mount", "-o", "loop", image, mount], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no loop device: no unreadable page was tested: {mounted.stderr}")
    try:
        code = """
import os, sys
import numpy as np
import maptensors as mt
path, image = sys.argv[1:]
mt.save({"a": np.ones(8 << 20, "uint8")}, path)
with open(path, "rb") as file:
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
model = mt.open(path, guard=True)
open(path + "x", "w").close()
before = os.stat(image).st_size
os.truncate(image, 1 << 20)
for work in (lambda: model["a"], model.numpy, lambda: mt.open(path, populate=True)):
    try:
        work()
        print("nothing raised")
    except OSError as error:
        print(error.errno, error.filename == path)
model.check()  # the file is as it was
os.truncate(image, before)
mt.open(path)["a"].numpy().sum()
"""
        # The filesystem's metadata is in memory; only data blocks are read from the image.
        done = run_python(code, mount / "model", image)
        assert done.stdout.splitlines()[:3] == ["5 True"] * 3, f"{done.stdout}\n{done.stderr}"
    finally:
        subprocess.run(["umount", "-l", mount], check=False)
