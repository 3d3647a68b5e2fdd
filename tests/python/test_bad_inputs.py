"""Every bad input has its error, of the kind promised: never a crash, a hang, or a half-written file.

The rows are those of the project's list of bad inputs, seen from Python. What the reference does with each
header is checked beside it, exceptions named.
"""

import errno
import io
import json
import os
import pickle
import socket
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any

import maptensors as mt
import maptensors.errors
import maptensors.numpy
import maptensors.torch
import numpy as np
import pytest
import safetensors
import torch
from support import MODELS, entry, names_in, ours, raw, reference, run_python, sha256, succeed

F32_1 = entry("F32", [1], 0, 4)
ONE = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
OK = None


def field(**changes: Any) -> str:
    """ONE with other values in its entry."""
    return json.dumps({"a": F32_1 | changes})


def text_field(name: str, value: str) -> str:
    """ONE with text in place of a value, which need not be JSON."""
    parts = {"dtype": '"F32"', "shape": "[1]", "data_offsets": "[0,4]"} | {name: value}
    return '{"a":{' + ",".join(f'"{key}":{part}' for key, part in parts.items()) + "}}"


def pickled() -> bytes:
    return pickle.dumps({"a": [1.0] * 100}, protocol=2)


def zipped() -> bytes:
    out = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, out)
    assert zipfile.is_zipfile(out)
    return out.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
RANK = 10**6

