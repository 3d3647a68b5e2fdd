"""A training state — tensors, numbers, strings, nested dicts and lists — as tensors and one line of JSON."""

import json
import math
import sys
from base64 import b64decode, b64encode
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from maptensors._native import Model, Tensor, firsts
from maptensors.errors import BitPatternError, MapTensorsError

# How deep a state may be nested: reading it takes three calls for each level, and Python's limit is 1000.
_LEVELS = 200

_FRAMEWORKS = (None, "maptensors", "numpy", "torch", "jax")

#: Where the structure is kept in a file's metadata.
STATE = "maptensors.state"

# What other loaders look for in "format".
_FORMATS = {"torch": "pt", "numpy": "np", "jax": "flax"}

# How a structure is written. Strings, integers, booleans, null and finite floats stand for themselves;
# everything else is an object with one key that says what it is:
#   {"tensor": name, "as": framework}    {"dict": {…}}    {"ordered": [[key, value], …]}
#   {"items": [[key, value], …]} (keys that are not all strings)    {"counter": [[key, value], …]}
#   {"list": […]}    {"tuple": […]}    {"size": […]} (torch.Size)    {"float": "nan" | "inf" | "-inf"}
#   {"complex": "(1+2j)"}    {"bytes": base64}


def framework_of(value: object) -> str | None:
    """Whose array a value is: "torch", "numpy", "jax", "maptensors", "scalar" (numpy's); None if no array."""
    if isinstance(value, Tensor):
        return "maptensors"
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        if isinstance(value, numpy.ndarray):
            return "numpy"
        if isinstance(value, numpy.generic):
            return "scalar"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return "torch"
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(value, jax.Array):
        return "jax"
    return None


