"""Pages brought, given back, locked and streamed, and a rank's part of a model."""

import contextlib
import ctypes
import errno
import io
import os
import re
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import maptensors as mt
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from maptensors import plans
from maptensors.errors import LimitError
from support import PAGE, file_offset, in_group, limit, limited, run_python, soon, succeed

MIB = 1 << 20


def make(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "U8") -> Path:
    """A file of random bytes on a disk."""
    rng = np.random.default_rng(7)
    with mt.create(path, {name: (dtype, shape) for name, shape in shapes.items()}) as draft:
        for name in draft:
            raw = np.asarray(draft[name].view("U8"))
            raw.reshape(-1)[:] = rng.integers(0, 256, raw.size, np.uint8)
    return path


def cold(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        for _ in range(3):  # Pages that the kernel is moving about stay.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def is_on_disk(path: Path) -> bool:
    """Whether the file system has another place for pages than memory."""
    kinds = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    at = max((point for point, _ in kinds if path.resolve().is_relative_to(point)), key=len)
    return dict(map(tuple, kinds))[at] not in ("tmpfs", "ramfs")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    if not is_on_disk(tmp_path):
        pytest.skip(f"{tmp_path} is memory: nothing can be given back there")
    return tmp_path


def cached(path: Path) -> int:
    """Bytes of a file in the page cache, by cachestat(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    whole, found = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    with path.open("rb") as file:
        if libc.syscall(451, file.fileno(), whole, found, 0) != 0:
            pytest.skip("this kernel has no cachestat(2)")
    return found[0] * PAGE


def smaps(start: int, end: int) -> dict[str, int]:
    """Sums of the regions between two addresses, in bytes."""
    total: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if header := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = start <= int(header[1], 16) < end
        elif inside and line.endswith(" kB"):
            key, value = line.split(":")
            total[key] = total.get(key, 0) + int(value.split()[0]) * 1024
    return total


@pytest.mark.parametrize("mode", ["r", "c"])
def test_residency_agrees_with_smaps_and_mincore(disk: Path, mode: str) -> None:
    path = make(disk / "m.safetensors", {"a": (5 * MIB,), "b": (9 * MIB,), "c": (3 * MIB + 5,)})
    cold(path)
    model = mt.open(path, mode)
    start = model["a"].data_ptr() - model.info("a").offset
    size = path.stat().st_size
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    in_core = (ctypes.c_ubyte * -(-size // PAGE))()

    def resident() -> int:
        assert mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), in_core) == 0
        return sum(bit & 1 for bit in in_core[model.info("a").offset // PAGE :])

    def check() -> dict[str, int]:
        # The kernel may still be reading ahead: what is resident only grows meanwhile.
        before, pages, after = resident(), model.residency(), resident()
        there = smaps(start, start + size)
        assert pages.touched * PAGE == there["Rss"]
        assert pages.private * PAGE == there["Anonymous"]
        assert pages.huge * PAGE == there["FilePmdMapped"] + there["AnonHugePages"]
        assert pages.locked * PAGE == there["Locked"]
        assert before <= pages.resident <= after
        by_tensor = model.residency_by_tensor()
        assert list(by_tensor) == list(model)
        assert by_tensor["b"].touched == model.residency("b").touched
        return pages

    def looked() -> dict[str, int]:
        """Two looks, between which the kernel took nothing back."""
        found: list[dict[str, int]] = []
        soon(lambda: found.append(check()))
        return found[0]

    assert looked().touched == 0

    # (a page of the header's is in the same huge page, and would be in smaps' account alone)
    def prefetched() -> None:
        model.prefetch("b", wait=True)
        assert check().touched >= 9 * MIB // PAGE

    soon(prefetched)
    if mode == "c":
        array = model["b"].numpy()
        array[:: 100 * PAGE] = 7
        assert looked().private == len(array[:: 100 * PAGE])
        model.promote(["b"])
        looked()
    model.evict("c")
    looked()
    try:
        model.lock("b")
    except mt.MapTensorsError as error:
        pytest.skip(f"locks are not tested: {error}")

    def locked() -> None:
        assert (model["b"].numpy()[::PAGE] >= 0).all()  # touched
        assert check().locked == model.residency("b").pages

    soon(locked)
    model.unlock()
    assert looked().locked == 0


def test_names_are_literal_first_and_then_patterns(tmp_path: Path) -> None:
    path = make(tmp_path / "m.safetensors", {"a.b/c": (4,), "a.x": (4,), "a.*": (4,), "z[0]": (4,)})
    with mt.open(path) as model:
        names = lambda which: list(model.residency_by_tensor(which))  # noqa: E731
        assert set(names("a*")) == {"a.b/c", "a.x", "a.*"}
        assert names("a.*") == ["a.*"]
        assert names("z[0]") == ["z[0]"]
        assert set(names(["*x", "a.b/?", "a.x"])) == {"a.x", "a.b/c"}
        for missing in ("b*", "a.y", ["a.x", "nope"]):
            with pytest.raises(KeyError, match="there is no tensor"):
                model.evict(missing)
        with pytest.raises(TypeError, match="names are"):
            model.lock(7)
        with pytest.raises(mt.MapTensorsError, match="pattern"):
            model.prefetch("a{")


READ = """
import resource, sys
import maptensors as mt, numpy as np
model = mt.open(sys.argv[1])
if sys.argv[2] == "prefetch":
    assert model.prefetch().wait(60)
before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
for tensor in model.values():
    # In leaps, as a read in order is what the kernel reads ahead of.
    blocks = tensor.numpy().reshape(-1, 2 << 20)
    for i in range(len(blocks)):
        blocks[i * 37 % len(blocks)][::4096].sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before)
