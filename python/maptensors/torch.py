"""The functions of ``safetensors.torch``, over mapped memory.

Tensors that are loaded are the file's pages, copy-on-write: writable like any tensor, and the file never
changes. Each has a storage of its own.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch

from maptensors import _api, _native

__all__ = ["load", "load_file", "load_model", "save", "save_file", "save_model"]


def save(tensors: dict[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return tensors as the bytes of a safetensors file.

    Raises as :func:`save_file` does.
    """
    _check(tensors)
    return _api.save_bytes(tensors, metadata=metadata)


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
    notes = None if metadata is None else dict(metadata)
    if not _native.save(tensors, filename, metadata=notes, durable=durable, distinct=True):
        # Something is shared, strided or on a device: look closely, and say what.
        _check(tensors)
        _api.save(tensors, filename, metadata=metadata, durable=durable)


def load(data: bytes) -> dict[str, torch.Tensor]:
    """Return the tensors in the bytes of a safetensors file, copied once."""
    return _native.load_bytes(data).torch()


def load_file(
    filename: str | os.PathLike[str], device: str | int | torch.device = "cpu", *, backend: str = "mmap"
) -> dict[str, torch.Tensor]:
    """Return the tensors in a safetensors file, on ``device``; see :func:`maptensors.open`."""
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
    notes = dict(metadata or {})
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
    raises ``RuntimeError`` if there are any.
    """
    state = load_file(filename, device=device, backend=backend)
    shared = _duplicates(model.state_dict(), preferred=state.keys())
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


def _check(tensors: dict[str, torch.Tensor]) -> None:
    """Raise what safetensors raises for what it does not save."""
    _check_kinds(tensors)
    sharing = [sorted(names) for names in _sharing(tensors) if len(names) > 1]
    if sharing:
        raise RuntimeError(
            f"Some tensors share memory: {sharing}. Saving each would duplicate it on disk and untie them "
            "when loaded. save_model keeps one of each; maptensors.save writes them all."
        )
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
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
    sparse = [name for name, tensor in tensors.items() if tensor.layout != torch.strided]
    if sparse:
        raise ValueError(
            f"You are trying to save a sparse tensors: `{sparse}` which this library does not support. "
            "`.to_dense()` makes a tensor dense; the file may be much larger."
        )


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First and one-past-last byte of a tensor's elements."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def _sharing(tensors: dict[str, torch.Tensor]) -> list[set[str]]:
    """Groups of names whose tensors overlap in memory; a tensor on its own is a group of one."""
    by_storage: dict[tuple[torch.device, int, int], list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.device.type == "meta":
            continue
        storage = tensor.untyped_storage()
        if storage.data_ptr() != 0 and storage.nbytes() != 0:
            by_storage[tensor.device, storage.data_ptr(), storage.nbytes()].append(name)
    groups: list[set[str]] = []
    for names in by_storage.values():
        if len(names) == 1:
            groups.append(set(names))
            continue
        end = -1
        for start, stop, name in sorted((*_span(tensors[name]), name) for name in names):
            if start < end:
                groups[-1].add(name)
            else:
                groups.append({name})
            end = max(end, stop)
    return groups


def _duplicates(state: dict[str, torch.Tensor], preferred: Iterable[str] = ()) -> dict[str, list[str]]:
    """For each group of names that share memory: the one to keep, and the others.

    Only a tensor that covers its whole storage can stand for the others. Of several, one that is in
    ``preferred`` (the names in the file being loaded) wins, else the first by name.
    """
    wanted = set(preferred)
    kept: dict[str, list[str]] = {}
    for group in _sharing(state):
        if len(group) == 1:
            continue
        whole = {name for name in group if _covers_storage(state[name])}
        if not whole:
            raise RuntimeError(
                f"Tensors {sorted(group)} share memory, and none covers all of it: none can stand for the "
                "others, and saving each would store the memory more than once."
            )
        keep = min(whole & wanted or whole)
        kept[keep] = sorted(group - {keep})
    return kept


def _covers_storage(tensor: torch.Tensor) -> bool:
    storage = tensor.untyped_storage()
    nbytes = tensor.numel() * tensor.element_size()
    return bool(tensor.data_ptr() == storage.data_ptr() and nbytes == storage.nbytes())