#: name: (file, kind or OK, text of the message)
FILES: dict[str, tuple[bytes, str | None, str]] = {
    # The length field.
    "no bytes": (b"", "Truncated", "0 bytes"),
    "7 bytes": (b"\2\0\0\0\0\0\0", "Truncated", "7 bytes"),
    "n = 0": (raw(""), "Json", "header"),
    "n = 2": (raw("{}"), OK, ""),
    "n = 60 in 8 bytes": (struct.pack("<Q", 60), "Truncated", "68"),
    "n = 2^64-1": (struct.pack("<Q", 2**64 - 1) + b"x" * 100, "Limit", "limit"),
    "n = 2^63": (struct.pack("<Q", 2**63) + b"x" * 100, "Limit", "limit"),
    "n = 2^64-8": (struct.pack("<Q", 2**64 - 8) + b"x" * 100, "Limit", "limit"),
    "n = 100,000,001": (struct.pack("<Q", 100_000_001) + b"x" * 100, "Limit", "100000001"),
    "n = 100,000,000 but short": (struct.pack("<Q", 100_000_000), "Truncated", "interrupted download"),
    "n one past the file": (raw("{}", length=3), "Truncated", "1 are missing"),
    # Other files.
    "Git LFS pointer": (LFS, "Limit", "LFS"),
    "HTML": (HTML, "Limit", "HTML"),
    "pickle": (pickled(), "Limit", "pickle"),
    "zip": (zipped(), "Limit", "zip"),
    # Text.
    "byte 0xFF": (raw(b'{"\xff":1}'), "Utf8", "offset 10"),
    "surrogate in UTF-8": (raw(b'{"\xed\xa0\x80":1}'), "Utf8", "UTF-8"),
    "byte order mark": (raw("\ufeff{}"), "Json", "header"),
    "NUL padding": (raw("{}\0\0"), "Json", "header"),
    "trailing spaces": (raw("{}     "), OK, ""),
    "leading spaces": (raw("   {}"), OK, ""),
    "other white space": (raw("{}\n\t\r "), OK, ""),
    "text after the object": (raw("{}x"), "Json", "header"),
    "list": (raw("[]"), "Json", "header"),
    "null": (raw("null"), "Json", "header"),
    "string": (raw('"a"'), "Json", "header"),
    "trailing comma": (raw(ONE[:-1] + ",}", b"1234"), "Json", "header"),
    "comment": (raw("{/**/" + ONE[1:], b"1234"), "Json", "header"),
    "NaN": (raw(text_field("shape", "[NaN]"), b"1234"), "Json", "header"),
    "cut JSON": (raw(ONE[:-3], b"1234"), "Json", "header"),
    "100,000 nested lists": (raw("[" * 100_000), "Json", "header"),
    "nested in an unknown field": (raw(text_field("x", "[" * 100_000), b"1234"), "Json", "header"),
    "nested objects": (raw('{"a":' * 100_000), "Json", "header"),
    # Names and metadata.
    "metadata value 1": (raw('{"__metadata__":{"a":1}}'), "Json", "header"),
    "metadata value null": (raw('{"__metadata__":{"a":null}}'), "Json", "header"),
    "metadata value {}": (raw('{"__metadata__":{"a":{}}}'), "Json", "header"),
    "metadata list": (raw('{"__metadata__":[]}'), "Json", "header"),
    "metadata null": (raw('{"__metadata__":null}'), OK, ""),
    "metadata shaped as a tensor": (raw({"__metadata__": F32_1}, b"1234"), "Json", "header"),
    # Entries.
    "no dtype": (raw('{"a":{"shape":[1],"data_offsets":[0,4]}}', b"1234"), "Json", "dtype"),
    "no shape": (raw('{"a":{"dtype":"F32","data_offsets":[0,4]}}', b"1234"), "Json", "shape"),
    "no offsets": (raw('{"a":{"dtype":"F32","shape":[1]}}', b"1234"), "Json", "data_offsets"),
    "entry null": (raw('{"a":null}'), "Json", "header"),
    "dtype f32": (raw(field(dtype="f32"), b"1234"), "DType", "f32"),
    "dtype F128": (raw(field(dtype="F128"), b"1234"), "DType", "F128"),
    "dtype empty": (raw(field(dtype=""), b"1234"), "DType", "expected"),
    "dtype number": (raw(field(dtype=1), b"1234"), "Json", "header"),
    "dim 2.0": (raw(text_field("shape", "[2.0]"), b"1234"), "Json", "header"),
    "dim 1e3": (raw(text_field("shape", "[1e3]"), b"1234"), "Json", "header"),
    "dim -1": (raw(text_field("shape", "[-1]"), b"1234"), "Json", "header"),
    "dim text": (raw(text_field("shape", '["2"]'), b"1234"), "Json", "header"),
    "dim 2^64": (raw(text_field("shape", f"[{2**64}]"), b"1234"), "Json", "header"),
    "dim true": (raw(text_field("shape", "[true]"), b"1234"), "Json", "header"),
    "overflow in elements": (raw(field(shape=[2**62, 4]), b"1234"), "Overflow", "size overflows"),
    "overflow in bytes": (raw(field(shape=[2**62]), b"1234"), "Overflow", "size overflows"),
    "overflow to a valid length": (raw(field(shape=[2**62 + 1]), b"1234"), "Overflow", "size overflows"),
    "overflow to zero": (raw(field(shape=[2**62], data_offsets=[0, 0])), "Overflow", "size overflows"),
    "[0,M,M]": (raw(field(shape=[0, 2**63, 2**63], data_offsets=[0, 0])), OK, ""),
    "[M,M,0]": (raw(field(shape=[2**63, 2**63, 0], data_offsets=[0, 0])), OK, ""),
    "end < begin": (raw(field(data_offsets=[4, 0]), b"1234"), "Layout", "ends before"),
    "1 offset": (raw(field(data_offsets=[0]), b"1234"), "Json", "header"),
    "3 offsets": (raw(field(data_offsets=[0, 4, 4]), b"1234"), "Json", "header"),
    "overlap": (
        raw({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 4, 8)}, b"12345678"),
        "Layout",
        "overlapping",
    ),
    "same range": (raw({"a": F32_1, "b": F32_1}, b"1234"), "Layout", "overlapping"),
    "hole": (raw({"a": F32_1, "b": entry("F32", [1], 8, 12)}, b"1" * 12), "Layout", "hole"),
    "first not at 0": (raw(field(data_offsets=[4, 8]), b"12345678"), "Layout", "hole"),
    "bytes after the last": (raw(ONE, b"12345"), "Layout", "follow"),
    "one byte short": (raw(ONE, b"123"), "Truncated", "1 are missing"),
    "all data missing": (raw(ONE), "Truncated", "interrupted download"),
    "offsets near 2^64": (raw(field(data_offsets=[2**64 - 4, 2**64 - 1]), b"1234"), "Shape", "bytes"),
    "range larger than shape": (raw(field(data_offsets=[0, 8]), b"12345678"), "Shape", "takes 4 bytes"),
    "range smaller than shape": (raw(field(shape=[2]), b"1234"), "Shape", "takes 8 bytes"),
    "F4 of odd count": (raw({"a": entry("F4", [3], 0, 2)}, b"12"), "Align", "byte"),
    "F6 of odd count": (raw({"a": entry("F6_E2M3", [3], 0, 3)}, b"123"), "Align", "byte"),
    "rank 10^6": (raw(field(shape=[1] * RANK), b"1234"), "Limit", "rank"),
    # Odd, but sound.
    "header not a multiple of 8": (
        raw('{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]} }', b"12345678"),
        OK,
        "",
    ),
    "zero-size tensors at one place": (
        raw({"a": entry("F32", [0], 0, 0), "b": entry("F32", [0, 3], 0, 0), "c": F32_1}, b"1234"),
        OK,
        "",
    ),
    "rank 0": (raw(field(shape=[]), b"1234"), OK, ""),
    "any order": (raw({"b": entry("F32", [1], 4, 8), "a": F32_1}, b"12345678"), OK, ""),
    "escapes in the name": (raw({"\0\x1b[31m\n": F32_1}, b"1234"), OK, ""),
    "parent in the name": (raw({"../x": F32_1}, b"1234"), OK, ""),
    "empty name": (raw({"": F32_1}, b"1234"), OK, ""),
    "name of 1 MB": (raw({"x" * 10**6: F32_1}, b"1234"), OK, ""),
    "unknown field": (raw(field(x=[{"y": 1.5}]), b"1234"), OK, ""),
    "metadata of any text": (raw({"__metadata__": {"": "\0\n\ud83d\ude00"}}), OK, ""),
}

