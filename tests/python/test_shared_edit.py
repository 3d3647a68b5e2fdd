"""Models edited in their files: ``mode="r+"``."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import maptensors as mt
import numpy as np
import pytest
from support import MODELS, entry, ours, raw, reference, succeed

DIGITS = MODELS / "digits.safetensors"


@pytest.fixture
def file(tmp_path):
    return Path(shutil.copy(DIGITS, tmp_path / "model.safetensors"))


def test_what_is_written_reaches_the_file_at_once_by_every_way_there_is(file):
    import torch

    before = file.read_bytes()
    model = mt.open(file, "r+")
    assert model.mode == "r+"
    model["fc1.bias"].numpy()[3] = 5.0
    assert reference(file)["fc1.bias"].data[12:16] == np.float32(5).tobytes()
    model["fc2.bias"][...] = 0.5
    model["fc2.weight"][2:4, ::3] = np.float32(9)
    model["fc1.weight"].torch().fill_(0.25)
    memoryview(model["fc1.bias"])[4] = 6.0
    torch.from_dlpack(model["fc1.bias"])[5] = 7.0
    found = mt.open(file, "r").numpy()
    assert found["fc1.bias"][3:6].tolist() == [5, 6, 7]
    assert (found["fc2.bias"] == 0.5).all()
    assert (found["fc1.weight"] == 0.25).all()
    assert (found["fc2.weight"][2:4, ::3] == 9).all()
    assert not (found["fc2.weight"] == 9).all()
    # All at once, and strided parts.
    arrays = model.numpy()
    arrays["fc1.bias"][:] = 1
    model["fc1.weight"][::-2, 5:50:7].numpy()[...] = 3
    found = mt.open(file, "r").numpy()
    expected = np.full((64, 64), np.float32(0.25))
    expected[::-2, 5:50:7] = 3
    assert (found["fc1.bias"] == 1).all()
    assert (found["fc1.weight"] == expected).all()
    start = model.info("fc1.bias").offset
    assert min(mt.open(file).info(name).offset for name in model) <= start
    header = min(model.info(name).offset for name in model)
    assert file.read_bytes()[:header] == before[:header]
    assert ours(model) == reference(file)


def test_no_buffer_under_an_array_reaches_beyond_its_tensor(file):
    """The header is in the same mapping."""
    model = mt.open(file, "r+")
    for name, array in [*model.numpy().items(), *((name, model[name].numpy()) for name in model)]:
        info = model.info(name)
        assert memoryview(array.base).nbytes == info.nbytes == array.nbytes
    part = model["fc1.weight"][10:20, ::-2].numpy()
    bounds = np.lib.array_utils.byte_bounds(part)
    base = np.frombuffer(part.base, np.uint8)
    assert base.ctypes.data == bounds[0]
    assert base.nbytes == bounds[1] - bounds[0]


def test_another_process_sees_what_is_written_and_is_seen(file):
    model = mt.open(file, "r+")
    code = """
import sys, maptensors as mt
model = mt.open(sys.argv[1], "r+")
bias = model["fc1.bias"].numpy()
print(bias[0], flush=True)
sys.stdin.readline()
print(bias[0], flush=True)
bias[1] = 22
print("written", flush=True)
"""
    bias = model["fc1.bias"].numpy()
    bias[0] = 11
    with subprocess.Popen(
        [sys.executable, "-c", code, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "11.0\n"
        bias[0] = 12
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "12.0\n"
        assert other.stdout.readline() == "written\n"
        assert bias[1] == 22
    assert other.returncode == 0


def dirty(path: Path) -> int:
    """KiB of the file's pages that this process has written and no disk has."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(str(path.resolve()))
        elif inside and line.split(":")[0] in ("Private_Dirty", "Shared_Dirty"):
            total += int(line.split()[1])
    return total