"""


def test_after_a_prefetch_a_full_read_waits_for_no_page(disk: Path) -> None:
    path = make(disk / "m.safetensors", {"a": (100 * MIB,), "b": (154 * MIB,)})
    cold(path)
    assert int(succeed(READ, path, "prefetch")) <= 256 // 64
    cold(path)
    # The measure measures.
    assert int(succeed(READ, path, "no")) > 256 // 64


def test_a_prefetch_tells_its_progress_and_ends(disk: Path) -> None:
    path = make(disk / "m.safetensors", {"a": (24 * MIB,), "b": (4 * MIB,)})
    told: list[tuple[int, int]] = []
    with mt.open(path) as model:
        prefetch = model.prefetch(wait=True, progress=lambda *now: told.append(now))
        assert prefetch.done
        assert prefetch.wait() is True
        assert prefetch.progress == told[-1] == (28 * MIB, 28 * MIB)
        with model.prefetch("b") as prefetch:
            pass
        assert prefetch.progress == (4 * MIB, 4 * MIB)
        prefetch = model.prefetch()
        prefetch.cancel()
        assert prefetch.wait(60) in (True, False)


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_what_progress_raises_ends_a_prefetch_and_is_raised_where_it_is_waited_for(
    disk: Path, kind: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(disk / "m.safetensors", {f"t{i}": (8 * MIB,) for i in range(16)})
    with mt.open(path) as model:
        total = model.prefetch(wait=True).progress[1]
        # At once, in the midst, and when all is there: `wait()` has not returned before that was told.
        for least in (0, 1, total):

            def tell(done: int, _: int, least: int = least) -> None:
                if done >= least:
                    raise kind("enough")

            model.evict()
            with pytest.raises(kind, match="enough"):
                model.prefetch(wait=True, progress=tell)
            model.evict()
            prefetch = model.prefetch(progress=tell)
            for timeout in (None, 60):  # as often as it is asked
                with pytest.raises(kind, match="enough"):
                    prefetch.wait(timeout)
            assert prefetch.done
            with pytest.raises(kind, match="enough"), model.prefetch(progress=tell):
                pass
        # One that takes its time is waited for as long as was said.
        gate = threading.Event()

        def hold(*_: int) -> None:
            gate.wait()
            raise kind("enough")

        prefetch = model.prefetch("t0", progress=hold)

        def is_there() -> None:
            assert prefetch.done

        soon(is_there)
        assert prefetch.wait(0.1) is True
        gate.set()
        with pytest.raises(kind, match="enough"):
            prefetch.wait()
    assert capsys.readouterr().err == ""


CANCELLED = """
import sys, threading
import maptensors as mt
model = mt.open(sys.argv[1])

def tell(done, total):
    raise KeyboardInterrupt("enough")

def is_cancelled():
    model.evict()
    try:
        model.prefetch(progress=tell).wait()
    except KeyboardInterrupt:
        pass
    return model.residency().touched < model.residency().pages

print(any(is_cancelled() for _ in range(20)))  # where it was told of it in time
# Nobody waits for these: it is said on standard error.
def fail(done, total):
    if done == total:
        gate.wait()
        raise ValueError("later")

