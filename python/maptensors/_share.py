"""Live weights: published by one process, generation after generation, and held by any number of others."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from maptensors import _native
from maptensors._state import STATE, check_framework, flatten, joined, named_in, unflatten
from maptensors.errors import MapTensorsError


def _place(place: str | os.PathLike[str]) -> str:
    """Return what is named: a text is a name or a path, a path is a path (of which pathlib takes a "./")."""
    path = os.fspath(place)
    return path if isinstance(place, str) or os.sep in path else os.path.join(os.curdir, path)


class Publisher:
    """The one process that publishes under a name or into a directory; see :func:`maptensors.publish`."""

    def __init__(
        self, place: str | os.PathLike[str], *, permissions: int = 0o600, recycle: bool = True
    ) -> None:
        self._publisher = _native.Publisher(_place(place), permissions=permissions, recycle=recycle)

    def publish(
        self,
        state: Mapping[str, Any],
        *,
        changed: Iterable[str] | Literal["compare"] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> int:
        """Publish a state as the next generation, whose number is returned; attached processes are woken.

        ``state`` is what a :class:`Checkpointer` takes: tensors of any framework, numbers and strings in
        nested dicts and lists; or a :class:`Model`. Tensors are copied, once. With ``changed``, the names of
        those that changed (``"model.fc1.weight"`` for a nested one, any of its names for one that is there
        under several), only these are; the others are shared with the generation before, and must be as they
        were then. ``"compare"`` finds out, by comparing every tensor's values with what is published. Of a
        copy-on-write :class:`Model` nothing need be said: what it has changed is known.

        After NotRemovedError it is published, and an older file could not be removed.
        """
        given: list[str] | None = None
        if isinstance(changed, str) and changed != "compare":
            raise TypeError('changed takes several names: a list, or "compare"')
        if changed is not None and changed != "compare":
            given = list(changed)
        tensors: Any
        tensors, structure = (
            (state, dict(state.metadata)) if isinstance(state, _native.Model) else flatten(state)
        )
        if given is not None and STATE in structure:
            given = named_in(structure[STATE], tensors, given)
        return self._publisher.publish(
            tensors,
            metadata=joined(metadata, structure),
            changed=given,
            compare=changed == "compare",
        )

    @property
    def generation(self) -> int:
        """The number of the last generation published, also by a process before; 0: there is none."""
        return self._publisher.generation

    @property
    def path(self) -> str:
        """The directory of the publication, which other processes may attach to by its path."""
        return self._publisher.path

    def close(self) -> None:
        """Publish no more. The last generation stays in memory, for who attaches and the next publisher.

        Of a publication that has none yet nothing stays. OSError: a file that is of no use could not be
        removed.
        """
        self._publisher.close()

    def remove(self) -> None:
        """Take the publication away. Attached processes are told, and keep what they hold."""
        self._publisher.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Publisher({self.path!r}, generation {self.generation})"


@dataclass(frozen=True, slots=True)
class Publication:
    """What was found to be published; see :func:`maptensors.publications`."""

    #: Its name; None where it is known by a path.
    name: str | None
    #: Its directory.
    path: str
    #: The number of the current generation; 0: there is none.
    generation: int
    #: Tensors of the current generation.
    tensors: int
    #: Their bytes.
    nbytes: int
    #: Bytes that its files take, in memory or on a disk.
    allocated: int
    #: Of these, in files that the current generation does not use: kept to be written again, or left by a
    #: publisher that was killed.
    spare: int
    #: Of these, in files that are being written, or were when their publisher was killed. (What is written
    #: into a new file is not seen until it is published, and goes with its publisher.)
    unfinished: int
    #: Whether anybody publishes there now.
    publishing: bool
    #: The process that does, or did last; 0: not known.
    process: int
    #: When the current generation was written, as ``time.time()`` counts; None: there is none.
    published: float | None
    #: What is wrong with it; None: nothing.
    damage: str | None

    def remove(self) -> int:
        """Take it away, with all that its publishers left, and return how many bytes its files took.

        BusyError while anybody publishes there. Who is attached is told, and keeps what is held: the memory
        of that is free once they let go.
        """
        return _native.remove_publication(self.path if self.name is None else self.name)


class Subscriber:
    """A process's hold on the current generation of a publication; see :func:`maptensors.attach`."""

    def __init__(
        self,
        place: str | os.PathLike[str],
        mode: Literal["r", "c"] = "c",
        *,
        timeout: float | None = 0.0,
    ) -> None:
        self._subscriber = _native.Subscriber(_place(place), mode, timeout=timeout)

    @property
    def model(self) -> _native.Model:
        """The generation held: its tensors by name. They stay as they are, whatever is published."""
        return self._subscriber.model

    def state(self, *, framework: str | None = None) -> Any:
        """Return the generation held as it was published, its tensors mapped.

        They are of the framework they were published from, or all of one: "torch", "numpy", "jax", or
        "maptensors" for what reads nothing until it is used.
        """
        check_framework(framework)
        return unflatten(self.model, framework)

    @property
    def generation(self) -> int:
        """The number of the generation held."""
        return self._subscriber.generation

    @property
    def latest(self) -> int:
        """The number of the last generation published."""
        return self._subscriber.latest

    @property
    def changed(self) -> bool:
        """Whether there is a newer generation than the one held."""
        return self.latest != self.generation

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until there is a newer generation than that held; False if ``timeout`` seconds pass first.

        PublicationError says that the publication was removed. A publisher that ended without, or was killed,
        is silence: the next one may come.
        """
        return self._subscriber.wait(timeout)

    def refresh(self) -> frozenset[str] | None:
        """Hold the newest generation, and return the names that differ; None if it was held already.

        What was taken of the generation before stays as it is. Tensors that were published since are compared
        with it, up to the first byte that differs; one that was published again as it was is read whole. To
        spare every process that, publish with ``changed``.
        """
        names = self._subscriber.refresh()
        return None if names is None else frozenset(names)

    def updates(self, timeout: float | None = None) -> Iterator[frozenset[str]]:
        """Go on to each newer generation as it comes, yielding the names of the tensors that differ.

        Generations that come faster than they are asked for are passed over. Ends when ``timeout`` seconds
        pass without one, and with PublicationError when the publication is removed.
        """
        while self.wait(timeout):
            names = self.refresh()
            if names is not None:
                yield names

    def close(self) -> None:
        """Let go. Tensors and arrays already taken keep their memory."""
        self._subscriber.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        try:
            held = f"generation {self.generation}"
        except MapTensorsError:
            held = "closed"
        return f"Subscriber({self._subscriber.path!r}, {held})"


def publish(
    place: str | os.PathLike[str],
    state: Mapping[str, Any] | None = None,
    *,
    changed: Iterable[str] | Literal["compare"] | None = None,
    metadata: Mapping[str, str] | None = None,
    permissions: int = 0o600,
    recycle: bool = True,
) -> Publisher:
    """Publish a state to other processes of this machine, and return what publishes the next generations.

    >>> import maptensors as mt, numpy as np, tempfile
    >>> place = tempfile.mkdtemp() + "/policy"
    >>> publisher = mt.publish(place, {"w": np.zeros(3), "b": np.ones(2)})
    >>> weights = mt.attach(place)  # in any process
    >>> publisher.publish({"w": np.full(3, 2.0), "b": np.ones(2)}, changed=["w"])
    2
    >>> weights.changed, weights.refresh(), weights.model["w"].numpy()
    (True, frozenset({'w'}), array([2., 2., 2.]))
    >>> publisher.remove()

    ``place`` is a name (``"policy"``), which stands for a directory in shared memory that only this user
    can look into, or the path of a directory (``"./policy"``, ``"/data/policy"``), which is made. There its
    tensors lie in ordinary safetensors files. Other processes see the generation before or this one, whole.
    Its files are never written again as long as anybody has them open or mapped; when nobody has, the next
    generation may be written into them (``recycle``), or they are removed.

    One process at a time publishes to a place, until it closes or ends, however it ends; the next one goes
    on counting. If the first generation fails, nothing is left: no file, and no directory that was made.

    Only this user may attach unless ``permissions``, of the files, say more; those of a directory that is
    made follow from them. One that is there is opened as far as that, or it is an error that says why it
    cannot be; it is never closed to anybody, for it may hold more. Files that were published there before get
    them too. In another user's place, root publishes files of that user.
    """
    publisher = Publisher(place, permissions=permissions, recycle=recycle)
    if state is not None:
        try:
            publisher.publish(state, changed=changed, metadata=metadata)
        except BaseException as error:
            try:
                publisher.close()
            except OSError as left:
                error.add_note(f"and what was begun could not be removed: {left}")
            raise
    return publisher


def attach(
    place: str | os.PathLike[str], mode: Literal["r", "c"] = "c", *, timeout: float | None = 0.0
) -> Subscriber:
    """Hold the current generation of what another process publishes: no copy, the same pages for everyone.

    ``mode`` is that of :func:`maptensors.open`: with ``"c"``, the default, arrays may be written and only
    this process sees it; with ``"r"`` they cannot be written, and what generations share is mapped once.
    ``timeout`` is how many seconds to wait for a publication that is not there yet; None: for ever. One that
    is damaged is an error after a second: no publisher repairs it.

    If the publisher ends, even killed, what it published last stays: until another goes on, the machine is
    restarted, or somebody removes it (:meth:`Publisher.remove`; :func:`publications` finds what was left).
    One that was removed is over for who is attached, also if another of that name begins: attach again.
    """
    return Subscriber(place, mode, timeout=timeout)


def publications(*places: str | os.PathLike[str]) -> list[Publication]:
    """Find what is published: at these places, or all that has a name, also if its publisher was killed.

    >>> import maptensors as mt, numpy as np, tempfile
    >>> place = tempfile.mkdtemp() + "/policy"
    >>> publisher = mt.publish(place, {"w": np.zeros(1000)})
    >>> [found] = mt.publications(place)  # mt.publications(): all that have a name
    >>> found.generation, found.tensors, found.nbytes, found.publishing
    (1, 1, 8000, True)
    >>> publisher.close()  # or killed: the last generation stays, and takes memory
    >>> [found] = mt.publications(place)
    >>> found.publishing, found.remove() == found.allocated
    (False, True)

    Looking is in nobody's way: no directory is made, no lock taken. What is damaged is found too, and its
    ``damage`` says how. A place where nothing is published is an error. `maptensors publications`, on the
    command line, shows the same, and how many processes hold each.
    """
    found = _native.publications([_place(place) for place in places] if places else None)
    return [Publication(**facts) for facts in found]