def test_flush_waits_for_the_disk_unless_told_not_to(file):
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    model = mt.open(file, "r+")
    kind = subprocess.run(["stat", "-f", "-c", "%T", file], capture_output=True, text=True).stdout.strip()
    if kind == "tmpfs":
        pytest.skip("on tmpfs, whose pages no disk ever has: flushing was not tested")
    for names in (None, "fc1.bias", ["fc1.bias", "fc2.bias"]):
        model["fc1.bias"].numpy()[0] += 1
        written = dirty(file)
        assert written > 0
        model.flush(names, wait=False)
        assert dirty(file) == written
        model.flush(names)
        assert dirty(file) == 0, names
    with pytest.raises(mt.errors.MissingError):
        model.flush("fc3")
    with pytest.raises(TypeError):
        model.flush(3)
    for mode in ("r", "c"):
        with pytest.raises(ValueError, match="writes nothing to its file"):
            mt.open(file, mode).flush()


def test_there_is_nothing_to_tell_changes_by_and_nothing_to_promote(file, tmp_path):
    model = mt.open(file, "r+", dense_edits=True)
    model["fc1.bias"].numpy()[0] = 5
    delta = tmp_path / "delta"
    for work in (model.changed, model.mark, lambda: mt.save_delta(model, delta)):
        with pytest.raises(mt.MapTensorsError, match="edited in its file"):
            work()
    assert not delta.exists()
    with pytest.raises(ValueError, match="no pages of its own"):
        model.promote()
    assert model.residency().private == 0
    # Compared as a whole it can be.
    assert mt.diff(DIGITS, model).changed.keys() == {"fc1.bias"}
    with pytest.raises(ValueError, match="mode"):
        mt.apply_delta(file, file, mode="r+")


@pytest.mark.parametrize("backend", ["pread", "memfd"])
def test_only_a_mapping_is_the_file(file, backend):
    with pytest.raises(ValueError, match="only backend="):
        mt.open(file, "r+", backend=backend)


def test_a_file_that_is_replaced_is_no_longer_edited_and_flush_says_so(file, tmp_path):
    model = mt.open(file, "r+")
    bias = model["fc1.bias"].numpy()
    bias[0] = 5
    # It would go on editing a file without a name.
    with pytest.raises(mt.MapTensorsError, match="flush it"):
        model.save(file)
    model.flush()
    model.save(tmp_path / "other")
    os.replace(tmp_path / "other", file)
    bias[0] = 6
    for names in (None, "fc1.bias"):
        for wait in (True, False):
            with pytest.raises(mt.errors.ChangedError, match="inode"):
                model.flush(names, wait=wait)
    assert mt.open(file)["fc1.bias"].numpy()[0] == 5
    assert bias[0] == 6


def test_a_misaligned_tensor_is_refused_and_the_others_are_edited(tmp_path):
    path = tmp_path / "odd"
    header = {"o": entry("U8", [1], 0, 1), "w": entry("F32", [2], 1, 9)}
    path.write_bytes(raw(header, b"\1" + np.float32([1, 2]).tobytes()))
    model = mt.open(path, "r+")
    model["o"].numpy()[0] = 9
    for work in (lambda: model["w"], model.numpy, model.torch, lambda: model.get("w")):
        with pytest.raises(mt.errors.AlignError, match=r'"w" starts . bytes past a multiple of 4.*mode="c"'):
            work()
    aligned = tmp_path / "aligned"
    mt.open(path, "c").save(aligned)
    again = mt.open(aligned, "r+")
    again["w"].numpy()[1] = 5
    assert mt.open(aligned)["w"].numpy().tolist() == [1, 5]
    assert path.read_bytes()[-9:] == b"\x09" + np.float32([1, 2]).tobytes()


