"""Checkpoints: saved again and again, into outputs made ready ahead of time."""

import asyncio
import atexit
import contextlib
import operator
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from maptensors import _native
from maptensors._api import parse_size
from maptensors._progress import Bar
from maptensors._state import check_framework, flatten, joined, unflatten
from maptensors.errors import StepWarning


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has been saved, and how long that took."""

    step: int
    #: Its file; in shards, what its files are named after.
    path: str
    #: Bytes of tensor data.
    nbytes: int
    #: What it was written into: "new", "prepared" ahead of time, or "recycled" from an old checkpoint.
    output: str
    #: Seconds from the call until the state was copied.
    staged: float
    #: Seconds from the call until it was visible and, if it is to be, durable.
    finished: float
    #: Whether it survives a power loss.
    durable: bool
    #: The highest step that was there, if this one is below it; see :class:`maptensors.errors.StepWarning`.
    below: int | None = None


class Saving:
    """A checkpoint on its way: :meth:`wait`, ``with``, or ``await`` it. Dropped, it is saved all the same."""

    def __init__(self, saving: _native.Saving) -> None:
        self._saving = saving
        self._error: Exception | None = None

    @property
    def staged(self) -> float:
        """Seconds that staging took."""
        return self._saving.staged

    def wait_staged(self) -> None:
        """Return once the state is copied: it is, as soon as ``save_async`` has returned."""

    def wait(self, timeout: float | None = None) -> Saved:
        """Wait until it is saved; after ``timeout`` seconds raise TimeoutError.

        After NotRemovedError it is saved, and what ``keep`` no longer holds could not be removed.
        """
        if self._error is not None:
            raise self._error
        try:
            saved = self._saving.wait(timeout)
        except Exception as error:
            self._error = error
            raise
        if saved is None:
            raise TimeoutError(f"the checkpoint was not saved within {timeout} seconds; it still will be")
        return Saved(**saved)

    result = wait

    def done(self) -> bool:
        """Whether it is saved, or has failed."""
        return self._saving.done()

    def __await__(self) -> Generator[Any, None, Saved]:
        return asyncio.get_running_loop().run_in_executor(None, self.wait).__await__()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        else:
            # What went wrong inside is what is told.
            with contextlib.suppress(Exception):
                self.wait()


class Checkpointer:
    """The checkpoints of a directory, and the way to save more.

    >>> import maptensors as mt, numpy as np, tempfile
    >>> directory = tempfile.TemporaryDirectory()
    >>> state = {"model": {"w": np.zeros(4)}, "step": 0, "lr": 0.1, "names": ["w"]}
    >>> with mt.Checkpointer(directory.name, keep=2) as checkpoints:
    ...     for step in (100, 200, 300):
    ...         state["model"]["w"] += 1
    ...         saving = checkpoints.save_async(state | {"step": step}, step)  # copied when this returns
    ...     checkpoints.wait()
    ...     checkpoints.steps()
    [200, 300]
    >>> mt.Checkpointer(directory.name).load()
    {'model': {'w': array([3., 3., 3., 3.])}, 'step': 300, 'lr': 0.1, 'names': ['w']}

    A checkpoint is a complete, standard safetensors file called after its step
    (``step-0000000300.safetensors``). A state is a dict of tensors (torch, numpy, JAX), numbers, strings,
    booleans, None, and nested dicts, lists and tuples of them, as ``optimizer.state_dict()`` is; what is no
    tensor travels as JSON in the file's metadata. Anything else is refused by name.

    Saving is a copy into a file that was allocated and brought into memory ahead of time: a new one, or the
    oldest that falls out of ``keep`` and that nobody has open or mapped any more. On disk there are ``keep``
    checkpoints and one output made ready; ``prepare=False`` goes without.

    ``keep`` keeps the last so many, ``keep_every`` also each multiple of so many steps. With
    ``max_shard_size`` larger states are saved in shards, all of them or none. ``durable=False`` does not
    wait for the disk: a power loss may take a checkpoint, and those that it replaced. ``checksums`` puts one
    for each tensor into the file, for :func:`maptensors.verify`. ``example``, a state or a spec as for
    :func:`maptensors.create`, has the first output made ready at once. ``progress`` is called with the bytes
    staged and their total; True shows a bar (a line on stderr where
    ``tqdm`` is not installed).

    A directory that is not there is made by the first save, or for ``example``; looking makes none.

    One Checkpointer at a time saves into a directory, and a fork's child has to open its own. What falls out
    first is what was there before this run: going back to an earlier step loses nothing of the new run.
    :meth:`load` resumes from what was saved last, which then is not the highest step: a save whose step is
    below one that is there is a ``StepWarning``, once for each Checkpointer.

    It stays with the directory that it opened. If that is moved or removed, or a link to it comes to point
    elsewhere, everything is ``MovedError`` from then on, and nothing is saved or removed in it; open the
    checkpoints again, where they are to be. What ``keep`` no longer holds and cannot be removed is
    ``NotRemovedError``, from the save that it should have gone for: that one is saved.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        example: Mapping[str, Any] | None = None,
        *,
        keep: int | None = None,
        keep_every: int | None = None,
        durable: bool = True,
        prepare: bool = True,
        max_shard_size: int | str | None = None,
        checksums: bool = False,
        progress: Callable[[int, int], object] | bool = False,
    ) -> None:
        for name, value in (("keep", keep), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is at least 1, not {value}")
        self.directory = os.path.abspath(os.fspath(directory))
        self._bar = Bar("staging") if progress is True else None
        self._has_warned = False
        self._checkpoints = _native.Checkpoints(
            directory,
            keep=keep,
            keep_every=keep_every,
            durable=durable,
            prepare=prepare,
            max_shard_size=None if max_shard_size is None else parse_size(max_shard_size),
            checksums=checksums,
            progress=self._bar if isinstance(progress, bool) else progress,
        )
        _open.add(self)
        if example is not None and prepare:
            self._checkpoints.prepare(_planned_size(example))

    def save(
        self, state: Mapping[str, Any], step: int, *, metadata: Mapping[str, str] | None = None
    ) -> Saved:
        """Save a state; it is durable when this returns. Ctrl-C cancels it, and leaves nothing of it."""
        saved = Saved(**self._checkpoints.save(*self._prepared(state, step, metadata)))
        self._warn(step, saved.below)
        return saved

    def save_async(
        self, state: Mapping[str, Any], step: int, *, metadata: Mapping[str, str] | None = None
    ) -> Saving:
        """Copy a state and return; it is synced and becomes visible in the background.

        What happens to the state from now on does not reach the file. One more save may be queued behind one
        under way; the next call then waits. An error is raised by the :class:`Saving` returned, or else by
        the next save, :meth:`wait` or :meth:`close`.

        Ctrl-C while it copies cancels it. Later, in any wait, it ends the waiting: the save goes on.
        """
        saving = self._checkpoints.save_async(*self._prepared(state, step, metadata))
        self._warn(step, saving.below)
        return Saving(saving)

    def _warn(self, step: int, below: int | None) -> None:
        if below is None or self._has_warned:
            return
        self._has_warned = True
        warnings.warn(
            f"{self.directory}: step {step} is below step {below}, which is there already. load() takes what "
            f"was saved last, so this run is resumed all the same; but if another run saved step {below}, "
            f"give this one a directory to itself, and if that is abandoned, remove({below})",
            StepWarning,
            stacklevel=3,
        )

    def _prepared(
        self, state: Mapping[str, Any], step: int, metadata: Mapping[str, str] | None
    ) -> tuple[dict[str, Any], int, dict[str, str]]:
        step = _step(step)
        if self._bar is not None:
            self._bar.close()
        tensors, structure = flatten(state)
        # Metadata may be another checkpoint's: what says how this state is made up comes last.
        return tensors, step, joined(metadata, structure | {"maptensors.step": str(step)})

    def steps(self) -> list[int]:
        """Return the steps there are, in order. An unfinished checkpoint is never among them."""
        return self._checkpoints.steps()

    def latest(self) -> int | None:
        """Return the step that was saved last, which is not always the highest (``steps()[-1]``).

        A run that went back, or a new one in an old directory, saves lower steps, and it is that run that is
        to be resumed. What tells is a number that each checkpoint carries in its metadata
        (``maptensors.sequence``), so that copying a directory, editing a header or setting a clock changes
        nothing about it. Files without one were there before all that have one, in the order of their steps.
        One that is damaged counts as the last: loading says so, instead of going back further without a word.
        """
        return self._checkpoints.latest()

    def path(self, step: int | None = None) -> str:
        """Return what to open for a step, or for the latest: a file, or the index of a sharded set."""
        return self._checkpoints.find(None if step is None else _step(step))

    def open(self, step: int | None = None, mode: str = "c", **options: Any) -> _native.Model:
        """Map a checkpoint, or the latest: its tensors by name. ``options`` are those of ``open``.

        The latest may be let go, by another process that saves, before it is opened: then it is the next one.
        """
        step = None if step is None else _step(step)
        return self._checkpoints.open(step, lambda path: _native.open(path, mode, **options))

    def load(self, step: int | None = None, mode: str = "c", *, framework: str | None = None) -> Any:
        """Return the state that was saved at a step, or last: as it was, its tensors mapped from the file.

        Saved last is what :meth:`latest` says, and not the highest step.

        Tensors are of the framework they were saved from; ``framework`` ("torch", "numpy", "jax", or
        "maptensors" for what reads nothing until it is used) has all of them in one. A mapped checkpoint
        stays on disk, even removed, until its arrays are gone. A safetensors file that was not written
        by a Checkpointer is a flat dict of :class:`maptensors.Tensor`.
        """
        check_framework(framework)
        return unflatten(self.open(step, mode), framework)

    def remove(self, step: int) -> bool:
        """Remove the checkpoint of a step, durably, and return whether there was one.

        After going back, say, those behind it. OSError (PermissionError, a read-only file system): it, or a
        part of it, is still there.
        """
        return self._checkpoints.remove(_step(step))

    def wait(self) -> None:
        """Wait for saves under way, and for the next output. An error nobody was told of is raised here."""
        self._checkpoints.wait()

    def close(self) -> None:
        """As :meth:`wait`, and end the background thread."""
        _open.discard(self)
        self._checkpoints.close()

    def __del__(self) -> None:
        # A save under way is finished; an error that nobody was told of is at least printed.
        if hasattr(self, "_checkpoints"):
            self._checkpoints.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpointer({self.directory!r})"


def _step(step: int) -> int:
    """Return a step as what it is: a number that is not negative, and fits 64 bits."""
    try:
        number = operator.index(step)
    except TypeError:
        raise TypeError(f"a step is an integer, not {step!r}") from None
    if not 0 <= number < 2**64:
        raise ValueError(f"a step is from 0 to 2**64 - 1, not {number}")
    return number


def _planned_size(example: Mapping[str, Any]) -> int:
    is_spec = all(isinstance(what, tuple | dict) and _is_declared(what) for what in example.values())
    tensors, structure = (dict(example), {}) if is_spec and example else flatten(example)
    ours = {"maptensors.step": "0", "maptensors.sequence": "0"}
    return _native.planned_size(tensors, metadata=structure | ours)


def _is_declared(what: Any) -> bool:
    """Whether this is ``(dtype, shape)`` or a dict of both, as in a spec."""
    if isinstance(what, dict):
        return set(what) == {"dtype", "shape"}
    return len(what) == 2 and isinstance(what[1], tuple | list)


#: To be closed when the interpreter ends, whoever still holds them: saves under way are finished.
_open: "weakref.WeakSet[Checkpointer]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for checkpoints in list(_open):
        try:
            checkpoints.close()
        except Exception as error:
            print(f"maptensors: {checkpoints}: {error}", file=sys.stderr)
