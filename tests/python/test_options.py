"""How a model is mapped: each option by its effect on the kernel's own account of the memory."""

import gc
import io
import mmap
import os
import re
import tarfile
import zipfile
from pathlib import Path

import maptensors as mt
import numpy as np
import pytest
from support import MODELS, PAGE, mapped_from, ours, raw, reference, run_python, soon, succeed

DIGITS = MODELS / "digits.safetensors"


class Smaps(dict):
    """Sizes in KiB, and flags, of the mapping that an address lies in."""

    def __init__(self, address: int) -> None:
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \S+ *(.*)", line):
                start, end = int(found[1], 16), int(found[2], 16)
                inside = start <= address < end
                if inside:
                    self.update(perms=found[3], path=found[4], size=end - start)
            elif inside:
                key, value = line.split(":", 1)
                self[key] = value.split() if key == "VmFlags" else int(value.split()[0])


@pytest.fixture
def file(tmp_path):
    """A model of 3 MiB and a little."""
    path = tmp_path / "model.safetensors"
    rng = np.random.default_rng(1)
    mt.save({"big": rng.random(3 << 17), "small": np.arange(7, dtype="int8")}, path)
    return path


def smaps(model: mt.Model) -> Smaps:
    return Smaps(model["big"].data_ptr())


@pytest.mark.parametrize("mode", ["r", "c"])
@pytest.mark.parametrize("backend", ["mmap", "memfd"])
def test_lock_keeps_everything_in_ram_and_copies_nothing(file, mode, backend):
    def check():
        found = smaps(mt.open(file, mode, backend=backend, lock=True))
        assert "lo" in found["VmFlags"]
        assert found["Locked"] == found["Rss"] == found["size"] // 1024
        assert found["Anonymous"] == 0

    soon(check)


def test_lock_over_the_limit_is_an_error_with_the_limit():
    code = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, 1 << 16))
import maptensors as mt, numpy as np
os.chdir(sys.argv[1])
mt.save({"big": np.zeros(1 << 20, "uint8")}, "model")
if os.geteuid() == 0:
    os.chmod(".", 0o755)
    os.setuid(65534)
for backend in ("mmap", "pread", "memfd"):
    try:
        mt.open("model", lock=True, backend=backend)
    except mt.errors.LimitError as error:
        print(error)
model = mt.open("model")
"""
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        lines = succeed(code, directory).splitlines()
    assert len(lines) == 3
    for line in lines:
        assert re.match("model: .* 65536 .*RLIMIT_MEMLOCK.*ulimit -l", line), line


def test_swap_is_reserved_and_huge_pages_refused_where_asked(file):
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() != "2":
        assert "nr" in smaps(mt.open(file))["VmFlags"]
        assert "ac" in smaps(mt.open(file, reserve_swap=True))["VmFlags"]
    assert "hg" in smaps(mt.open(file))["VmFlags"]
    assert "nh" in smaps(mt.open(file, huge_pages=False))["VmFlags"]
    assert "nh" in smaps(mt.open(file, huge_pages=False, backend="pread"))["VmFlags"]


def test_populate_with_each_backend_and_mode(file):
    for options in ({"mode": "r"}, {"mode": "c"}, {"mode": "r+"}, {"mode": "c", "backend": "memfd"}):

        def check(options=options):
            pages = mt.open(file, **options, populate=True).residency()
            assert (pages.touched, pages.private) == (pages.pages, 0), options

        soon(check)
        pages = mt.open(file, **options).residency()
        assert pages.touched == 0, options


def in_tar(path: Path, directory: Path) -> tuple[Path, int]:
    archive = directory / "model.tar"
    with tarfile.open(archive, "w") as tar:
        tar.addfile(tarfile.TarInfo("first"), io.BytesIO())
        tar.add(path, "model.safetensors")
    with tarfile.open(archive) as tar:
        return archive, tar.getmember("model.safetensors").offset_data


def in_zip(path: Path, directory: Path) -> tuple[Path, int]:
    archive = directory / "model.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as zipped:
        zipped.write(path, "odd")
    start = archive.read_bytes().index(path.read_bytes())
    return archive, start


@pytest.mark.parametrize("pack", [in_tar, in_zip])
@pytest.mark.parametrize("backend", ["mmap", "pread", "memfd"])
def test_a_model_inside_an_archive_opens_where_it_lies(file, tmp_path, pack, backend):
    archive, offset = pack(file, tmp_path)
    length = file.stat().st_size
    model = mt.open(archive, backend=backend, offset=offset, length=length)
    assert ours(model) == reference(file)
    at = model.info("big").offset
    assert archive.read_bytes()[at : at + 8] == model["big"].tobytes()[:8]
    model["small"].numpy()[0] = 99
    if backend != "pread":
        assert list(model.changed()) == ["small"]
    out = tmp_path / "out.safetensors"
    model.save(out)
    assert mt.open(out)["small"].numpy()[0] == 99
    for wrong in ({"offset": offset + 1, "length": length}, {"offset": offset, "length": length + 1}):
        with pytest.raises(mt.MapTensorsError):
            mt.open(archive, backend=backend, **wrong)


@pytest.mark.parametrize("backend", ["mmap", "pread", "memfd"])
def test_a_model_is_not_saved_over_what_it_is_only_a_part_of(file, tmp_path, backend):
    archive, offset = in_tar(file, tmp_path)
    before = archive.read_bytes()
    model = mt.open(archive, offset=offset, length=file.stat().st_size, backend=backend)
    for save in (lambda: model.save(archive), lambda: mt.save(model, archive)):
        with pytest.raises(mt.MapTensorsError, match="holds more than this model"):
            save()
    assert archive.read_bytes() == before
    model.save(tmp_path / "alone.safetensors")
    assert mt.open(tmp_path / "alone.safetensors").keys() == model.keys()


def test_a_window_is_of_one_file_and_inside_it(file):
    with pytest.raises(mt.MapTensorsError, match="several"):
        mt.open(MODELS / "digits-sharded", offset=8)
    with pytest.raises(mt.errors.TruncatedError):
        mt.open(file, offset=file.stat().st_size + 1)
    with pytest.raises(mt.errors.TruncatedError):
        mt.open(file, length=file.stat().st_size + 1)
    with pytest.raises(ValueError, match="past any file's end"):
        mt.open(file, offset=2**64 - 1, length=2)
    with pytest.raises(OverflowError):
        mt.open(file, offset=-1)


def test_what_changed_in_a_misaligned_window_is_told_by_the_page(tmp_path):
    data = np.zeros(5 * PAGE, "uint8")
    inner = raw({"w": {"dtype": "U8", "shape": [data.size], "data_offsets": [0, data.size]}}, data.tobytes())
    path = tmp_path / "archive"
    path.write_bytes(b"\7" * 1001 + inner + b"\7" * 50)
    model = mt.open(path, offset=1001, length=len(inner))
    w = model["w"].numpy()
    # The byte before a page boundary, and the one behind it: two pages.
    boundary = -model["w"].data_ptr() % PAGE
    w[boundary - 1 : boundary + 1] = 1
    [(_, change)] = model.changed().items()
    assert (change.elements, change.pages) == (2, 2)
    assert model.residency().private == 2


def test_a_memfd_is_apart_from_the_file_shared_with_children_and_knows_its_changes(file):
    code = """