def test_a_file_that_may_not_be_written_raises_permission_error(file):
    code = """
import os, sys
import maptensors as mt
path = sys.argv[1]
os.chdir(os.path.dirname(path))
os.chmod(".", 0o755)
os.chmod(path, 0o444)
if os.geteuid() == 0:
    os.setuid(65534)
try:
    mt.open(os.path.basename(path), "r+")
except PermissionError as error:
    print(error.filename)
mt.open(os.path.basename(path), "c")
"""
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        copied = shutil.copy(file, directory)
        assert succeed(code, copied) == f"{file.name}\n"


def test_a_long_header_is_copied_so_that_names_stay_what_they_were(tmp_path):
    """Read where it lies, as other modes do, it would be text that others may write."""
    path = tmp_path / "many"
    count = 6000
    mt.save({f"layer.{i:060}": np.zeros(1, "uint8") for i in range(count)}, path)
    model = mt.open(path, "r+")
    names = list(model)
    assert path.stat().st_size > 256 << 10
    with path.open("r+b") as opened:
        opened.write(b"\0" * 300_000)
    assert list(model) == names
    assert names[7] in model


def test_closing_and_verifying_work_as_ever(file, tmp_path):
    with mt.open(file, "r+") as model:
        kept = model["fc1.bias"].numpy()
    kept[0] = 3
    assert mt.open(file)["fc1.bias"].numpy()[0] == 3
    summed = tmp_path / "summed"
    mt.open(file).save(summed, checksums=True)
    edited = mt.open(summed, "r+", verify="all")
    edited["fc1.bias"].numpy()[0] = 4
    # The header is not written: its checksums are of the content before.
    with pytest.raises(mt.errors.ChecksumError):
        mt.verify(summed)
    edited.save(tmp_path / "again", checksums=True)
    mt.verify(tmp_path / "again")


def test_a_sharded_set_is_edited_in_all_its_files(tmp_path):
    shutil.copytree(MODELS / "digits-sharded", tmp_path / "set")
    model = mt.open(tmp_path / "set", "r+")
    for tensor in model.values():
        tensor[...] = 0.5
    model.flush()
    assert all((array == 0.5).all() for array in mt.open(tmp_path / "set").numpy().values())


def test_an_error_of_the_disk_is_raised_by_the_flush_that_meets_it_and_by_no_other(tmp_path):
    """On an image on a tmpfs that is full: the file has its blocks, and the image has none for them."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("mounting an image takes root and mkfs.ext4: no failing disk was tested")
    outer, inner = tmp_path / "outer", tmp_path / "inner"
    outer.mkdir()
    inner.mkdir()
    size = 8 << 20
    code = """
import sys
import maptensors as mt
model = mt.open(sys.argv[1], "r+")
model["a"].numpy()[:] = 1
for _ in range(4):
    try:
        model.flush()
        print("well")
    except OSError as error:
        print(error.filename == sys.argv[1])
"""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", outer], check=True)
    try:
        with (outer / "image").open("wb") as image:
            image.truncate(64 << 20)
        options = ["-E", "lazy_itable_init=0,lazy_journal_init=0"]
        subprocess.run(["mkfs.ext4", "-q", "-F", *options, outer / "image"], check=True)
        mounted = subprocess.run(["mount", "-o", "loop", outer / "image", inner], capture_output=True)
        if mounted.returncode != 0:
            pytest.skip(f"no loop device: no failing disk was tested: {mounted.stderr}")
        with (inner / "model").open("wb") as file:
            file.write(raw({"a": entry("U8", [size], 0, size)}))
            file.flush()
            os.posix_fallocate(file.fileno(), 0, file.tell() + size)
            os.fsync(file.fileno())
        os.sync()
        room = os.statvfs(outer)
        with (outer / "fill").open("wb") as fill:
            os.posix_fallocate(fill.fileno(), 0, room.f_bavail * room.f_frsize)
        said = succeed(code, inner / "model").split()
        assert said[0] == "True", said
        assert said[-1] == "well", said
    finally:
        subprocess.run(["umount", "-l", inner], check=False)
        subprocess.run(["umount", "-l", outer], check=False)
