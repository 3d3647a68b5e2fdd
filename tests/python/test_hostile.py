"""Objects that lie, in each way that Python lets them, and change memory while they are looked at.

They run in a process of their own under ``faulthandler``: what reads where it should not crashes there.
"""

import contextlib
import ctypes
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import maptensors as mt
import numpy as np
import torch
from support import ROOT, succeed

BIG = 1 << 30


class Everything:
    """Answers every question with itself, a huge number, or a lie."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return torch.Tensor
        if name in ("__array__", "__dlpack__", "__array_struct__", "__buffer__"):
            return lambda *_, **__: self
        return BIG


class Interface:
    """An address out of the blue."""

    __array_interface__ = {"version": 3, "shape": (BIG,), "typestr": "<f8", "data": (4096, False)}  # noqa: RUF012


class InterfaceOfAnArray(np.ndarray):
    """An array whose interface is out of the blue."""

    __array_interface__ = Interface.__array_interface__  # type: ignore[assignment]
    __array_struct__ = property(lambda self: BIG)  # type: ignore[assignment]


class Capsule:
    """A capsule that holds nothing that it should."""

    def __init__(self, name: bytes | None) -> None:
        self.name = name

    def capsule(self, *_: Any, **__: Any) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(1, self.name, None)

    __array_struct__ = property(capsule)

    def __dlpack_device__(self) -> Any:
        return (BIG, "cpu")


class DLPack(Capsule):
    """As it offers DLPack."""

    __dlpack__ = Capsule.capsule


class DLPackOfNothing:
    """DLPack that gives no capsule."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __dlpack__(self, **_: Any) -> Any:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value

    def __dlpack_device__(self) -> Any:
        return (1, 0)


class Consumed(DLPackOfNothing):
    """A capsule that somebody has consumed."""

    def __dlpack__(self, **_: Any) -> Any:
        capsule = torch.zeros(4).__dlpack__()
        torch.from_dlpack(
            type("One", (), {"__dlpack__": lambda *_, **__: capsule, "__dlpack_device__": lambda _: (1, 0)})()
        )
        return capsule


class Meta(type(torch.Tensor)):  # type: ignore[misc]
    """Says of everything that it is one."""

    def __instancecheck__(cls, instance: object) -> bool:
        return True

    def __subclasscheck__(cls, subclass: type) -> bool:
        return True


class Exchange(torch.Tensor, metaclass=Meta):
    """Has an exchange interface of its own, at an address out of the blue."""

    __dlpack_c_exchange_api__ = Capsule(b"dlpack_exchange_api").capsule()

    def __getattribute__(self, name: str) -> Any:
        return lambda *_, **__: BIG

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        return BIG

    @classmethod
    def __torch_dispatch__(cls, *_: Any, **__: Any) -> Any:
        return BIG