def flatten(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the tensors of a state by name, and the metadata that says how it was made of them."""
    if isinstance(state, Model):
        return dict(state.items()), dict(state.metadata)
    if not isinstance(state, Mapping):
        raise TypeError(
            f"a state is a dict of tensors, numbers and nested dicts, not a {type(state).__name__}"
        )
    found: _Found = ([], [])
    node = _encode(state, "", found, 0)
    tensors = _named(found)
    metadata = {STATE: json.dumps(node, allow_nan=False, separators=(",", ":"))}
    frameworks = {framework_of(tensor) or "" for tensor in tensors.values()}
    if len(frameworks) == 1 and (known := _FORMATS.get(*frameworks)):
        metadata["format"] = known
    return tensors, metadata


def joined(metadata: Mapping[str, str] | None, more: dict[str, str]) -> dict[str, str]:
    """Return what a caller wants in the metadata, and what is to be there in any case."""
    if metadata is not None and not isinstance(metadata, Mapping):
        raise MapTensorsError(f"metadata is text by text, and not a {type(metadata).__name__}")
    return {**(metadata or {}), **more}


#: How each tensor of a state is written, by its path until it is named, and the tensors, in the same order.
_Found = tuple[list[dict[str, str]], list[Any]]


def _encode(value: Any, path: str, found: _Found, level: int) -> Any:
    """Return how a value is written. Its tensors are added to ``found``, to be named when all are known."""
    framework = framework_of(value)
    if framework is not None:
        node = {"tensor": path, "as": framework}
        found[0].append(node)
        found[1].append(value)
        return node
    if level > _LEVELS:
        raise MapTensorsError(
            f"the state is nested more than {_LEVELS} deep, or contains itself, at {path[:100]}"
        )
    kind = type(value)
    if value is None or kind in (str, bool, int):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if kind is complex:
        return {"complex": repr(value)}
    if kind is bytes:
        return {"bytes": b64encode(value).decode()}
    is_size = kind.__module__ == "torch" and kind.__name__ == "Size"
    if kind in (list, tuple) or is_size:
        parts = [_encode(part, _join(path, i), found, level + 1) for i, part in enumerate(value)]
        return {"size" if is_size else kind.__name__: parts}
    if kind in (dict, OrderedDict, Counter) or (not path and isinstance(value, Mapping)):
        pairs = []
        for key, part in value.items():
            if key is not None and type(key) not in (str, int, bool):
                where = path or "the state"
                raise TypeError(
                    f"{where} has a key of type {type(key).__name__}: only str and int can be saved"
                )
            pairs.append([key, _encode(part, _join(path, key), found, level + 1)])
        if kind in (OrderedDict, Counter):
            return {"ordered" if kind is OrderedDict else "counter": pairs}
        if all(type(key) is str for key, _ in pairs):
            return {"dict": dict(pairs)}
        return {"items": pairs}
    raise TypeError(
        f"{path} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold: tensors, "
        "numbers, strings, booleans, None, and dicts, lists and tuples of them can be saved"
    )


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _named(found: _Found) -> dict[str, Any]:
    """Return tensors by the names they get in the file: one that is there twice (tied weights) is saved once.

    Tied are those in the same place of the same storage that are read in the same way; and the same object.
    """
    nodes, values = found
    tensors: dict[str, Any] = {}
    for at, first in enumerate(firsts(values)):
        node = nodes[at]
        if first < at:
            node["tensor"] = nodes[first]["tensor"]
            continue
        name, path, n = node["tensor"], node["tensor"], 1
        while name in tensors:
            n += 1
            name = f"{path}~{n}"
        tensors[name] = values[at]
        node["tensor"] = name
    return tensors


def named_in(structure: str, tensors: Mapping[str, Any], places: Iterable[str]) -> list[str]:
    """Return the names that tensors have in the file, by the names of their places in the state.

    A tensor that is in several places (tied weights) has the name of the first. What is no place of a tensor
    stays as it is.
    """
    wanted = list(places)
    # As good as always: every tensor is in one place, which is its name.
    if all(place in tensors for place in wanted) and not any("~" in name for name in tensors):
        return wanted
    found: dict[str, set[str]] = {}

    def look(node: Any, path: str) -> None:
        match node:
            case {"tensor": str(name), "as": _}:
                found.setdefault(path, set()).add(name)
            case {"dict": dict(parts)}:
                for key, part in parts.items():
                    look(part, _join(path, key))
            case {"items": list(pairs)} | {"ordered": list(pairs)} | {"counter": list(pairs)}:
                for key, part in pairs:
                    look(part, _join(path, key))
            case {"list": list(parts)} | {"tuple": list(parts)} | {"size": list(parts)}:
                for i, part in enumerate(parts):
                    look(part, _join(path, i))

    look(json.loads(structure), "")
    names: set[str] = set()
    for place in wanted:
        names |= found.get(place, {place})
        if place in tensors:
            names.add(place)
    return sorted(names)


def check_framework(framework: str | None) -> None:
    """Refuse what is no framework."""
    if framework not in _FRAMEWORKS:
        raise ValueError(f"framework is one of {', '.join(map(repr, _FRAMEWORKS))}, not {framework!r}")


def unflatten(model: Model, framework: str | None) -> Any:
    """Return the state that a checkpoint holds, its tensors as they were given or in one framework."""
    metadata = model.metadata
    taken: dict[str, Any] = {}
    failed: list[Exception] = []  # not the structure's fault

    def tensor(name: str, given: str) -> Any:
        wanted = given if framework is None or given == "scalar" else framework
        if name not in taken:
            try:
                taken[name] = _TAKE[wanted](model[name])
            except BitPatternError as error:
                bad = BitPatternError(
                    f'{error}; framework="maptensors" gives each tensor by itself, and the others can be used'
                )
                bad.tensors = error.tensors
                failed.append(bad)
                raise bad from None
            except Exception as error:
                failed.append(error)
                raise
        return taken[name]

    if STATE in metadata:
        try:
            return _decode(json.loads(metadata[STATE]), tensor)
        except (RecursionError, ValueError, TypeError) as error:
            if error in failed:
                raise
            raise MapTensorsError(
                f"the checkpoint's {STATE!r} metadata is not what maptensors writes: {error}"
            ) from error
    return {name: tensor(name, "maptensors") for name in model}


_TAKE: dict[str, Callable[[Tensor], Any]] = {
    "maptensors": lambda tensor: tensor,
    "numpy": lambda tensor: tensor.numpy(),
    "scalar": lambda tensor: tensor.numpy()[()],
    "torch": lambda tensor: tensor.torch(),
    "jax": lambda tensor: tensor.jax(),
}


def _decode(node: Any, tensor: Callable[[str, str], Any]) -> Any:
    def all_of(parts: list[Any]) -> list[Any]:
        return [_decode(part, tensor) for part in parts]

    def pairs_of(pairs: list[Any]) -> list[tuple[Any, Any]]:
        decoded = []
        for pair in pairs:
            match pair:
                case [(str() | int() | None) as key, part]:
                    decoded.append((key, _decode(part, tensor)))
                case _:
                    raise ValueError(f"no pair of a key and a value: {str(pair)[:100]}")
        return decoded

    match node:
        case None | str() | bool() | int() | float():
            return node
        case {"tensor": str(name), "as": str(given)} if given in _TAKE:
            return tensor(name, given)
        case {"float": ("nan" | "inf" | "-inf") as text}:
            return float(text)
        case {"complex": str(text)}:
            return complex(text)
        case {"bytes": str(text)}:
            return b64decode(text, validate=True)
        case {"list": list(parts)}:
            return all_of(parts)
        case {"tuple": list(parts)}:
            return tuple(all_of(parts))
        case {"size": list(parts)}:
            import torch

            return torch.Size(all_of(parts))
        case {"dict": dict(parts)}:
            return {key: _decode(part, tensor) for key, part in parts.items()}
        case {"items": list(pairs)}:
            return dict(pairs_of(pairs))
        case {"ordered": list(pairs)}:
            return OrderedDict(pairs_of(pairs))
        case {"counter": list(pairs)}:
            return Counter(dict(pairs_of(pairs)))
    raise ValueError(str(node)[:100])