gate = threading.Event()
model.prefetch(progress=lambda *_: 1 // 0)
model.prefetch(progress=fail)
gate.set()
for thread in threading.enumerate():
    if thread.name == "maptensors-progress":
        thread.join()
"""


def test_a_prefetch_whose_progress_raises_is_cancelled(disk: Path) -> None:
    path = make(disk / "m.safetensors", {"a": (400 * MIB,)})
    cold(path)
    done = run_python(CANCELLED, path)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert "ValueError: later" in done.stderr


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
def test_what_progress_raises_ends_a_stream_and_is_raised(tmp_path: Path, kind: type[BaseException]) -> None:
    path = make(tmp_path / "m.safetensors", dict.fromkeys("abcd", (MIB,)))

    def tell(done: int, total: int) -> None:
        if done >= 2 * MIB:
            raise kind("enough")

    with mt.open(path) as model:
        stream, seen = model.stream(progress=tell), []
        with pytest.raises(kind, match="enough"):
            seen.extend(name for name, _ in stream)
        # It has ended, and reads nothing ahead any more.
        assert next(stream, None) is None
        assert stream.progress == (0, 0)


class Bars(types.ModuleType):
    """In tqdm's place."""

    def __init__(self) -> None:
        super().__init__("tqdm.auto")
        self.made: list[Any] = []

    def tqdm(self, **options: Any) -> Any:
        bar = types.SimpleNamespace(n=0, closed=False, **options)

        def update(by: int) -> None:
            bar.n += by

        def close() -> None:
            bar.closed = True

        bar.update, bar.close = update, close
        self.made.append(bar)
        return bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO(), None, "closed"])
def test_without_tqdm_a_line_on_stderr_is_the_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: io.StringIO | str | None
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    if isinstance(stream, str):
        stream = io.StringIO()
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    with mt.open(make(tmp_path / "m.safetensors", {"a": (5000,), "b": (3000,)})) as model:
        model.prefetch(wait=True, progress=True)
        for _ in model.stream(progress=True):
            pass
        # Left early: how far it came stays.
        with model.stream(progress=True) as stream_left:
            next(stream_left)
            next(stream_left)
    if stream is None or stream.closed:
        return
    *lines, rest = stream.getvalue().split("\n")
    assert [line.split("\r")[-1].rstrip() for line in lines] == [
        "prefetching: 100%, 7.8 KiB of 7.8 KiB",
        "streaming: 100%, 7.8 KiB of 7.8 KiB",
        "streaming: 62%, 4.9 KiB of 7.8 KiB",
    ]
    assert rest == ""
    assert ("\r" in stream.getvalue()) == stream.isatty()


