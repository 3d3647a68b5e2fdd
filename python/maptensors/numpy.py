"""The functions of ``safetensors.numpy``, over mapped memory.

Arrays that are loaded are views of the file's pages, copy-on-write: writable, and the file never changes.
bfloat16 and 8-bit floats use ``ml_dtypes``; 4-bit floats are unpacked by copying. Strided and byte-swapped
arrays are saved as what they mean.
"""

import os
from collections.abc import Mapping

import numpy as np

from maptensors import _api, _native

__all__ = ["load", "load_file", "save", "save_file"]


def save(tensor_dict: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return arrays as the bytes of a safetensors file."""
    return _api.dumps(tensor_dict, metadata=metadata)


def save_file(
    tensor_dict: Mapping[str, np.ndarray],
    filename: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    durable: bool = True,
) -> None:
    """Write arrays to a safetensors file, whole or not at all; see :func:`maptensors.save`."""
    _api.save(tensor_dict, filename, metadata=metadata, durable=durable)


def load(data: bytes) -> dict[str, np.ndarray]:
    """Return the arrays in the bytes of a safetensors file, copied once."""
    return _api.loads_bytes(data).numpy()


def load_file(filename: str | os.PathLike[str], *, backend: str = "mmap") -> dict[str, np.ndarray]:
    """Return the arrays in a safetensors file; see :func:`maptensors.open`."""
    return _native.open_whole(filename, backend).numpy()