#: Where the specification is stricter than the reference's code.
STRICTER: dict[str, tuple[bytes, str, str]] = {
    "name twice": (
        raw('{"a":' + json.dumps(F32_1) + ',"a":' + json.dumps(entry("F32", [1], 4, 8)) + "}", b"12345678"),
        "Duplicate",
        "twice",
    ),
    "name twice, escaped": (
        raw(
            '{"a":' + json.dumps(F32_1) + ',"\\u0061":' + json.dumps(entry("F32", [1], 4, 8)) + "}",
            b"12345678",
        ),
        "Duplicate",
        "twice",
    ),
    "field twice": (raw(text_field("dtype", '"F32","dtype":"F32"'), b"1234"), "Duplicate", "twice"),
    "__metadata__ twice": (raw('{"__metadata__":{},"__metadata__":{}}'), "Duplicate", "twice"),
    "metadata key twice": (raw('{"__metadata__":{"a":"1","a":"1"}}'), "Duplicate", "twice"),
}
SAME_AS_REFERENCE = sorted(set(FILES) - {"[M,M,0]", "rank 10^6"})

CLASSES = mt.errors.BY_KIND


def refused(caught: pytest.ExceptionInfo[Any], kind: str, text: str) -> None:
    assert type(caught.value) is CLASSES[kind]
    assert caught.value.kind == kind
    message = str(caught.value)
    assert text in message
    assert len(message) < 1000
    assert not any(c != "\n" and (ord(c) < 32 or ord(c) == 127) for c in message)


