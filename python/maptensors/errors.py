"""What can go wrong, by name.

Every error about a file's content or an argument is a :class:`MapTensorsError`, which is a ``ValueError``.
What the operating system refuses is the ``OSError`` subclass of its errno (``FileNotFoundError``,
``PermissionError``, …) with ``filename`` set. A :class:`StepWarning` is a warning, and no error.
"""

from typing import ClassVar


class MapTensorsError(ValueError):
    """Base of all errors of this package but the operating system's."""

    kind: ClassVar[str] = "Argument"

    def __str__(self) -> str:
        # KeyError, a base of MissingError, would show the message's repr.
        return str(self.args[0]) if self.args else ""


class TruncatedError(MapTensorsError):
    """The file ends before what its header declares."""

    kind = "Truncated"


class LimitError(MapTensorsError):
    """A number is larger than any sound file has, or than this process may have (locked memory)."""

    kind = "Limit"


class Utf8Error(MapTensorsError):
    """The header is not UTF-8."""

    kind = "Utf8"


class JsonError(MapTensorsError):
    """The header or index is not the JSON it should be."""

    kind = "Json"


class DuplicateError(MapTensorsError):
    """A name is there twice."""

    kind = "Duplicate"


class DTypeError(MapTensorsError, TypeError):
    """A dtype is unknown, or not one that can be held where it was asked for."""

    kind = "DType"


class SizeOverflowError(MapTensorsError, OverflowError):
    """A shape describes more bytes than can be counted."""

    kind = "Overflow"


class LayoutError(MapTensorsError):
    """Tensor data overlaps, leaves a hole, runs backwards, or does not fill the file."""

    kind = "Layout"


class ShapeError(MapTensorsError):
    """A byte range does not have the length that shape and dtype ask for."""

    kind = "Shape"


class AlignError(MapTensorsError):
    """Packed elements are cut inside a byte, or a tensor to be edited in its file is misaligned."""

    kind = "Align"


class BitPatternError(MapTensorsError):
    """A bit pattern is no value of its type: a bool that is neither 0 nor 1; ``tensors`` names whose."""

    kind = "Value"
    tensors: list[str]


class ShardPathError(MapTensorsError):
    """A shard that an index names is not in the index's directory, or below it."""

    kind = "Path"


class MissingError(MapTensorsError, KeyError):
    """There is no such tensor."""

    kind = "Missing"


class NotRegularError(MapTensorsError, OSError):
    """The path is a directory without a model, a FIFO, a device or a socket."""

    kind = "NotRegular"


class BusyError(MapTensorsError):
    """Somebody else has it, and only one can: a second publisher."""

    kind = "Busy"


class PublicationError(MapTensorsError):
    """A publication is not there yet, is gone, or is damaged."""

    kind = "Publication"


class ChecksumError(MapTensorsError):
    """Content is not what its checksum says; ``tensors`` names what differs."""

    kind = "Checksum"
    tensors: list[str]


class BaseMismatchError(MapTensorsError):
    """A delta is applied to a model that it was not made against."""

    kind = "Base"


class DeltaError(MapTensorsError):
    """A file is no delta, or one that contradicts itself."""

    kind = "Delta"


class ChangedError(MapTensorsError):
    """A file is not as it was when it was opened with ``guard=True``."""

    kind = "Changed"


class MovedError(MapTensorsError, OSError):
    """A directory is not where it was opened any more: moved, removed, or a link to it points elsewhere.

    What is saved as one file (``save``, a draft) is then saved in that directory, whole, and the message says
    where it is; of a sharded set, a checkpoint and a publication nothing is.
    """

    kind = "Moved"


class NotRemovedError(MapTensorsError, OSError):
    """What was saved is in place and visible, but something that was to go could not be removed.

    ``filename`` is what was saved, ``filename2`` what is still there.
    """

    kind = "NotRemoved"


class NotDurableError(MapTensorsError, OSError):
    """The new file is in place and visible, but may be gone after a power loss."""

    kind = "NotDurable"


class StepWarning(UserWarning):
    """A checkpoint was saved whose step is below one that is there.

    It is what ``load()`` resumes from, being saved last. Where the higher one is another run's, a directory
    for each run keeps them apart; where it is abandoned, ``Checkpointer.remove`` takes it away.
    """


#: The class for each kind of error.
BY_KIND: dict[str, type[MapTensorsError]] = {
    cls.kind: cls
    for cls in (
        MapTensorsError,
        TruncatedError,
        LimitError,
        Utf8Error,
        JsonError,
        DuplicateError,
        DTypeError,
        SizeOverflowError,
        LayoutError,
        ShapeError,
        AlignError,
        BitPatternError,
        ShardPathError,
        MissingError,
        NotRegularError,
        BusyError,
        PublicationError,
        ChecksumError,
        BaseMismatchError,
        DeltaError,
        ChangedError,
        MovedError,
        NotRemovedError,
        NotDurableError,
    )
}
