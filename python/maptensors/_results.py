"""What questions are answered with: named tuples, alike wherever the question is asked."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from maptensors import _native


class TensorInfo(NamedTuple):
    """Where a tensor is, and what: :meth:`maptensors.Model.info`.

    >>> import maptensors as mt
    >>> mt.open("models/digits.safetensors").info("fc1.bias").shape
    (64,)
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    #: The file, as it was opened; empty for bytes.
    path: str
    #: In the file, in bytes.
    offset: int
    nbytes: int


class Residency(NamedTuple):
    """Which pages are in memory, and whose: :meth:`maptensors.Model.residency`.

    >>> import maptensors as mt
    >>> mt.open("models/digits.safetensors").residency().private
    0
    """

    #: Bytes in a page. All others are numbers of pages.
    page_size: int
    #: That hold any byte of what was asked about.
    pages: int
    #: In memory, put there by anyone.
    resident: int
    #: Touched by this process.
    touched: int
    #: This process's alone, because they were written.
    private: int
    #: Held in memory by a lock.
    locked: int
    #: Mapped as huge pages.
    huge: int


class Evicted(NamedTuple):
    """What giving pages back came to, in bytes: :meth:`maptensors.Model.evict`.

    >>> import maptensors as mt
    >>> mt.open("models/digits.safetensors").evict().kept
    0
    """

    #: No longer in memory.
    freed: int
    #: In memory still, because they were edited: they are nowhere else.
    kept: int
    #: In the page cache still, because others use them, or the file lies in memory (tmpfs). Of another user's
    #: file only what this process still maps is known; in mode "c" that is given back when memory runs out.
    remaining: int


class Change(NamedTuple):
    """How much of one tensor changed: a value of :class:`maptensors.Changes`.

    >>> import maptensors as mt
    >>> model = mt.open("models/digits.safetensors")
    >>> model["fc1.bias"].numpy()[:2] = 9
    >>> model.changed()["fc1.bias"].elements
    2
    """

    #: Elements that differ. Where elements are packed several to the byte, bytes are counted.
    elements: int
    #: That those elements take.
    bytes: int
    #: That hold any of them.
    pages: int
    #: Of the whole tensor.
    nbytes: int


class Differences(NamedTuple):
    """How a second model differs from a first: :func:`maptensors.diff`.

    >>> import maptensors as mt
    >>> mt.diff("models/digits.safetensors", "models/digits.safetensors").equal
    True
    """

    #: Whether they are the same: tensors and metadata.
    equal: bool
    #: Tensors in both, of one dtype and shape, whose elements differ.
    changed: "_native.Changes"
    #: Tensors of the second only.
    added: list[str]
    #: Tensors of the first only.
    removed: list[str]
    #: Tensors in both with another dtype or shape: those in the first, and those in the second.
    reshaped: dict[str, tuple[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]]]
    #: Metadata keys that are in one only, or have another value. Checksums do not count.
    metadata: list[str]
    #: How many tensors are in both, of one dtype and shape.
    compared: int