@pytest.mark.parametrize("what", [*FILES, *STRICTER])
@pytest.mark.parametrize("way", ["mmap", "r", "pread", "bytes"])
def test_a_file_opens_or_is_refused_with_the_error_of_its_kind(what: str, way: str, tmp_path: Path) -> None:
    data, kind, text = {**FILES, **STRICTER}[what]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)

    def use() -> mt.Model:
        if way == "bytes":
            return mt.loads(data)
        return mt.open(path, "r" if way == "r" else "c", backend="pread" if way == "pread" else "mmap")

    if kind is OK:
        with use() as model:
            for name, tensor in model.items():
                assert tensor.name == name
                assert len(tensor.tobytes()) == tensor.nbytes
                if max(tensor.shape, default=0) < 2**63:  # numpy's own limit
                    assert tensor.numpy().flags.aligned
        return
    with pytest.raises(mt.MapTensorsError) as caught:
        use()
    refused(caught, kind, text)
    if way != "bytes":
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("what", SAME_AS_REFERENCE)
def test_the_reference_accepts_and_refuses_the_same_files(what: str, tmp_path: Path) -> None:
    data, kind, _ = FILES[what]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    if kind is OK:
        with safetensors.safe_open(path, "np") as theirs, mt.safe_open(path, "np") as mine:
            assert theirs.keys() == mine.keys()
    else:
        with pytest.raises((safetensors.SafetensorError, ValueError)):
            safetensors.safe_open(path, "np")


@pytest.mark.parametrize("what", ["[M,M,0]", "[0,M,M]"])
def test_an_empty_tensor_has_the_same_size_whatever_the_order_of_its_dims(what: str) -> None:
    with mt.loads(FILES[what][0]) as model:
        assert (model["a"].size, model["a"].nbytes, model["a"].tobytes()) == (0, 0, b"")


def test_a_million_and_a_half_empty_tensors_open(tmp_path: Path) -> None:
    path = tmp_path / "many.safetensors"
    part = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    path.write_bytes(raw("{" + ",".join(f'"{i}":{part}' for i in range(1_500_000)) + "}"))
    with mt.open(path) as model:
        assert len(model) == 1_500_000
        assert model["1499999"].shape == (0,)
        assert "1500000" not in model


def test_a_length_that_lies_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for n in [100_000_000, 2**40, 2**64 - 1]:
        path.write_bytes(struct.pack("<Q", n) + b"{}")
        succeed(
            """
import resource, sys
import maptensors as mt
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    mt.open(sys.argv[1])
except mt.MapTensorsError:
    pass
else:
    raise SystemExit("opened")
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000
""",
            path,
        )


def test_misaligned_data_is_readable_and_never_handed_out_misaligned() -> None:
    values = np.array([1.5, -0.0])
    header = json.dumps({"a": entry("F64", [2], 0, 16)})
    header += " " * (len(header) % 2)
    data = raw(header + " " * ((4 - len(header)) % 8), values.tobytes())
    with mt.loads(data) as model:
        assert model["a"].numpy().flags.aligned
        assert model["a"].numpy().tobytes() == values.tobytes()
        assert model["a"].torch().data_ptr() % 8 == 0


def test_a_signalling_nan_is_bit_exact() -> None:
    data = bytes.fromhex("0100807f 00000080 0100c0ff")
    with mt.loads(raw({"a": entry("F32", [3], 0, 12)}, data)) as model:
        assert model["a"].numpy().tobytes() == model["a"].torch().numpy().tobytes() == data
        assert data in mt.dumps(model)


def test_a_bool_of_2_is_readable_as_u8_and_refused_as_bool() -> None:
    with mt.loads(raw({"a": entry("BOOL", [2], 0, 2)}, b"\1\2")) as model:
        with pytest.raises(mt.errors.BitPatternError) as caught:
            model.numpy()
        refused(caught, "Value", "2")
        assert model["a"].view("U8").numpy().tolist() == [1, 2]


# Sharded sets.

PART = raw(ONE, b"1234")


