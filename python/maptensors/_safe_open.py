"""``safe_open``, as safetensors has it."""

import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from maptensors import _native
from maptensors.errors import MapTensorsError

_FRAMEWORKS = {
    "pt": "torch",
    "torch": "torch",
    "pytorch": "torch",
    "np": "numpy",
    "numpy": "numpy",
    "jax": "jax",
    "flax": "jax",
}


class safe_open:
    """Open a safetensors file and hand out tensors as they are asked for; safetensors' interface.

    ``framework`` is ``"pt"``, ``"np"`` or ``"flax"`` (or a longer spelling), ``device`` whatever torch takes.
    ``backend="pread"`` reads the file into memory instead of mapping it.
    """

    def __init__(
        self,
        filename: str | os.PathLike[str],
        framework: str,
        device: str | int = "cpu",
        *,
        backend: str = "mmap",
    ) -> None:
        if not isinstance(framework, str):
            raise TypeError(f"framework is a str, not {framework!r}")
        if framework not in _FRAMEWORKS:
            raise MapTensorsError(
                f"framework {framework!r} is not one of pt, np and flax; maptensors.open gives tensors "
                "that speak DLPack and the buffer protocol"
            )
        self._framework = _FRAMEWORKS[framework]
        if self._framework != "torch" and device != "cpu":
            raise MapTensorsError(f"device {device!r} is for framework 'pt'; {framework!r} loads on the CPU")
        if self._framework == "torch" and device != "cpu":
            import torch

            # Refused now, and not at the first tensor.
            torch.device(device)
        # JAX arrays are immutable; the others may be written, which copies the page and not the file.
        mode = "r" if self._framework == "jax" else "c"
        self._device: Any = device
        self._model = _native.open(filename, mode, backend=backend)

    def __enter__(self) -> Self:
        """Enter a context that closes the file; tensors taken from it live on."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._model.close()

    def keys(self) -> list[str]:
        """Return the names of the tensors, sorted."""
        return sorted(self._model)

    def offset_keys(self) -> list[str]:
        """Return the names of the tensors in file order."""
        return list(self._model)

    def metadata(self) -> dict[str, str] | None:
        """Return the file's metadata, or None if it has none."""
        return self._model.metadata if self._model.has_metadata else None

    def get_tensor(self, name: str) -> Any:
        """Return the tensor called ``name``."""
        return self._convert(self._model[name])

    def get_tensors(self) -> dict[str, Any]:
        """Return all tensors by name."""
        if self._framework == "torch":
            return self._model.torch(self._device)
        return self._model.jax() if self._framework == "jax" else self._model.numpy()

    def get_slice(self, name: str) -> "SafeSlice":
        """Return the tensor called ``name``, to be sliced before it is converted."""
        return SafeSlice(self._model[name], self._convert)

    def _convert(self, tensor: _native.Tensor) -> Any:
        if self._framework == "torch":
            return tensor.torch(self._device)
        return tensor.jax() if self._framework == "jax" else tensor.numpy()


class SafeSlice:
    """A tensor that becomes an array of the framework when it is sliced."""

    def __init__(self, tensor: _native.Tensor, convert: Callable[[_native.Tensor], Any]) -> None:
        self._tensor = tensor
        self._convert = convert

    def get_shape(self) -> list[int]:
        """Return the shape of the whole tensor."""
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        """Return the dtype as safetensors calls it."""
        return self._tensor.dtype

    def __getitem__(self, key: Any) -> Any:
        """Return a part of the tensor; only its bytes are touched."""
        keys = key if isinstance(key, tuple) else (key,)
        if all(k is ... or isinstance(k, slice) or _is_place(k) for k in keys):
            return self._convert(self._tensor[key])
        # Lists and masks: the framework's own indexing, which copies.
        return self._convert(self._tensor)[key]


def _is_place(key: Any) -> bool:
    """Whether a key is a number; to the frameworks a bool is a mask."""
    return hasattr(key, "__index__") and not isinstance(key, bool)