class Sizes(torch.Tensor):
    """Answers torch's own C code wrongly, and does something on the way."""

    act: Callable[[], object] = staticmethod(lambda: None)

    @staticmethod
    def __new__(cls) -> "Sizes":
        return torch.Tensor._make_wrapper_subclass(
            cls, (4,), dispatch_sizes_strides_policy="sizes", dtype=torch.float32
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.act()
        name = str(func)
        if "device" in name:
            return torch.device("cpu")
        return 1 if "dim" in name else [BIG] if "size" in name else [1] if "stride" in name else BIG


class Device(Sizes):
    """With memory, and acts when it is asked for its device."""

    @staticmethod
    def __new__(cls) -> "Device":
        return torch.Tensor._make_subclass(cls, torch.arange(4.0), False, dispatch_device=True)


class Bytes(torch.UntypedStorage):
    """A storage that says it is larger."""

    def nbytes(self) -> int:
        return BIG

    def data_ptr(self) -> int:
        return 4096


def in_a_lying_storage() -> torch.Tensor:
    return torch.empty(0).set_(Bytes(16), 0, (4,), (1,)).fill_(1)


class Acts:
    """Does something when it is asked for an array."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        self.act()
        return np.zeros(2, "f4")


LIARS: dict[str, Callable[[], Any]] = {
    "everything": Everything,
    "interface": Interface,
    "interface of an array": lambda: np.zeros(3).view(InterfaceOfAnArray),
    "struct": lambda: Capsule(None),
    "named struct": lambda: Capsule(b"x"),
    "capsule": lambda: DLPack(b"other"),
    "capsule without a name": lambda: DLPack(None),
    "no capsule": lambda: DLPackOfNothing(None),
    "number for a capsule": lambda: DLPackOfNothing(BIG),
    "error for a capsule": lambda: DLPackOfNothing(ZeroDivisionError("no")),
    "used capsule": lambda: Consumed(None),
    "exchange": lambda: torch.Tensor._make_subclass(Exchange, torch.arange(4.0)),
    "sizes": Sizes,
    "device": Device,
    "storage": in_a_lying_storage,
    "resized": lambda: (t := torch.zeros(100), t.untyped_storage().resize_(4))[0],
    "freed and strided": lambda: (t := torch.zeros(100, 100).T, t.untyped_storage().resize_(0))[0],
    "taken apart and resized": lambda: (t := torch.zeros(100)[5:20:3], t.untyped_storage().resize_(40))[0],
    "resized and empty": lambda: (t := torch.zeros(100), t.untyped_storage().resize_(0))[0][:0],
}


#: What has memory of its own, whatever it says.
HONEST = {"interface of an array", "exchange", "device", "storage", "resized and empty"}


def ways(directory: Path) -> Iterator[Callable[[Any], object]]:
    def checkpoint(tensors: Any) -> None:
        with mt.Checkpointer(directory / "run", durable=False, prepare=False) as checkpoints:
            checkpoints.save(dict(tensors), 1)

    def publish(tensors: Any) -> None:
        with mt.publish(directory / "published", dict(tensors)) as publisher:
            publisher.publish(dict(tensors), changed="compare")

    def fill(tensors: Any) -> None:
        tensors = dict(tensors)
        spec = dict.fromkeys(tensors, ("F32", (4,)))
        with mt.create(directory / "draft", spec, durable=False) as draft:
            draft.fill(tensors)

    def spec(tensors: Any) -> None:
        mt.create(directory / "spec", dict(tensors)).close()

    def save_file(tensors: Any) -> None:
        import maptensors.torch

        # A copy: what is resized under an array of numpy's, torch could not know of.
        tensors = {name: torch.tensor(t) if type(t) is np.ndarray else t for name, t in tensors}
        maptensors.torch.save_file(tensors, directory / "file")

    yield lambda tensors: mt.save(tensors, directory / "out")
    yield lambda tensors: mt.save(dict(tensors), directory / "out.safetensors", max_shard_size=1)
    yield mt.dumps
    yield from (checkpoint, publish, fill, spec, save_file)


def lies() -> None:
    """Nobody is believed: what comes out is what was allocated, or an error."""
    for name, make in LIARS.items():
        with tempfile.TemporaryDirectory() as directory:
            for way in ways(Path(directory)):
                value = make()
                told = ""
                try:
                    way({"a": np.zeros(4, "f4"), name: value, "z": torch.zeros(4)}.items())
                except (mt.MapTensorsError, TypeError, ValueError, RuntimeError) as error:
                    told = str(error)
                if told:
                    assert name in told, told
                else:
                    assert name in HONEST, (name, way)
    print("lies: done")


def resizing() -> None:
    """Memory that is freed while the others are looked at is not read afterwards."""
    size = 1 << 22  # a mapping of its own: what is freed is gone at once

    def shrink_array(victim: np.ndarray) -> Callable[[], object]:
        return lambda: victim.resize((1,), refcheck=False)

    def free(victim: torch.Tensor) -> Callable[[], object]:
        return lambda: victim.untyped_storage().resize_(0)

    class Subclass(torch.Tensor):
        pass

    for make, act in [
        (lambda: np.ones(size, "u1"), shrink_array),
        (lambda: torch.ones(size, dtype=torch.uint8), free),
        (lambda: torch.ones(2, size // 2, dtype=torch.uint8).T, free),
        (lambda: torch.ones(size, dtype=torch.uint8).as_subclass(Subclass), free),
        (lambda: torch.ones(2, size // 2, dtype=torch.uint8).T.as_subclass(Subclass), free),
    ]:
        with tempfile.TemporaryDirectory() as directory:
            for way in ways(Path(directory)):
                victim = make()
                with contextlib.suppress(TypeError, ValueError):
                    way({"victim": victim, "z": Acts(act(victim))}.items())
                victim = make()

                def pairs(victim: Any = victim, act: Any = act) -> Iterator[tuple[str, Any]]:
                    yield "victim", victim
                    act(victim)()
                    yield "z", np.zeros(2)

                with contextlib.suppress(TypeError, ValueError):
                    way(pairs())
                for liar in (Sizes, Device):
                    for order in (("victim", "z"), ("z", "victim")):
                        victim = make()
                        tensors = {"victim": victim, "z": liar()}
                        Sizes.act = staticmethod(act(victim))  # type: ignore[method-assign]
                        with contextlib.suppress(TypeError, ValueError):
                            way({name: tensors[name] for name in order}.items())
                        Sizes.act = staticmethod(lambda: None)  # type: ignore[method-assign]
    print("resizing: done")


def assigning() -> None:
    """What is assigned is looked at through the same gate."""
    for name, make in LIARS.items():
        tensor = mt.loads(mt.dumps({"t": np.zeros(4, "f4")}))["t"]
        for value in (make(), [make()] * 4, ((make(),) * 4)):
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                tensor[...] = value
                assert name in HONEST - {"interface of an array"}, name
    print("assigning: done")


def test_objects_that_lie_crash_nothing() -> None:
    path = str(ROOT / "tests/python")
    run = "import test_hostile as t; t.lies(); t.resizing(); t.assigning()"
    code = f"import sys; sys.path.insert(0, {path!r}); {run}"
    done = succeed(code, env={"PYTHONFAULTHANDLER": "1", "MALLOC_PERTURB_": "165"})
    assert done.split("\n") == ["lies: done", "resizing: done", "assigning: done", ""]