def index_of(text: Any, directory: Path) -> Path:
    path = directory / "model.safetensors.index.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "a/../../b",
        "..\\x",
        "C:\\x",
        "C:x",
        "",
        ".",
        "..",
        "x/",
        "a\0b",
        "./../x",
        "a/../b",
    ],
    ids=ascii,
)
@pytest.mark.parametrize("place", ["index", "directory"])
def test_a_shard_name_that_leads_out_of_the_directory_is_refused(
    name: str, place: str, tmp_path: Path
) -> None:
    index = index_of({"weight_map": {"a": name}}, tmp_path)
    with pytest.raises(mt.errors.ShardPathError) as caught:
        mt.open(index if place == "index" else tmp_path)
    refused(caught, "Path", "shard")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "Json"),
        ("[]", "Json"),
        ("{}", "Json"),
        ('{"weight_map":null}', "Json"),
        ('{"weight_map":[]}', "Json"),
        ('{"weight_map":{"a":1}}', "Json"),
        ('{"weight_map":{"a":["x"]}}', "Json"),
        ('{"weight_map":{"a":"part"}}x', "Json"),
        ('{"weight_map":{"a":"part"}', "Json"),
        ("[" * 100_000, "Json"),
        ('{"weight_map":{"a":"part","a":"part"}}', "Duplicate"),
        ('{"weight_map":{"a":"part","\\u0061":"part"}}', "Duplicate"),
        ('{"weight_map":{"a":"part","b":"part"}}', "Missing"),
        ('{"weight_map":{"a":"part","b":"other"}}', "Duplicate"),
        ('{"weight_map":{"a":"model.safetensors.index.json"}}', "Limit"),
    ],
    ids=lambda value: value[:60],
)
def test_an_index_that_lies_is_refused(text: str, kind: str, tmp_path: Path) -> None:
    for name in ["part", "other"]:
        (tmp_path / name).write_bytes(PART)
    index = index_of(text, tmp_path)
    for place in [index, tmp_path]:
        with pytest.raises(mt.MapTensorsError) as caught:
            mt.open(place)
        refused(caught, kind, "")
        assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("total", [1, -1, "lots", None, 1e300])