def test_a_bar_is_shown_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bars = Bars()
    monkeypatch.setitem(sys.modules, "tqdm", types.ModuleType("tqdm"))
    monkeypatch.setitem(sys.modules, "tqdm.auto", bars)
    with mt.open(make(tmp_path / "m.safetensors", {"a": (5000,), "b": (3000,)})) as model:
        model.prefetch(wait=True, progress=True)
        for _ in model.stream(progress=True):
            pass
        model.prefetch(wait=True)
        shown, bars.made = bars.made, []
        # A bar that fails is no reason to read nothing.
        monkeypatch.setattr(bars, "tqdm", lambda **_: 1 // 0)
        assert model.prefetch(progress=True).wait()
        assert len(list(model.stream(progress=True))) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert [(bar.desc, bar.n, bar.total, bar.closed) for bar in shown] == [
        ("prefetching", 8000, 8000, True),
        ("streaming", 8000, 8000, True),
    ]


EXIT = """
import sys, threading
import maptensors as mt
model = mt.open(sys.argv[1])
kept = model.prefetch(progress=lambda *_: None)
model.prefetch()
stream = model.stream(budget="8MiB")
next(stream)
threading.Thread(target=lambda: model.prefetch().wait(), daemon=True).start()
print("bye")
"""


def test_the_interpreter_ends_whatever_is_under_way(disk: Path) -> None:
    path = make(disk / "m.safetensors", {"a": (200 * MIB,), "b": (4 * MIB,)})
    for _ in range(5):
        cold(path)
        assert succeed(EXIT, path, timeout=60) == "bye\n"


FORKED = """
import os, sys
import maptensors as mt
model = mt.open(sys.argv[1])
done = model.prefetch("a", wait=True)
begun = [model.prefetch() for _ in range(200)]
stream = model.stream(budget="2MiB")
next(stream)
child = os.fork()
if child == 0:
    try:
        assert done.wait()
        assert all(prefetch.done for prefetch in begun)
        ended, orphans = 0, 0
        for prefetch in begun:
            try:
                ended += prefetch.wait()
            except mt.errors.MapTensorsError as error:
                assert "forked" in str(error), error
                orphans += 1
        assert ended + orphans == len(begun)
        assert model.prefetch(wait=True).wait()
        assert [name for name, _ in stream] == ["b"]
        del stream
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert all(prefetch.wait() for prefetch in begun)
print("both")
"""


def test_a_forked_child_waits_for_no_thread_of_its_parent(tmp_path: Path) -> None:
    path = make(tmp_path / "m.safetensors", {"a": (8 * MIB,), "b": (8 * MIB,)})
    assert succeed(FORKED, path, timeout=120) == "both\n"


CUT = """
import os, sys
import maptensors as mt
path = sys.argv[1]
model = mt.open(path)
os.truncate(path, 5 << 20)  # against the contract: nobody looks at what is gone
for what in (lambda: model.prefetch("b").wait(), lambda: model.prefetch("b", wait=True)):
    try:
        what()
    except OSError as error:
        assert '"b"' in str(error) and path in str(error), error
        print("told")
again = model.prefetch("b")
for _ in range(2):
    try:
        again.wait()
    except OSError as error:
        print("again")
stream, names = model.stream(budget="2MiB"), []
while True:
    try:
        names.append(next(stream)[0])
    except StopIteration:
        break
    except OSError as error:
        assert '"b"' in str(error), error
        names.append("!")
print(*names)
"""


CUT_PARTS = """
import os, sys
import maptensors as mt
for path in sys.argv[1:]:
    model = mt.open(path)
    if "edited" in path:
        model["a"].numpy()[0, 0] = 1
    os.rename(path, path + ".old")
    os.truncate(path + ".old", 3 << 20)  # against the contract: nobody looks at what is gone
    if "renamed" not in path:
        os.rename(path + ".old", path)
    try:
        model.rank_view(0, 2, {"a": "row"})
    except OSError as error:
        assert '"a"' in str(error), error
        print("told")
"""


def test_a_part_that_cannot_be_read_is_an_exception_and_no_signal(tmp_path: Path) -> None:
    # In their pages lie bytes that were edited, and those of a file that its name no longer leads to.
    names = ["plain", "edited", "renamed", "renamed-edited"]
    paths = [make(tmp_path / name, {"a": (2048, 4096)}) for name in names]
    assert succeed(CUT_PARTS, *paths) == "told\n" * 4


def test_what_cannot_be_read_is_an_exception_and_no_signal(tmp_path: Path) -> None:
    path = make(tmp_path / "m.safetensors", {"a": (4 * MIB,), "b": (4 * MIB,)})
    assert succeed(CUT, path).split() == ["told", "told", "again", "again", "a", "!"]


def test_evicting_frees_memory_and_keeps_edits(disk: Path) -> None:
    path = make(disk / "m.safetensors", {"a": (16 * MIB,), "b": (16 * MIB,)})
    model = mt.open(path)
    array = model["a"].numpy()
    before = array.copy()
    array[5 * MIB] ^= 255
    model.prefetch(wait=True)
    assert cached(path) >= 32 * MIB
    evicted = model.evict("a")
    assert (evicted.freed, evicted.kept, evicted.remaining) == (16 * MIB - PAGE, PAGE, 0)
    assert cached(path) < 17 * MIB
    assert model.residency("a").touched == 1
    before[5 * MIB] ^= 255
    assert (array == before).all()
    assert mt.loads(path.read_bytes()).evict() == (0, 0, 0)


LOCK = """
import ctypes, os, resource, sys
import maptensors as mt
model = mt.open(sys.argv[1])
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
if os.getuid() == 0:
    os.setresuid(65534, 65534, 65534)
    ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: /proc/self is its own again
model.lock("small")
assert model.residency("small").locked > 0
for what in (lambda: model.lock(), lambda: model.prefetch("large", lock=True).wait()):
    try:
        what()
    except mt.MapTensorsError as error:
        print(error)
assert model.residency("small").locked > 0
"""


def test_a_lock_beyond_the_limit_says_what_the_limit_is(tmp_path: Path) -> None:
    path = make(tmp_path / "m.safetensors", {"large": (8 * MIB,), "small": (8 * PAGE,)})
    os.chmod(tmp_path, 0o755)
    lines = succeed(LOCK, path).splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "RLIMIT_MEMLOCK" in line
        assert "1048576" in line
        assert "ulimit -l" in line


LOCK_FIVE = """
import ctypes, os, resource, sys
import maptensors as mt
model = mt.open(sys.argv[1])
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
if os.getuid() == 0:
    os.setresuid(65534, 65534, 65534)
    ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: /proc/self is its own again

def locked():
    for name in ("a", "b", "c", "d", "e", "x", "y"):
        model[name].tobytes()  # touched
    return [model.residency(name).locked for name in ("a", "x", "b", "y", "c", "d", "e")]

for before in ([], ["x"], ["b"], ["x", "y"]):
    for name in before:
        model.lock(name)
    was = locked()
    assert any(was) == bool(before), was
    for lock in (model.lock, lambda names: model.prefetch(names, lock=True, wait=True)):
        try:
            lock(["a", "b", "c", "d", "e"])
        except mt.errors.LimitError:
            print(locked() == was)
    model.unlock()
    assert not any(locked())
"""


def test_a_limit_reached_midway_leaves_locked_what_was(tmp_path: Path) -> None:
    # Between those that are asked for lie others, which share their pages; it is the third that is too much.
    from support import entry, raw

    sizes = {
        "a": 300_001,
        "x": 5000,
        "b": 300_001,
        "y": 5000,
        "c": 600_001,
        "z": 1,
        "d": 1001,
        "w": 1,
        "e": 1001,
    }
    header, at = {}, 0
    for name, size in sizes.items():
        header[name] = entry("U8", [size], at, at + size)
        at += size
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw(header, bytes(at)))
    os.chmod(tmp_path, 0o755)
    assert succeed(LOCK_FIVE, path).split() == ["True"] * 8


