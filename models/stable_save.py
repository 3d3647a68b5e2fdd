"""Write safetensors files with the reference library, the same bytes every time.

The reference keeps the metadata in a hash map with a random order, so two saves
of one file with two or more metadata keys can differ. Everything else it writes
is already in a fixed order. Here the reference does the writing and then only
the metadata keys are put in order; no length and no offset changes.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import TensorSpec, serialize

LENGTH_BYTES = 8


def spec(array: np.ndarray) -> TensorSpec:
    """Describe `array`, which the caller must keep alive until it is written."""
    # The reference reads raw memory and never looks at strides: a transposed or
    # strided array would be written wrongly without an error.
    if not array.flags.c_contiguous:
        raise ValueError("only a contiguous array can be written")
    return TensorSpec(
        dtype=array.dtype.name,
        shape=array.shape,
        data_ptr=array.ctypes.data,
        data_len=array.nbytes,
    )


def join(header: bytes, data: bytes) -> bytes:
    """Make a file of a JSON header and the data that follows it."""
    return len(header).to_bytes(LENGTH_BYTES, "little") + header + data


def split(contents: bytes) -> tuple[bytes, bytes]:
    """Undo `join`."""
    length = int.from_bytes(contents[:LENGTH_BYTES], "little")
    end = LENGTH_BYTES + length
    return contents[LENGTH_BYTES:end], contents[end:]


def order_metadata(contents: bytes) -> bytes:
    """Sort the metadata keys of a file; touch nothing else."""
    header, data = split(contents)
    entries = json.loads(header)
    if "__metadata__" not in entries:
        return contents
    entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":"))
    ordered = text.encode().ljust(len(header))
    if len(ordered) != len(header):
        raise ValueError("the header was not written the way this script expects")
    return join(ordered, data)


def save_specs(
    path: Path,
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write described tensors to `path`."""
    given = None if metadata is None else dict(metadata)
    path.write_bytes(order_metadata(bytes(serialize(dict(specs), metadata=given))))


def save_arrays(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write arrays to `path`."""
    save_specs(path, {name: spec(array) for name, array in arrays.items()}, metadata)
