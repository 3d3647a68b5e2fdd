"""What a measured body is, and what several of them share.

A body is a generator. What it does up to its first ``yield`` is set-up; from then on the clock runs, and
each ``yield`` names the phase that has just ended.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from shapes import MIB, Shape

CHUNK = 2 * MIB
BLOCK = 8 * MIB
DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "BF16": "<u2", "F8_E4M3": "u1", "U8": "u1"}


@dataclass(frozen=True)
class Job:
    """What a body works on."""

    shape: Shape
    out: str  # a new file, for savers
    threads: int


Phases = Iterator[str]
Body = Callable[[Job], Phases]
BODIES: dict[str, Body] = {}


def body(function: Body) -> Body:
    BODIES[function.__name__] = function
    return function


def use(arrays: Iterable[Any]) -> int:
    """Read every byte: the sum of the 64-bit words, by numpy on one thread, whoever loaded them."""
    total = 0
    for array in arrays:
        flat = np.asarray(array).reshape(-1).view(np.uint8)
        whole = flat.size & ~7
        total += int(flat[:whole].view(np.uint64).sum()) if whole else 0
        total += int(flat[whole:].sum()) if whole < flat.size else 0
    return total


def plain_header(file: Any) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file as the json module reads it, and where the data starts."""
    length = int.from_bytes(file.read(8), "little")
    table = json.loads(file.read(length))
    table.pop("__metadata__", None)
    return table, 8 + length


def plain_views(buffer: Any, table: dict[str, Any], start: int) -> dict[str, np.ndarray]:
    """Numpy views of a whole file, by hand."""
    data = np.frombuffer(buffer, np.uint8)
    return {name: plain_view(data, entry, start) for name, entry in table.items()}


def plain_view(data: np.ndarray, entry: dict[str, Any], start: int) -> np.ndarray:
    first, end = entry["data_offsets"]
    return data[start + first : start + end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