def test_a_lock_of_what_cannot_be_read_is_an_input_output_error(tmp_path: Path) -> None:
    path = make(tmp_path / "m.safetensors", {"a": (4 * MIB,)})
    model = mt.open(path)
    os.truncate(path, MIB)
    with pytest.raises(OSError, match="Input/output error") as raised:
        model.lock()
    assert raised.value.errno == errno.EIO
    assert model.residency().locked == 0


STRANGER = """
import ctypes, os, sys
import maptensors as mt
import numpy
path, mode = sys.argv[1:]
os.setgid(65534)
os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/self is to be this user's
model = mt.open(path, mode)
print(model.residency().resident)
model["a"].numpy().sum()
print(model.residency().resident >= model.residency("a").pages)
model.evict()
print(model.residency().resident)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's file is made by root")
def test_of_another_users_file_nothing_is_made_up(tmp_path: Path) -> None:
    path = make(tmp_path / "m.safetensors", {"a": (4 * MIB,), "b": (4 * MIB,)})
    for directory in (tmp_path, *tmp_path.parents[:3]):
        os.chmod(directory, 0o755)
    os.chmod(path, 0o644)
    # mincore(2) would answer that all of it is in memory.
    assert succeed(STRANGER, path, "r").split() == ["0", "True", "0"]


STREAM = """
import sys, zlib
import maptensors as mt, numpy as np

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

path, how = sys.argv[1:]
sys.stdout.write("ready\\n")
sys.stdout.flush()
sys.stdin.readline()
baseline = status("RssAnon")
peak = 0
if how == "stream":
    model = mt.open(path)
    for name, tensor in model.stream(budget="64MiB"):
        print(name, zlib.crc32(tensor.numpy()))
        peak = max(peak, status("RssAnon") - baseline)
else:
    model = mt.open(path, backend="pread")
    for name, tensor in model.items():
        print(name, zlib.crc32(tensor.numpy()))