def test_a_wrong_total_size_is_no_error(total: Any, tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(PART)
    index = index_of({"metadata": {"total_size": total}, "weight_map": {"a": "part"}}, tmp_path)
    with mt.open(index) as model:
        assert model["a"].tobytes() == b"1234"


def test_verify_warns_of_a_wrong_total_size(tmp_path: Path) -> None:
    tensors = {"a": np.arange(4, dtype="float32"), "b": np.arange(4, dtype="float32")}
    mt.save(tensors, tmp_path / "model.safetensors", max_shard_size=16, checksums=True)
    mt.verify(tmp_path)  # no warning: that would be an error here
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    assert '"total_size": 32' in text
    index.write_text(text.replace('"total_size": 32', '"total_size": 33'))
    with pytest.warns(UserWarning, match="total_size 33, but the tensors take 32 bytes"):
        mt.verify(tmp_path)
    with mt.open(tmp_path) as model, pytest.warns(UserWarning, match="total_size 33"):
        mt.verify(model)
    with mt.open(tmp_path, verify="all") as model:  # opening is no place for it
        assert model["a"].tobytes() == tensors["a"].tobytes()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = index_of({"weight_map": {"a": "gone.safetensors"}}, tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        mt.open(index)
    assert caught.value.filename == str(tmp_path / "gone.safetensors")
    assert caught.value.errno == errno.ENOENT


def test_a_broken_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(PART)
    (tmp_path / "bad").write_bytes(raw(ONE.replace('"a"', '"b"'), b"12"))
    with pytest.raises(mt.errors.TruncatedError, match="bad"):
        mt.open(index_of({"weight_map": {"a": "good", "b": "bad"}}, tmp_path))


def test_a_hub_cache_opens(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in (MODELS / "digits-sharded").iterdir():
        (blobs / sha256(path)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{sha256(path)}")
    for place in [snapshot, next(snapshot.glob("*.index.json"))]:
        with mt.open(place) as model:
            assert ours(model) == reference(MODELS / "digits.safetensors")


def test_a_symlink_loop_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for place in [tmp_path / "loop", index_of({"weight_map": {"a": "loop"}}, tmp_path)]:
        with pytest.raises(OSError, match="symbolic links") as caught:
            mt.open(place)
        assert caught.value.errno == errno.ELOOP
        assert caught.value.filename == str(tmp_path / "loop")


# Paths that are no files.

OPEN_MUST_REFUSE = """
import sys
import maptensors as mt
try:
    mt.open(sys.argv[1], backend=sys.argv[2])
except mt.errors.NotRegularError as error:
    assert error.kind == "NotRegular" and isinstance(error, OSError)
    print(error.filename)
"""


@pytest.mark.parametrize("what", ["fifo", "directory", "/dev/zero", "socket", "fifo by link"])
@pytest.mark.parametrize("where", ["path", "shard"])
@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_what_is_no_regular_file_is_refused_without_blocking(
    what: str, where: str, backend: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    match what:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "/dev/zero":
            path.symlink_to("/dev/zero")
        case "socket":
            server = socket.socket(socket.AF_UNIX)
            server.bind(str(path))
            server.close()
        case "fifo by link":
            os.mkfifo(tmp_path / "fifo")
            path.symlink_to("fifo")
    place = path if where == "path" else index_of({"weight_map": {"a": path.name}}, tmp_path)
    out = succeed(OPEN_MUST_REFUSE, place, backend, timeout=60)
    assert out.strip() == str(path)


def test_an_index_that_is_a_fifo_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    out = succeed(OPEN_MUST_REFUSE, tmp_path, "mmap", timeout=60)
    assert out.strip() == str(tmp_path / "model.safetensors.index.json")


@pytest.mark.parametrize("files", [[], ["a.txt"], ["a.safetensors", "b.safetensors"]])
def test_a_directory_without_one_model_is_refused(files: list[str], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_bytes(PART)
    with pytest.raises(mt.errors.NotRegularError) as caught:
        mt.open(tmp_path)
    assert caught.value.filename == str(tmp_path)


def test_a_missing_file_is_not_found_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        mt.open(tmp_path / "none")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, str(tmp_path / "none"))


@pytest.mark.parametrize("path", ["a\0b", b"a\0b"])
def test_a_path_with_nul_is_refused(path: Any) -> None:
    with pytest.raises((ValueError, OSError)):
        mt.open(path)
    if isinstance(path, str):
        with pytest.raises((ValueError, OSError)):
            mt.save({"a": np.zeros(2)}, path)


@pytest.mark.parametrize(
    "path", [None, 3, 3.5, [], [3], object()], ids=lambda p: type(p).__name__ + repr(p)[:6]
)
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        mt.open(path)
    with pytest.raises((TypeError, ValueError)):
        mt.save({"a": np.zeros(2)}, path)


AS_NOBODY = """
import os, sys
import numpy
import maptensors as mt
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
"""


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """A directory that any user can reach."""
    for parent in [tmp_path, *tmp_path.parents]:
        if parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & stat.S_IXOTH:
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
    return tmp_path


def test_a_file_without_permission_is_a_permission_error_with_its_name(public: Path) -> None:
    path = public / "secret.safetensors"
    path.write_bytes(PART)
    path.chmod(0)
    out = succeed(
        AS_NOBODY
        + """
for backend in ["mmap", "pread"]:
    try:
        mt.open(sys.argv[1], backend=backend)
    except PermissionError as error:
        print(error.filename, error.errno)
""",
        path,
    )
    assert out.splitlines() == [f"{path} {errno.EACCES}"] * 2


def test_a_directory_without_permission_is_a_permission_error_not_a_missing_file(public: Path) -> None:
    (public / "closed").mkdir()
    path = public / "closed" / "model.safetensors"
    path.write_bytes(PART)
    (public / "closed").chmod(0)
    out = succeed(
        AS_NOBODY
        + """
for use in [mt.open, lambda p: mt.save({"a": numpy.zeros(2)}, p)]:
    try:
        use(sys.argv[1])
    except PermissionError as error:
        print(error.filename)
""",
        path,
    )
    (public / "closed").chmod(0o700)
    assert out.splitlines() == [str(path)] * 2


def test_a_read_only_directory_refuses_a_save_and_keeps_its_files(public: Path) -> None:
    directory = public / "fixed"
    directory.mkdir()
    (directory / "old.safetensors").write_bytes(PART)
    directory.chmod(0o555)
    out = succeed(
        AS_NOBODY
        + """
for name in ["new.safetensors", "old.safetensors"]:
    path = os.path.join(sys.argv[1], name)
    for use in [lambda: mt.save({"a": numpy.zeros(2)}, path), lambda: mt.create(path, {"a": ("F32", (2,))})]:
        try:
            use()
        except PermissionError as error:
            print(error.filename == path)
""",
        directory,
    )
    directory.chmod(0o755)
    assert out.split() == ["True"] * 4
    assert names_in(directory) == ["old.safetensors"]
    assert (directory / "old.safetensors").read_bytes() == PART


def test_saving_into_a_directory_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        mt.save({"a": np.zeros(2)}, tmp_path / "none" / "x.safetensors")
    assert caught.value.filename == str(tmp_path / "none" / "x.safetensors")


@pytest.mark.parametrize("what", ["directory", "fifo", "device"])
def test_saving_over_what_is_no_file_is_refused(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    match what:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/null")
    before = path.lstat()
    for save in [lambda: mt.save({"a": np.zeros(2)}, path), lambda: mt.create(path, {"a": ("F32", (2,))})]:
        with pytest.raises(mt.errors.NotRegularError) as caught:
            save()
        assert caught.value.filename == str(path)
    assert path.lstat() == before
    assert names_in(tmp_path) == ["x"]
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_file_of_too_many_bytes_for_rlimit_fsize_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    mt.save({"a": np.arange(3.0)}, path)
    before = path.read_bytes()
    out = succeed(
        """
import resource, signal, sys
import numpy
import maptensors as mt
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
path, tensors = sys.argv[1], {"a": numpy.ones(1 << 20)}
for use in [lambda: mt.save(tensors, path), lambda: mt.create(path, tensors)]:
    try:
        use()
    except OSError as error:
        print(error.errno, error.filename == sys.argv[1])
""",
        path,
    )
    assert out.splitlines() == [f"{errno.EFBIG} True"] * 2
    assert path.read_bytes() == before
    assert names_in(tmp_path) == [path.name]


def test_an_address_space_too_small_for_the_map_is_an_os_error(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    head = raw({"a": entry("U8", [1 << 38], 0, 1 << 38)})
    path.write_bytes(head)
    os.truncate(path, len(head) + (1 << 38))
    out = succeed(
        """
import resource, sys
import maptensors as mt
resource.setrlimit(resource.RLIMIT_AS, (1 << 34, 1 << 34))
for backend in ["mmap", "pread"]:
    try:
        mt.open(sys.argv[1], backend=backend)
    except OSError as error:
        print(error.errno, error.filename == sys.argv[1])
    except MemoryError:
        print("MemoryError")
""",
        path,
    )
    assert out.splitlines()[0] == f"{errno.ENOMEM} True"
    assert len(out.splitlines()) == 2


# Where a save goes.


def test_a_symlink_is_replaced_and_its_target_left(tmp_path: Path) -> None:
    target, link = tmp_path / "target.safetensors", tmp_path / "link.safetensors"
    target.write_bytes(PART)
    link.symlink_to(target.name)
    mt.save({"b": np.zeros(2, "f4")}, link)
    assert target.read_bytes() == PART
    assert reference(link).keys() == {"b"}


def test_the_peer_of_a_hard_link_is_unchanged(tmp_path: Path) -> None:
    path, peer = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    path.write_bytes(PART)
    peer.hardlink_to(path)
    mt.save({"b": np.zeros(2, "f4")}, path)
    assert peer.read_bytes() == PART
    assert reference(path).keys() == {"b"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
def test_a_new_file_honours_the_umask_and_a_replacement_keeps_its_mode(umask: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    before = os.umask(umask)
    try:
        mt.save({"a": np.zeros(2)}, path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
        path.chmod(0o640)
        mt.save({"a": np.ones(2)}, path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    finally:
        os.umask(before)


def test_a_file_name_of_255_bytes_works(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    mt.save({"a": np.arange(3.0)}, path)
    assert mt.open(path)["a"].numpy().tolist() == [0, 1, 2]
    with pytest.raises(OSError, match="too long") as caught:
        mt.save({"a": np.arange(3.0)}, tmp_path / ("x" * 256))
    assert caught.value.errno == errno.ENAMETOOLONG
    assert names_in(tmp_path) == [path.name]


def test_a_file_name_that_is_not_utf8_works(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.safetensors"
    mt.save({"a": np.arange(3.0)}, os.fsdecode(path))
    with mt.open(path) as model:
        assert model["a"].numpy().tolist() == [0, 1, 2]
        repr(model)
    with pytest.raises(FileNotFoundError) as caught:
        mt.open(path + b"x")
    assert os.fsencode(caught.value.filename) == path + b"x"


def test_two_savers_on_one_path_leave_one_whole_winner(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    code = """
import sys
import numpy
import maptensors as mt
for _ in range(20):
    mt.save({"a": numpy.full(100_000, int(sys.argv[2]), "f4")}, sys.argv[1], durable=False)
"""
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        done = [pool.submit(succeed, code, path, value) for value in (1, 2, 3)]
        seen = set()
        while not all(future.done() for future in done):
            if path.exists():
                values = np.unique(mt.open(path)["a"].numpy())
                assert len(values) == 1
                seen.add(int(values[0]))
        for future in done:
            future.result()
    assert seen
    assert names_in(tmp_path) == [path.name]


def test_an_array_changed_while_it_is_saved_gives_a_structurally_valid_file(tmp_path: Path) -> None:
    import threading

    array, stop = np.zeros(1 << 22, "f4"), threading.Event()

    def churn() -> None:
        while not stop.is_set():
            array.fill(1)
            array.fill(2)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for i in range(5):
            mt.save({"a": array}, tmp_path / f"{i}", durable=False)
    finally:
        stop.set()
        thread.join()
    for i in range(5):
        assert set(np.unique(mt.open(tmp_path / f"{i}")["a"].numpy())) <= {0.0, 1.0, 2.0}


# Messages.


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_a_value_error_of_its_kind_and_picklable(kind: str) -> None:
    error = CLASSES[kind]("what happened")
    assert isinstance(error, ValueError)
    assert isinstance(error, mt.MapTensorsError)
    assert str(error) == "what happened"
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (type(error), str(error))


def test_the_classes_also_are_what_python_code_expects() -> None:
    assert issubclass(mt.errors.MissingError, KeyError)
    assert issubclass(mt.errors.DTypeError, TypeError)
    assert issubclass(mt.errors.NotRegularError, OSError)
    assert mt.SafetensorError is mt.MapTensorsError


def test_an_unknown_name_gets_near_names() -> None:
    with mt.open(MODELS / "digits.safetensors") as model:
        with pytest.raises(KeyError) as caught:
            model["fc1.wieght"]
        refused(caught, "Missing", '"fc1.weight"')
        assert model.get("fc1.wieght") is None
        assert model.get("fc1.wieght", 3) == 3


@pytest.mark.parametrize("mode", ["w", "r+b", "w+", "rw", "", "C"])
def test_a_mode_that_is_none_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="mode"):
        mt.open(MODELS / "digits.safetensors", mode)


def test_a_hang_is_noticed(tmp_path: Path) -> None:
    # The guard of the tests above: opening a FIFO for reading as a file is opened does block.
    import subprocess

    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(subprocess.TimeoutExpired):
        run_python("import sys; open(sys.argv[1])", tmp_path / "fifo", timeout=2)
