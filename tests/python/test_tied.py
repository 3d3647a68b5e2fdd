"""Tied is what lies in the same place of the same storage, and has memory; a wrapper has none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import maptensors as mt
import maptensors.torch
import numpy as np
import pytest
import torch
from maptensors._native import torch_memory
from support import reference, succeed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor


def checkpointed(state: dict[str, Any], directory: Path) -> Any:
    with mt.Checkpointer(directory, durable=False, prepare=False) as checkpoints:
        checkpoints.save(state, 1)
        return checkpoints.load()


def sharded(state: dict[str, Any], directory: Path) -> Any:
    options: Any = {"durable": False, "prepare": False, "max_shard_size": 1}
    with mt.Checkpointer(directory, **options) as checkpoints:
        checkpoints.save_async(state, 1).wait()
        return checkpoints.load()


def published(state: dict[str, Any], directory: Path) -> Any:
    with mt.publish(directory / "p", state), mt.attach(directory / "p") as attached:
        return attached.state()


STATES = [checkpointed, sharded, published]


class Strided(torch.Tensor):
    """A wrapper, of which torch's own copy would make a plain tensor."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Strided":
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [arg.inner if isinstance(arg, Strided) else arg for arg in args]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("save", STATES)
@pytest.mark.parametrize(
    "make",
    [
        lambda n: TwoTensor(torch.full((3, 2), n), torch.zeros(3, 2)).t(),
        lambda n: Strided(torch.full((3, 2), n).t()),
    ],
    ids=["two", "strided"],
)
def test_wrappers_without_memory_are_not_tied_but_refused(
    save: Callable[..., Any], make: Callable[[float], Any], tmp_path: Path
) -> None:
    with pytest.raises(mt.MapTensorsError, match=r'"first" is a .* no memory of its own'):
        save({"first": make(1.0), "second": make(2.0)}, tmp_path)


@pytest.mark.parametrize("save", STATES)
def test_what_is_tied_is_saved_once_and_what_only_begins_together_is_not(
    save: Callable[..., Any], tmp_path: Path
) -> None:
    base = torch.arange(12.0)
    made = torch.complex(base, base)
    state = {
        "a": base,
        "tied": base.detach(),
        "parameter": torch.nn.Parameter(base),
        "part": base[:6],
        "reshaped": base.view(3, 4),
        "transposed": base.view(3, 4).t(),
        "integers": base.view(torch.int32),
        "behind": base[1:],
        "c": made,
        "conjugated": made.conj(),
        "empty": torch.zeros(0),
        "empty too": torch.zeros(0),
        "numpy": base.numpy(),
    }
    loaded = save(state, tmp_path)
    for name, value in state.items():
        assert torch.equal(torch.as_tensor(loaded[name]), torch.as_tensor(value).detach()), name
    assert loaded["a"] is loaded["tied"] is loaded["parameter"]
    assert len({id(tensor) for tensor in loaded.values()}) == len(state) - 2


def test_memory_that_was_freed_ties_nothing(tmp_path: Path) -> None:
    freed = [torch.zeros(4), torch.zeros(4)]
    for tensor in freed:
        tensor.untyped_storage().resize_(0)
    assert (
        torch_memory([*freed, TwoTensor(freed[0], freed[1]), torch.zeros(2, device="meta"), 3, np.zeros(2)])
        == [None] * 6
    )
    with pytest.raises(mt.MapTensorsError, match=r'"a" .*freed or resized'):
        checkpointed({"a": freed[0], "b": freed[1]}, tmp_path)


def test_ties_are_found_under_every_mode(tmp_path: Path) -> None:
    base = torch.arange(4.0)
    state = {"a": base, "b": base.detach()}
    with FakeTensorMode(allow_non_fake_inputs=True):
        checkpointed(state, tmp_path)
    [path] = tmp_path.glob("*.safetensors")
    assert reference(path).keys() == {"a"}


def test_a_torch_without_the_exchange_interface_is_looked_at_through_capsules() -> None:
    """As those before 2.10 are."""
    code = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
import maptensors as mt
from torch.testing._internal.two_tensor import TwoTensor
base = torch.arange(12.0).reshape(3, 4)
complex_ = torch.complex(base, base)
for t in (base, base.t(), torch.nn.Parameter(base), base[:, ::2], complex_.mH, base.bfloat16().t()):
    loaded = mt.loads(mt.dumps({"t": t}))["t"].torch()
    assert torch.equal(loaded, t.detach()), t
tensor = mt.loads(mt.dumps({"t": base}))["t"]
tensor[...] = base.t().contiguous().t() + 1
assert torch.equal(tensor.torch(), base + 1)
base.untyped_storage().resize_(8)
two = torch.zeros(2)
for t in (base, TwoTensor(two, two), two.to_sparse(), two.to("meta")):
    try:
        mt.dumps({"layer": t})
    except mt.MapTensorsError as error:
        assert '"layer"' in str(error)
    else:
        raise AssertionError(type(t))
"""
    succeed(code)