print("swap", status("VmSwap"))
print("anonymous", peak)
"""


def streamed(path: Path, how: str, size: int) -> tuple[int, str, int]:
    with limited() as group:
        limit(group, size)
        # What the file's making left in the cache is not charged here.
        cold(path)
        child = subprocess.Popen(
            in_group(group, sys.executable, "-c", STREAM, str(path), how),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        output, errors = child.communicate("\n", timeout=300)
        assert child.returncode in (0, -9), errors
        most = [group / "memory.peak", group / "memory.max_usage_in_bytes"]
        peak = next((int(file.read_text()) for file in most if file.exists()), 0)
        return child.returncode, output, peak


def test_a_model_twice_as_large_as_memory_streams_through(disk: Path) -> None:
    import zlib

    size = 768 * MIB
    path = make(disk / "m.safetensors", {f"t{i:02}": (size // 24,) for i in range(24)})
    with mt.open(path, "r") as model:
        expected = [f"{name} {zlib.crc32(tensor.numpy())}" for name, tensor in model.items()]
        model.evict()
    code, output, peak = streamed(path, "stream", size // 2)
    *lines, swap, anonymous = output.splitlines()
    assert (code, lines, swap) == (0, expected, "swap 0")
    assert int(anonymous.split()[1]) <= 64 * MIB
    # Dropped behind, not reclaimed when memory ran out: the group never came near its limit.
    assert peak < size // 3, f"{peak / MIB} MiB"
    code, _, _ = streamed(path, "pread", size // 2)
    assert code == -9


def test_a_stream_is_in_order_and_ends_early(tmp_path: Path) -> None:
    path = make(tmp_path / "m.safetensors", dict.fromkeys("dbac", (MIB,)))
    with mt.open(path) as model:
        assert [name for name, _ in model.stream()] == list(model)
        assert [name for name, _ in model.stream(order="name", budget=1)] == list("abcd")
        assert [name for name, _ in model.stream(order=["c", "a"])] == ["c", "a"]
        assert [name for name, _ in model.stream(names="[ab]", order="name")] == ["a", "b"]
        for bad in ({"order": "size"}, {"order": []}, {"budget": 0}, {"budget": "much"}):
            with pytest.raises(ValueError):  # noqa: PT011
                model.stream(**bad)
        with pytest.raises(KeyError):
            model.stream(names="x*")
        kept = []
        with model.stream(budget="2MiB") as stream:
            for name, tensor in stream:
                kept.append((name, tensor))
                if len(kept) == 2:
                    break
        assert next(stream, None) is None
        for name, tensor in kept:
            assert tensor.tobytes() == model[name].tobytes()
        stream = model.stream()
    # The model is closed; what is under way is not.
    assert len(list(stream)) == 4


def test_a_stream_keeps_no_copies_of_misaligned_tensors(tmp_path: Path) -> None:
    from support import entry, raw

    count, size = 16, 4 * MIB
    header = {"odd": entry("U8", [1], 0, 1)} | {
        f"t{i}": entry("F32", [size // 4], 1 + i * size, 1 + (i + 1) * size) for i in range(count)
    }
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw(header, bytes(1 + count * size)))
    model = mt.open(path)

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s*(\d+)", status)[1]) << 10

    before, kept = anonymous(), None
    for name, tensor in model.stream(budget="8MiB"):
        if name == "t3":
            tensor[0] = 5.0
        if name == "t5":
            kept = tensor
    # Of copies: those that are kept, and what the allocator keeps.
    assert anonymous() - before < 10 * size
    assert model["t3"].numpy()[0] == 5.0
    assert kept is not None
    kept[1] = 6.0
    assert model["t5"].numpy()[1] == 6.0


OPERATIONS = st.sampled_from(
    ["evict", "evict one", "prefetch", "lock", "unlock", "stream", "promote", "changed", "prefetch lock"]
)
EDITS = st.tuples(
    st.integers(0, 2), st.floats(0, 1, exclude_max=True), st.integers(1, 20_000), st.integers(0, 255)
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(OPERATIONS, EDITS), max_size=25), st.integers(0, 2))
def test_edits_survive_everything(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Any], which: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "edits.safetensors"
    if not path.exists():
        make(path, {"a": (3 * MIB + 1000,), "b": (700,), "c": (2 * MIB + 77,)})
    original = path.read_bytes()
    model = mt.open(path)
    names = list(model)
    arrays = [model[name].numpy() for name in names]
    shadow = [array.copy() for array in arrays]
    with contextlib.suppress(LimitError):
        for step in steps:
            match step:
                case (tensor, place, size, value):
                    start = int(place * arrays[tensor].size)
                    for array in (arrays[tensor], shadow[tensor]):
                        array[start : start + size] = value
                case "evict" | "evict one":
                    with contextlib.suppress(mt.MapTensorsError):
                        model.evict(names[which] if "one" in step else None)
                case "prefetch":
                    model.prefetch(wait=True)
                case "prefetch lock":
                    model.prefetch(names[which], lock=True, wait=True)
                case "lock":
                    model.lock(names[which])
                case "unlock":
                    model.unlock()
                case "stream":
                    for i, (name, tensor) in enumerate(model.stream(budget="2MiB")):
                        assert tensor.tobytes() == shadow[names.index(name)].tobytes()
                        tensor.numpy()[i] ^= 1
                        shadow[names.index(name)][i] ^= 1
                case "promote":
                    model.promote([names[which]])
                case "changed":
                    model.changed()
            for array, expected in zip(arrays, shadow, strict=True):
                assert (array == expected).all()
    assert path.read_bytes() == original


def test_a_write_racing_with_evict_is_never_lost(disk: Path) -> None:
    model = mt.open(make(disk / "m.safetensors", {"a": (2048 * PAGE,)}))
    array = model["a"].numpy()
    done = threading.Event()

    def evict() -> None:
        while not done.is_set():
            model.evict()

    threads = [threading.Thread(target=evict) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for value in range(1, 200):
            for page in range(0, 2048, 64):
                array[page * PAGE : (page + 64) * PAGE : PAGE] = value
                time.sleep(0)  # the others' turn
            assert (array[::PAGE] == value).all()
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_pages_that_a_shard_has_handed_out_are_not_promoted_under_a_write(tmp_path: Path) -> None:
    path = make(tmp_path / "m.safetensors", {"w": (8 * MIB,), "v": (8 * MIB,)})
    model = mt.open(path, dense_edits=True)
    part = model.rank_view(0, 2, {"w": "column"}, default="replicate")["w"].numpy()
    # Copying its pages in bulk now would lose what another thread writes to the part meanwhile.
    whole = model["w"].numpy()
    assert model.residency("w").private == 0
    part[5] = 77
    assert whole[5] == 77


PROMOTED_HALF = """
import resource, sys
import maptensors as mt
MIB = 1 << 20
model = mt.open(sys.argv[1])
names = sorted(model, key=lambda name: model.info(name).offset)
for name in names:
    model[name].tobytes()
