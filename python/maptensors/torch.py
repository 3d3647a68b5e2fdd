"""The functions of ``safetensors.torch``, over mapped memory.

Tensors that are loaded are the file's pages, copy-on-write: writable like any tensor, and the file never
changes. Each has a storage of its own.
"""

import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from maptensors import _api, _native
from maptensors._state import joined
from maptensors.errors import MapTensorsError

__all__ = ["load", "load_file", "load_model", "save", "save_file", "save_model"]


def save(tensors: dict[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return tensors as the bytes of a safetensors file.

    Raises as :func:`save_file` does.
    """
    _check(tensors)
    return _api.dumps(tensors, metadata=metadata)


def save_file(
    tensors: dict[str, torch.Tensor],
    filename: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    durable: bool = True,
) -> None:
    """Write tensors to a safetensors file, whole or not at all; see :func:`maptensors.save`.

    As in safetensors, ``ValueError`` is raised for sparse and non-contiguous tensors and ``RuntimeError`` for
    tensors that share memory: :func:`save_model` knows what to do with those, and :func:`maptensors.save`
    writes each by its own.
    """
    _check_kinds(tensors)
    if not _native.save(tensors, filename, metadata=metadata, durable=durable, distinct=True):
        # Something is shared, strided or on a device: look closely, and say what.
        _check(tensors)
        _api.save(tensors, filename, metadata=metadata, durable=durable)


def load(data: bytes) -> dict[str, torch.Tensor]:
    """Return the tensors in the bytes of a safetensors file, copied once."""
    return _api.loads_bytes(data).torch()


def load_file(
    filename: str | os.PathLike[str], device: str | int | torch.device = "cpu", *, backend: str = "mmap"
) -> dict[str, torch.Tensor]:
    """Return the tensors in a safetensors file, on ``device``; see :func:`maptensors.open`."""
    if device == "cpu":
        return _native.open_whole(filename, backend).torch()
    # A device copies from read-only pages, which it then does not make this process's own.
    return _native.open(filename, backend=backend).torch(device)


def save_model(
    model: torch.nn.Module,
    filename: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    force_contiguous: bool = True,
    *,
    durable: bool = True,
) -> None:
    """Save a module's state, each shared tensor once.

    The metadata says for each name left out which name has its tensor. With ``force_contiguous=False`` a
    non-contiguous tensor is refused instead of being written in C order.
    """
    state = model.state_dict()
    extra = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if extra:
        raise MapTensorsError(
            f"{', '.join(map(repr, extra))} in the state_dict() is no tensor: save_model holds tensors "
            "only. maptensors.Checkpointer saves a whole state, numbers and strings too."
        )
    notes = joined(metadata, {})
    for kept, dropped in _duplicates(state).items():
        for name in dropped:
            notes.setdefault(name, kept)
            del state[name]
    if force_contiguous:
        # Strided tensors are gathered on their way into the file.
        _check_kinds(state)
        _api.save(state, filename, metadata=notes or None, durable=durable)
        return
    try:
        save_file(state, filename, notes or None, durable=durable)
    except ValueError as error:
        error.add_note("save_model(..., force_contiguous=True) writes such tensors in C order")
        raise


def load_model(
    model: torch.nn.Module,
    filename: str | os.PathLike[str],
    strict: bool = True,
    device: str | int | torch.device = "cpu",
    *,
    backend: str = "mmap",
) -> tuple[set[str], list[str]]:
    """Load a file written by :func:`save_model` into a module.

    Returns the names missing from the file and those in it that the module does not have; with ``strict``,
    raises ``RuntimeError`` if there are any. A module on the meta device has no memory to load into, and is
    refused: ``model.to_empty(device="cpu")`` gives it some, ``model.load_state_dict(load_file(filename),
    assign=True)`` that of the file.
    """
    state = load_file(filename, device=device, backend=backend)
    target = model.state_dict()
    _check_target({name: tensor for name, tensor in target.items() if name in state})
    shared = _duplicates(target, preferred=state.keys())
    found, unexpected = model.load_state_dict(state, strict=False)
    missing = set(found)
    for dropped in shared.values():
        for name in dropped:
            if name in missing:
                missing.remove(name)
            else:
                unexpected.append(name)
    if strict and (missing or unexpected):
        lines = [f"Error(s) in loading state_dict for {model.__class__.__name__}:"]
        if missing:
            lines.append(f"    Missing key(s) in state_dict: {_listed(missing)}")
        if unexpected:
            lines.append(f"    Unexpected key(s) in state_dict: {_listed(unexpected)}")
        raise RuntimeError("\n".join(lines))
    return missing, unexpected


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in sorted(names))


def _check_target(tensors: dict[str, torch.Tensor]) -> None:
    """Refuse to load where copying would do nothing."""
    if type(torch.empty(0)) is not torch.Tensor:
        raise MapTensorsError(
            "nothing can be loaded under FakeTensorMode, or another mode that makes tensors without values"
        )
    void = [
        name
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and _has_no_values(tensor)
    ]
    if void:
        more = f" and {len(void) - 1} more" if len(void) > 1 else ""
        raise MapTensorsError(
            f"{void[0]!r}{more} of the module cannot be loaded into: on the meta device, or fake, it has no "
            'memory. Call model.to_empty(device="cpu") first, or '
            "model.load_state_dict(load_file(filename), assign=True)."
        )


def _has_no_values(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or any(cls.__name__ == "FakeTensor" for cls in type(tensor).__mro__)


def _check(tensors: dict[str, torch.Tensor]) -> None:
    """Raise what safetensors raises for what it does not save."""
    _check_kinds(tensors)
    memories = _memories(tensors)
    sharing = [sorted(names) for names in _sharing(memories) if len(names) > 1]
    if sharing:
        raise RuntimeError(
            f"Some tensors share memory: {sharing}. Saving each would duplicate it on disk and untie them "
            "when loaded. save_model keeps one of each; maptensors.save writes them all."
        )
    for name, memory in memories.items():
        if not memory.contiguous:
            raise ValueError(
                f"You are trying to save a non contiguous tensor: `{name}`. Call `.contiguous()` on it, or "
                "save with maptensors.save, which writes it in C order."
            )


def _check_kinds(tensors: dict[str, torch.Tensor]) -> None:
    if not isinstance(tensors, dict):
        raise ValueError(f"Expected a dict of [str, torch.Tensor] but received {type(tensors)}")
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"Key `{name}` is invalid, expected torch.Tensor but received {type(tensor)}")


class _Memory(NamedTuple):
    """What ``_native.torch_memory`` says."""

    #: Device, first byte and one past the last.
    storage: tuple[str, int, int]
    #: First byte of the elements, and one past the last.
    span: tuple[int, int]
    #: Bytes that the elements take.
    filled: int
    #: How they are to be read.
    reading: tuple[object, ...]
    contiguous: bool


def _memories(tensors: Mapping[str, torch.Tensor]) -> dict[str, _Memory]:
    """Where each tensor lies that has memory of its own, and elements."""
    found = _native.torch_memory(list(tensors.values()))
    return {name: _Memory(*memory) for name, memory in zip(tensors, found, strict=True) if memory is not None}


def _sharing(memories: Mapping[str, _Memory]) -> list[set[str]]:
    """Groups of names whose tensors overlap in memory; a tensor on its own is a group of one."""
    groups: list[set[str]] = []
    before: tuple[str, int, int] | None = None
    end = -1
    for memory, name in sorted((memory, name) for name, memory in memories.items()):
        start, stop = memory.span
        if memory.storage == before and start < end:
            groups[-1].add(name)
        else:
            groups.append({name})
            end = -1
        before, end = memory.storage, max(end, stop)
    return groups


def _duplicates(state: Mapping[str, torch.Tensor], preferred: Iterable[str] = ()) -> dict[str, list[str]]:
    """For each group of names that share memory: the one to keep, and the others.

    Only a tensor that covers its whole storage can stand for the others. Of several, one that is in
    ``preferred`` (the names in the file being loaded) wins, else the first by name.
    """
    wanted = set(preferred)
    memories = _memories(state)
    kept: dict[str, list[str]] = {}
    for group in _sharing(memories):
        if len(group) == 1:
            continue
        whole = {name for name in group if _covers_storage(memories[name])}
        if not whole:
            raise RuntimeError(
                f"Tensors {sorted(group)} share memory, and none covers all of it: none can stand for the "
                "others, and saving each would store the memory more than once."
            )
        keep = min(whole & wanted or whole)
        kept[keep] = sorted(group - {keep})
    return kept


def _covers_storage(memory: _Memory) -> bool:
    _, start, stop = memory.storage
    return memory.span[0] == start and memory.filled == stop - start
