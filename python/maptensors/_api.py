"""Functions whose arguments want more care than the extension module takes."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from maptensors import _native
from maptensors.errors import MapTensorsError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(size: int | str) -> int:
    """Bytes of ``5_000_000_000``, ``"5GB"`` (powers of 1000) or ``"5GiB"`` (powers of 1024)."""
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", size.upper())
        if match is None:
            raise ValueError(f"a size is a number of bytes or text like '5GB' or '2GiB', not {size!r}")
        number, unit = match[1], match[2] or ""
        size = int(float(number) * (_UNITS | _BINARY)[unit])
    if size <= 0:
        raise ValueError(f"a size must be positive, not {size}")
    # No file is larger than a signed 64-bit offset can say.
    return min(size, 2**63 - 1)


def save(
    tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    durable: bool = True,
    mapped: bool = True,
    max_shard_size: int | str | None = None,
    checksums: bool = False,
) -> None:
    """Write tensors to a safetensors file: one copy, from where they lie into the mapped output.

    ``tensors`` maps names to numpy or JAX arrays, torch tensors, :class:`maptensors.Tensor`, or anything with
    ``__array__`` or ``__dlpack__``. Strided, byte-swapped and device arrays are written right, straight
    into the file's pages. A :class:`maptensors.Model` is saved with its metadata, edits included, also onto
    its own file.

    What has no memory of its own is refused by its name, with what to call instead: sparse, quantized,
    nested and fake tensors, those on the meta device or inside a transform, and subclasses that wrap others.
    So is a dtype that the format cannot say, and a bool that is neither 0 nor 1. What an array says of itself
    is checked against the memory that it has; that nobody frees or resizes that in another thread, until it
    is copied, cannot be.

    The file appears under ``path`` whole or not at all; a failed save leaves what was there. The sharded set
    of that name, if there is one, goes once the file is there: one directory has one model. Refused are a
    name that says another kind of file (``model.safetensors.index.json``, ``model.gguf``), and for a model
    of several files the path of one of them: it is saved over itself as ``model.safetensors``. With
    ``durable=False`` nothing is synced, and a power loss may lose it. ``mapped=False`` writes with
    ``pwrite`` instead of through a mapping, as is done anyway where the file system cannot allocate space.

    With ``checksums`` the file carries one for each tensor in its metadata, for :func:`maptensors.verify` and
    to make deltas against it cheap. A model that carries some is saved with new ones.

    An iterable of pairs is collected first, arrays and all: to make a file tensor by tensor in little memory,
    use :func:`maptensors.create`.

    With ``max_shard_size`` (bytes, or text like ``"5GB"``) what does not fit one file is saved over several,
    named after ``path`` (``model-00001-of-00002.safetensors``), with ``model.safetensors.index.json`` last.

    Ctrl-C on the main thread ends it soon, also while it waits for the disk: what was unfinished is gone, and
    what was there is as it was.
    """
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    given = _metadata(tensors, metadata)
    _native.save(
        tensors,
        path,
        metadata=given,
        durable=durable,
        mapped=mapped,
        max_shard_size=limit,
        checksums=checksums,
    )


def edit(
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    remove: Iterable[str] = (),
    rename: Mapping[str, str] | None = None,
    durable: bool = True,
) -> Literal["in place", "rewritten", "unchanged"]:
    """Change metadata and tensor names in the header of a safetensors file; the data is not touched.

    ``metadata`` holds entries to set, ``remove`` keys to take away, ``rename`` new names by their old ones:
    all at once, so two tensors may exchange theirs. A key cannot be in both.

    Return how. ``"in place"``: by one write of a 512-byte sector, which a power loss cannot tear, while
    nobody else had the file open or mapped. ``"rewritten"``: as by :func:`save`, a new file took its place;
    it shares the old one's blocks where the file system can, and has room for later edits in place.
    ``"unchanged"``: it said all that already.
    """
    if isinstance(remove, str):
        raise TypeError("remove takes several keys: a list, not a str")
    remove = list(remove)
    if isinstance(metadata, Mapping) and (both := sorted(set(remove) & set(metadata))):
        raise MapTensorsError(f"metadata key {both[0]!r} is to be set and removed")
    return _native.edit(
        path,
        metadata={} if metadata is None else metadata,
        remove=remove,
        rename=dict(rename or {}),
        durable=durable,
    )


def dumps(
    tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
    *,
    metadata: Mapping[str, str] | None = None,
    checksums: bool = False,
) -> bytes:
    """Return tensors as the bytes of the file that :func:`save` would write; :func:`loads` reads them."""
    return _native.dumps(tensors, metadata=_metadata(tensors, metadata), checksums=checksums)


def _metadata(tensors: object, metadata: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """Return the metadata to write: a model's own where none is given."""
    if metadata is None and isinstance(tensors, _native.Model) and tensors.has_metadata:
        return tensors.metadata
    return metadata


def loads_bytes(data: bytes) -> _native.Model:
    """As :func:`loads`, of ``bytes`` alone, as safetensors' ``load``."""
    if not isinstance(data, bytes):
        raise TypeError(f"load takes bytes, not {type(data).__name__}; maptensors.loads takes any buffer")
    return _native.loads(data)