# Copied in blocks of 64 MiB of addresses: a small one, which finds room, before one that does not.
at = next(i for i, name in enumerate(names) if i and model[name].data_ptr() % (64 * MIB) < 8 * MIB)
names = names[at - 1 : at + 8]
model.lock(names)
with open("/proc/self/status") as lines:
    used = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + 48 * MIB, resource.RLIM_INFINITY))
try:
    model.promote(names)
except OSError as error:
    print("refused")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for name in names:
    model[name].tobytes()  # touched
pages = model.residency(names)
print(0 < pages.private < pages.pages, pages.locked == pages.pages)
"""


def test_what_is_locked_stays_so_where_promoting_fails_halfway(tmp_path: Path) -> None:
    path = make(tmp_path / "m.safetensors", {f"t{i:02}": (8 * MIB,) for i in range(20)})
    with mt.open(path) as model:
        try:
            model.lock()
        except LimitError as error:
            pytest.skip(f"not tested: {error}")
    assert succeed(PROMOTED_HALF, path).split() == ["refused", "True", "True"]


HIDDEN, FFN, KV, VOCABULARY = 4096, 11008, 1024, 32000


def llama(layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY // 8, HIDDEN)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": (KV, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": (KV, HIDDEN),
            f"{layer}.self_attn.q_proj.bias": (HIDDEN,),
            f"{layer}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.mlp.gate_proj.weight": (FFN, HIDDEN),
            f"{layer}.mlp.up_proj.weight": (FFN, HIDDEN),
            f"{layer}.mlp.down_proj.weight": (HIDDEN, FFN),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
        }
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY // 8, HIDDEN)}


def copied(tensor: Any) -> np.ndarray:
    return np.array(tensor.view("U8") if tensor.dtype == "BF16" else tensor)


def whole(parts: list[Any], name: str, plan: dict[str, Any]) -> np.ndarray:
    """All ranks' parts of a tensor, put together."""
    import fnmatch

    arrays = [part[name] for part in parts]
    for axis in (0, 1):
        if arrays[0].ndim > axis and sum(array.shape[axis] for array in arrays) > arrays[0].shape[axis]:
            split = next(
                how
                for pattern, how in plan.items()
                if any(fnmatch.fnmatchcase(name, one) for one in expanded(pattern))
            )
            if split == "replicate":
                assert all((array == arrays[0]).all() for array in arrays)
                return arrays[0]
            if {"column": 0, "row": 1}[split] == axis:
                return np.concatenate(arrays, axis)
    raise AssertionError(name)


def expanded(pattern: str) -> Iterator[str]:
    if found := re.search(r"\{([^}]*)\}", pattern):
        for choice in found[1].split(","):
            yield from expanded(pattern[: found.start()] + choice + pattern[found.end() :])
    else:
        yield pattern


