"""Which pages of a model are in memory, and which are to be."""

import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Self

from maptensors import _native
from maptensors._api import parse_size
from maptensors._progress import Progress, Told

_TURN = 0.05


class Prefetch:
    """Tensors on their way into memory: :meth:`wait` for them, or ``with``. Dropped, it goes on."""

    def __init__(self, prefetch: _native.Prefetch) -> None:
        self._prefetch = prefetch
        self._error: BaseException | None = None
        self._teller: _Teller | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended: all is there, it was cancelled, or it failed."""
        return self._prefetch.done()

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes that are there, and all that will be."""
        return self._prefetch.progress()

    def cancel(self) -> None:
        """End it early; what is there stays."""
        self._prefetch.cancel()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended: True if all is there, False if it was cancelled.

        What could not be read is raised, with the tensor's name; and what the function that is told of
        progress raised, which cancels it. That function is waited for too: hold no lock here that it takes.
        After ``timeout`` seconds, TimeoutError.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        all_there: bool | None = False
        try:
            all_there = self._prefetch.wait(timeout)
        except Exception as error:
            self._error = error
        if all_there is None:
            raise TimeoutError(f"it was not all in memory within {timeout} seconds; it still comes")
        if self._teller is not None:
            self._error = self._error or self._teller.ended(deadline)
        if self._error is not None:
            raise self._error
        return all_there

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        else:
            self.cancel()

    def __repr__(self) -> str:
        done, total = self.progress
        return f"Prefetch({done} of {total} bytes)"


class _Teller(threading.Thread):
    """Tells of a prefetch in the background. What that raises cancels it, and its ``wait()`` raises it."""

    def __init__(self, prefetch: Prefetch, told: Told) -> None:
        super().__init__(name="maptensors-progress", daemon=True)
        self._prefetch = prefetch._prefetch
        self._told = told
        self._error: BaseException | None = None
        self._is_forgotten = False
        self._end = threading.Event()
        # Once nobody has the prefetch, nobody waits for it.
        weakref.finalize(prefetch, self._forgotten)

    def run(self) -> None:
        try:
            # Sleeps in Python, so that it ends with the interpreter wherever it is.
            _tell(self._prefetch, self._told, self._end.wait)
        except BaseException as error:
            self._error = error
            self._prefetch.cancel()
            if self._is_forgotten:
                raise

    def ended(self, deadline: float | None) -> BaseException | None:
        """Wait until the last has been told, unless it is the one that waits; return what was raised."""
        self._end.set()
        if threading.current_thread() is not self:
            self.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        error, self._error = self._error, None
        return error

    def _forgotten(self) -> None:
        self._is_forgotten = True
        if self._error is not None:
            traceback.print_exception(self._error)


def _tell(prefetch: _native.Prefetch, told: Told, sleep: Callable[[float], object]) -> None:
    try:
        while not prefetch.done():
            told(*prefetch.progress())
            sleep(_TURN)
        told(*prefetch.progress())
    finally:
        told.close()


def prefetch(
    model: _native.Model,
    names: str | Iterable[str] | None,
    wait: bool,
    progress: Progress | bool | None,
    lock: bool,
) -> Prefetch:
    """Begin to bring tensors into memory: :meth:`maptensors.Model.prefetch`."""
    told = Told(progress, "prefetching")
    begun = Prefetch(_native.prefetch(model, names, lock))
    if told and not wait:
        begun._teller = _Teller(begun, told)
        begun._teller.start()
    elif wait:
        try:
            if told:
                _tell(begun._prefetch, told, time.sleep)
            begun.wait()
        except BaseException:
            begun.cancel()
            raise
    return begun


class Stream(Iterator[tuple[str, _native.Tensor]]):
    """Names and tensors, one after the other: :meth:`maptensors.Model.stream`.

    An error concerns one tensor; the next may be asked for. Leaving the loop, :meth:`close`, ``with``, and an
    error of the function that is told of progress end the reading ahead.
    """

    def __init__(self, stream: _native.Stream, told: Told) -> None:
        self._stream = stream
        self._told = told

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes of the tensors that have passed, and of all that will."""
        return self._stream.progress()

    def __next__(self) -> tuple[str, _native.Tensor]:
        tensor = self._stream.next()
        if self._told:
            try:
                self._told(*self._stream.progress())
            except BaseException:
                self.close()
                raise
        if tensor is None:
            self.close()
            raise StopIteration
        return tensor

    def close(self) -> None:
        """End the reading ahead."""
        self._stream.close()
        self._told.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def stream(
    model: _native.Model,
    budget: int | str | None,
    names: str | Iterable[str] | None,
    order: str | Iterable[str] | None,
    progress: Progress | bool | None,
) -> Stream:
    """Begin to read tensors ahead: :meth:`maptensors.Model.stream`."""
    size = parse_size("1GiB" if budget is None else budget)
    given: list[str] | None
    if order is None or order == "file":
        given = None
    elif order == "name":
        given = []
    elif isinstance(order, str):
        raise ValueError(f'order is "file", "name" or a list of names, not {order!r}')
    elif not (given := list(order)):
        raise ValueError("order is a list of no names")
    return Stream(_native.stream(model, names, size, given), Told(progress, "streaming"))


class RankView(Mapping[str, _native.Tensor]):
    """A rank's view of a model: its part of the tensors, by name.

    A part that is contiguous in its file is mapped: of the same pages as the model's tensor, so that an edit
    of one is seen in the other. Any other was read into memory of the rank's own, edits so far included; so
    was a contiguous one that is small, where whole pages would be more than a 20th more.
    """

    def __init__(self, tensors: dict[str, _native.Tensor], asked: int, touched: int, gathered: int) -> None:
        self._tensors = tensors
        #: Bytes of all tensors.
        self.nbytes = asked
        #: Bytes that were touched for them: pages of what is mapped, exactly what was read of the rest.
        self.touched = touched
        #: Bytes that were read into memory of the rank's own.
        self.gathered = gathered

    def __getitem__(self, name: str) -> _native.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"RankView({len(self)} tensors, {self.nbytes} bytes, {self.gathered} of them gathered)"


_SPLITS = {"column": 0, "row": 1, "replicate": None}


def _axis(split: int | str) -> int | None:
    if isinstance(split, str):
        if split not in _SPLITS:
            raise ValueError(
                f'a split is "column", "row", "replicate" or the number of an axis, not {split!r}'
            )
        return _SPLITS[split]
    if split < 0:
        raise ValueError(f"an axis is counted from 0, not {split}")
    return split


def rank_view(
    model: _native.Model,
    rank: int,
    world: int,
    plan: Mapping[str, int | str],
    default: int | str | None,
) -> RankView:
    """Return a rank view: :meth:`maptensors.Model.rank_view`."""
    rules = [(pattern, _axis(split)) for pattern, split in plan.items()]
    if default is not None:
        rules.append(("*", _axis(default)))
    return RankView(*_native.rank_view(model, rank, world, rules))
