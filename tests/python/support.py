"""What several test files need: paths, raw files, and independent looks at memory."""

import contextlib
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"
GOLDEN = MODELS / "golden"
PAGE = os.sysconf("SC_PAGE_SIZE")


def soon(check: Callable[[], None]) -> None:
    """Assertions that hold now or soon: of what the kernel has in page tables.

    It takes pages of files out when it likes, locked ones too: it splits a large one where it makes memory
    contiguous. They come back when they are touched, so ``check`` first touches them.
    """
    for _ in range(100):
        with contextlib.suppress(AssertionError):
            return check()
        time.sleep(0.02)
    return check()


#: Bits of one element of each dtype of the format.
BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

#: Names that dtypes have in numpy and ml_dtypes.
NUMPY_NAMES = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}


def raw(header: Mapping[str, Any] | str | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file of exactly this header and data; ``length`` lies about the header's."""
    if isinstance(header, Mapping):
        header = json.dumps(header, separators=(",", ":"))
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Read(NamedTuple):
    """A tensor as the reference reader gives it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def reference(source: Path | bytes) -> dict[str, Read]:
    """Every tensor of a file, read by the reference implementation."""
    data = source if isinstance(source, bytes) else source.read_bytes()
    return {
        name: Read(info["dtype"], tuple(info["shape"]), bytes(info["data"]))
        for name, info in safetensors.deserialize(data)
    }


def ours(model: Any) -> dict[str, Read]:
    """Every tensor of an open model, in the same form."""
    return {name: Read(t.dtype, t.shape, t.tobytes()) for name, t in model.items()}


def torch_bytes(tensor: Any) -> bytes:
    """The bits of a torch tensor, whatever its dtype."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class Region(NamedTuple):
    """A line of /proc/self/maps."""

    start: int
    end: int
    perms: str
    offset: int
    path: str


def regions() -> Iterator[Region]:
    line = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) \S+ \d+ *(.*)")
    for text in Path("/proc/self/maps").read_text().splitlines():
        start, end, perms, offset, path = line.fullmatch(text).groups()
        yield Region(int(start, 16), int(end, 16), perms, int(offset, 16), path)


def mapped_from(path: Path) -> list[Region]:
    """The regions the kernel says are mapped from this file (also once it is deleted)."""
    names = {str(path.resolve()), f"{path.resolve()} (deleted)"}
    return [region for region in regions() if region.path in names]


def file_offset(path: Path, address: int, nbytes: int = 1) -> int | None:
    """Which byte of the file lies at ``address``; None if not all of ``nbytes`` there are mapped from it."""
    found, at = None, address
    for region in sorted(mapped_from(path)):
        if region.start <= at < region.end:
            if found is None:
                found = region.offset + at - region.start
            at = region.end
            if at >= address + nbytes:
                return found
    return None


def run_python(
    code: str, *args: object, timeout: float = 120, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own; a hang is a failure."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
    )


def succeed(code: str, *args: object, timeout: float = 120, env: Mapping[str, str] | None = None) -> str:
    """As :func:`run_python`, for what must exit with 0; returns what it printed."""
    done = run_python(code, *args, timeout=timeout, env=env)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def names_in(directory: Path) -> list[str]:
    """Everything in a directory, hidden files too."""
    return sorted(os.listdir(directory))


@contextlib.contextmanager
def limited() -> Iterator[Path]:
    """A control group of memory, version 1 or 2; skips loudly where there can be none."""
    roots = [
        root for root in ("/sys/fs/cgroup/memory", "/sys/fs/cgroup") if Path(root, "cgroup.procs").exists()
    ]
    group = Path(roots[0] if roots else "/nowhere", f"maptensors-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        if not any((group / name).exists() for name in ("memory.max", "memory.limit_in_bytes")):
            pytest.skip("this control group does not limit memory")
        yield group
    finally:
        group.rmdir()


def limit(group: Path, size: int) -> None:
    """Let the processes of a group have so many bytes of memory, and no swap."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        if (group / name).exists():
            (group / name).write_text(str(size))
    for name in ("memory.swap.max", "memory.memsw.limit_in_bytes"):
        with contextlib.suppress(OSError):
            (group / name).write_text("0" if "swap" in name else str(size))


def in_group(group: Path, *command: str) -> list[str]:
    """Run a command in a group from its start: memory is charged where it is first touched."""
    return ["sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$0" "$@"', *command]