@pytest.mark.parametrize("mode", ["r", "c"])
def test_eight_ranks_of_llama_touch_their_parts_and_are_the_whole(disk: Path, mode: str) -> None:
    path = make(disk / "m.safetensors", llama(1), "BF16")
    parts = []
    for rank in range(8):
        # One at a time, so that nothing is in memory before.
        cold(path)
        model = mt.open(path, mode)
        part = model.rank_view(rank, 8, plans.LLAMA)
        assert part.nbytes == sum(tensor.nbytes for tensor in part.values())
        assert part.touched <= 1.05 * part.nbytes
        # What is mapped is all this process has of the file. (Some pages the kernel may have taken back.)
        mapped = part.nbytes - part.gathered
        assert 0.99 * mapped <= model.residency().touched * PAGE <= 1.05 * mapped
        name = "model.layers.0.mlp.up_proj.weight"
        assert part[name].mapped
        assert file_offset(path, part[name].data_ptr(), part[name].nbytes) is not None
        assert not part["model.layers.0.mlp.down_proj.weight"].mapped
        # A row split alone brings the pages its runs lie in, and the header's: not the file.
        rows = [shape for name, shape in llama(1).items() if "o_proj" in name or "down_proj" in name]
        in_pages = sum(out * (into // 8 * 2 + PAGE) for out, into in rows)
        assert cached(path) <= 1.05 * mapped + in_pages + MIB
        print(f"rank {rank}: asked {part.nbytes}, touched {part.touched}, cached {cached(path)}")
        parts.append({name: copied(tensor) for name, tensor in part.items()})
        del model, part
    with mt.open(path, "r") as model:
        for name, tensor in model.items():
            assert (whole(parts, name, plans.LLAMA) == np.asarray(tensor.view("U8"))).all(), name


def stored(path: Path) -> int:
    """Bytes that reading a cold file takes from the disk, as the kernel counts them; 0 where it does not."""
    return int(succeed(READ_ALL, path))


#: What the kernel has read from the disk for this process.
FROM_DISK = """
def from_disk():
    with open("/proc/self/io") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))
"""

READ_ALL = (
    FROM_DISK
    + """
import sys
before = from_disk()
with open(sys.argv[1], "rb") as file:
    while file.read(1 << 20):
        pass
print(from_disk() - before)
"""
)

RANK = (
    FROM_DISK
    + """
import sys
import maptensors as mt
from maptensors import plans
path, *ranks = sys.argv[1:]
before = from_disk()
for rank in ranks:
    print("ready", flush=True)
    sys.stdin.readline()  # all at once, or one after the other
    with mt.open(path, "r") as model:
        model.rank_view(int(rank), 8, plans.LLAMA)
    print(from_disk() - before, flush=True)
"""
)


@pytest.mark.parametrize("at_once", [False, True], ids=["one after the other", "at once"])
def test_eight_ranks_of_a_machine_read_each_page_of_the_file_once(disk: Path, at_once: bool) -> None:
    path = make(disk / "m.safetensors", llama(1), "BF16")
    size = path.stat().st_size
    cold(path)
    is_counted = stored(path) >= size // 2
    # Cold before the first only: what one rank brings, the next ones find.
    cold(path)
    assert cached(path) <= MIB
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(path), str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(8)
    ]
    for rank in ranks:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "ready\n"

    def go(rank: subprocess.Popen[str]) -> None:
        assert rank.stdin is not None
        rank.stdin.write("\n")
        rank.stdin.flush()

    def read(rank: subprocess.Popen[str]) -> int:
        output, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0
        return int(output)

    if at_once:
        for rank in ranks:
            go(rank)
        counts = [read(rank) for rank in ranks]
    else:
        counts = []
        for rank in ranks:
            go(rank)
            counts.append(read(rank))
    print(f"{size} bytes; the ranks read {counts}, {sum(counts) / size:.4f} of it; cached {cached(path)}")
    assert 0.99 * size <= cached(path) <= size + MIB
    if not is_counted:
        pytest.skip("the kernel counts no read_bytes here: only the page cache was tested")
    assert 0.9 * size <= sum(counts) <= 1.05 * size, counts


def test_eight_ranks_of_a_published_model_are_the_whole(fetch: Callable[[str], Path]) -> None:
    path = fetch("minilm")
    model = mt.open(path)
    assert [name for name in model if "LayerNorm" in name]
    parts = [model.rank_view(rank, 8, plans.BERT) for rank in range(8)]
    for part in parts:
        assert part.touched <= 1.05 * part.nbytes
    parts = [{name: copied(tensor) for name, tensor in part.items()} for part in parts]
    for name, tensor in model.items():
        assert (whole(parts, name, plans.BERT) == tensor.numpy()).all(), name


def test_edits_are_seen_in_a_shard_and_renamed_files_are_read(tmp_path: Path) -> None:
    path = make(tmp_path / "m.safetensors", {"w": (64, 8192), "v": (64, 8192)})
    model = mt.open(path)
    model["w"].numpy()[:, 5] = 77
    expected = model["w"].numpy().copy()
    parts = [model.rank_view(rank, 4, {"w": "row"}, default=0) for rank in range(4)]
    assert (np.concatenate([part["w"].numpy() for part in parts], 1) == expected).all()
    # Another file under its name is not read.
    make(tmp_path / "n.safetensors", {"w": (64, 8192), "v": (64, 8192), "x": (3,)}).rename(path)
    parts = [model.rank_view(rank, 4, {"v": 1}, default="column") for rank in range(4)]
    assert (np.concatenate([part["v"].numpy() for part in parts], 1) == model["v"].numpy()).all()
    assert parts[1]["w"].data_ptr() == model["w"].data_ptr() + 16 * 8192
    parts[1]["w"].numpy()[0, 0] = 3
    assert model["w"].numpy()[16, 0] == 3


def test_a_plan_that_does_not_fit_is_an_error_that_says_why(tmp_path: Path) -> None:
    with mt.open(make(tmp_path / "m.safetensors", {"w": (10, 8), "b": (10,), "n": (8,)})) as model:
        for plan, default, message in [
            ({"w": "column"}, None, r"no rule of the plan matches 2 of the 3 tensors: "),
            ({"w": "column"}, "replicate", r'"w": axis 0 of length 10 does not divide among 4 ranks'),
            ({"b": "row"}, "replicate", r'"b" of rank 1 has no axis 1 .*bias'),
            ({"w": 2}, "replicate", "no axis 2"),
            ({"w": "rows"}, None, "a split is"),
            ({"w": -1}, None, "counted from 0"),
        ]:
            with pytest.raises(ValueError, match=message):
                model.rank_view(0, 4, plan, default=default)
        with pytest.raises(ValueError, match="rank 4 is not one of 4"):
            model.rank_view(4, 4, {}, default="replicate")
        assert model.rank_view(0, 2, {}, default="replicate")["w"].tobytes() == model["w"].tobytes()
