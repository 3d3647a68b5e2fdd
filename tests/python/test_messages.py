"""What errors name: the tensor, the step, the key."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import maptensors as mt
import maptensors.torch
import numpy as np
import pytest
import torch
from support import names_in


def test_a_deep_state_is_refused_by_name_and_one_less_deep_is_loaded(tmp_path: Path) -> None:
    def nested(levels: int, kind: Callable[[Any], Any]) -> Any:
        value: Any = np.zeros(1)
        for _ in range(levels):
            value = kind(value)
        return {"deep": value}

    with mt.Checkpointer(tmp_path, durable=False, prepare=False) as checkpoints:
        for kind in (lambda v: {"a": v}, lambda v: [v], lambda v: (v,), lambda v: {1: v}):
            for levels in (900, 10_000):
                with pytest.raises(mt.MapTensorsError, match=r"more than 200 deep, .* at deep\."):
                    checkpoints.save(nested(levels, kind), 1)
            checkpoints.save(nested(190, kind), 1)
            state = checkpoints.load()["deep"]
            for _ in range(190):
                [state] = state.values() if isinstance(state, dict) else state
            assert state.tolist() == [0]


@pytest.mark.parametrize("step", [2**64, -1, "5", 1.0, None, [1]], ids=repr)
def test_what_is_no_step_is_refused_as_a_step(step: Any, tmp_path: Path) -> None:
    checkpoints = mt.Checkpointer(tmp_path)
    uses: list[Callable[[], object]] = [
        lambda: checkpoints.save({}, step),
        lambda: checkpoints.save_async({}, step),
        lambda: checkpoints.remove(step),
    ]
    if step is not None:
        uses += [
            lambda: checkpoints.load(step),
            lambda: checkpoints.open(step),
            lambda: checkpoints.path(step),
        ]
    for use in uses:
        with pytest.raises((TypeError, ValueError), match=f"a step is .*{re.escape(repr(step))}"):
            use()
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"a": 1}, '"a" is a int'),
        ({1: "a"}, "a key is a int: 1"),
        ({"a": None}, '"a" is a NoneType'),
        ("text", "not a str"),
        (3, "not a int"),
    ],
    ids=repr,
)
def test_metadata_that_is_not_text_is_refused_by_its_key(metadata: Any, says: str, tmp_path: Path) -> None:
    tensors: dict[str, Any] = {"t": torch.zeros(2)}
    path = tmp_path / "x.safetensors"
    checkpoints = mt.Checkpointer(tmp_path / "run", prepare=False)
    for save in (
        lambda: mt.save(tensors, path, metadata=metadata),
        lambda: mt.dumps(tensors, metadata=metadata),
        lambda: mt.create(path, tensors, metadata=metadata),
        lambda: mt.edit(path, metadata=metadata),
        lambda: maptensors.torch.save_file(tensors, path, metadata),
        lambda: maptensors.torch.save_model(torch.nn.Linear(1, 1), path, metadata),
        lambda: checkpoints.save(tensors, 1, metadata=metadata),
        lambda: mt.publish(tmp_path / "p", tensors, metadata=metadata),
    ):
        with pytest.raises(mt.MapTensorsError, match=f"metadata is text by text, and .*{says}"):
            save()
    assert "x.safetensors" not in names_in(tmp_path)


@pytest.mark.parametrize(
    "what",
    [
        ("F33", (2,)),
        {"dtype": "F33", "shape": (2,)},
        ("F32", "ab"),
        ("F32", (-1,)),
        ("F32",),
        {"dtype": "F32"},
        3,
    ],
    ids=repr,
)
def test_a_spec_that_is_none_is_refused_by_the_tensors_name(what: Any, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match='"the weight"'):
        mt.create(tmp_path / "x", {"the weight": what})
    with pytest.raises((TypeError, ValueError), match='"t"'):
        mt.loads(mt.dumps({"t": np.zeros(2)}))["t"].view("F33")