import os, sys
import maptensors as mt
model = mt.open(sys.argv[1], backend="memfd")
os.truncate(sys.argv[1], 0)
w = model["big"].numpy()
total = float(w.sum())
pid = os.fork()
if pid == 0:
    ours = [line for line in open("/proc/self/smaps") if "memfd" in line]
    same = float(w.sum()) == total and len(ours) > 0
    w[0] = -1  # this child's own page
    os._exit(0 if same and model.changed().elements == 1 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert float(w.sum()) == total and not model.changed()
w[1] = -1
assert model.changed().elements == 1
model.mark()
assert not model.changed()
print("well")
"""
    assert succeed(code, file) == "well\n"
    model = mt.open(DIGITS, backend="memfd")
    assert model["fc1.bias"].mapped
    assert model["fc1.bias"].data_ptr() % 64 == 0
    assert Smaps(model["fc1.bias"].data_ptr())["path"].startswith("/memfd:")


def test_an_unknown_backend_or_mode_says_which_there_are():
    with pytest.raises(ValueError, match='"mmap", "pread" or "memfd"'):
        mt.open(DIGITS, backend="mmp")
    with pytest.raises(ValueError, match=r'"r", "c" or "r\+", not "w"'):
        mt.open(DIGITS, "w")


def test_arrays_keep_their_memory_and_are_let_go_of_in_any_order(file):
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0]):
        for mode in ("r", "c", "r+"):
            model = mt.open(file, mode)
            tensor = model["big"]
            held = [model, tensor, tensor.numpy()[5:]]
            expected = tensor.tobytes()[40:]
            model = tensor = None
            for i in order:
                assert mapped_from(file)
                if i == 2:
                    assert held[2].tobytes() == expected
                held[i] = None
                gc.collect()
            # With the last of them, the mapping and the one under it are gone.
            assert not mapped_from(file), (mode, order)


def test_past_the_end_of_the_file_a_page_reads_zeros_and_what_is_written_there_is_lost(tmp_path):
    path = tmp_path / "model.safetensors"
    mt.save({"w": np.full(100, 7, "uint8")}, path)
    size = path.stat().st_size
    assert size % PAGE
    for mode in ("r", "c", "r+"):
        code = """
import ctypes, sys
import maptensors as mt
path, mode, size, page = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model = mt.open(path, mode)
start = model["w"].data_ptr() - model.info("w").offset
tail = (ctypes.c_char * (page - size % page)).from_address(start + size)
assert tail.raw.count(0) == len(tail)
if mode != "r":
    tail[0:3] = b"abc"
    model["w"].numpy()[0] = 8
    if mode == "r+":
        model.flush()
print("well")
"""
        assert succeed(code, path, mode, size, PAGE) == "well\n"
    assert path.stat().st_size == size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        assert whole[-100:] == b"\x08" + b"\7" * 99
    # Made longer, the file has zeros there.
    os.truncate(path, size + 3)
    assert path.read_bytes()[size:] == b"\0\0\0"


def test_a_limit_on_addresses_is_an_error_and_no_crash(file):
    code = """
import resource, sys
import maptensors as mt
resource.setrlimit(resource.RLIMIT_AS, (1 << 20, 1 << 20))
for backend in ("mmap", "pread", "memfd"):
    try:
        mt.open(sys.argv[1], backend=backend)
    except OSError as error:
        print(error.errno)
"""
    done = run_python(code, file)
    assert done.stdout.split() == ["12"] * 3, done.stderr
