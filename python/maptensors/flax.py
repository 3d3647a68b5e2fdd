"""The functions of ``safetensors.flax``, over mapped memory.

On the CPU, JAX arrays alias the file's pages wherever a tensor starts on a 64-byte boundary, as all but the
smallest do in files written here; elsewhere they are copies.
"""

import os
from collections.abc import Mapping

import jax

from maptensors import _api, _native

__all__ = ["load", "load_file", "save", "save_file"]


def save(tensors: Mapping[str, jax.Array], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return arrays as the bytes of a safetensors file."""
    return _api.dumps(tensors, metadata=metadata)


def save_file(
    tensors: Mapping[str, jax.Array],
    filename: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    durable: bool = True,
) -> None:
    """Write arrays to a safetensors file, whole or not at all; see :func:`maptensors.save`."""
    _api.save(tensors, filename, metadata=metadata, durable=durable)


def load(data: bytes) -> dict[str, jax.Array]:
    """Return the arrays in the bytes of a safetensors file."""
    return _api.loads_bytes(data).jax()


def load_file(filename: str | os.PathLike[str], *, backend: str = "mmap") -> dict[str, jax.Array]:
    """Return the arrays in a safetensors file; see :func:`maptensors.open`."""
    # Read-only: JAX holds its arrays to be immutable, and so nobody can write to them by another way.
    return _native.open(filename, "r", backend=backend).jax()
