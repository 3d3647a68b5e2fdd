"""What code written for safetensors sees when its imports are changed, held against safetensors itself."""

import collections
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import maptensors as mt
import maptensors.flax
import maptensors.numpy
import maptensors.torch
import numpy as np
import pytest
import safetensors
import safetensors.flax
import safetensors.numpy
import safetensors.torch
import torch
from support import reference

PAIRS: dict[str, tuple[ModuleType, ModuleType]] = {
    "numpy": (maptensors.numpy, safetensors.numpy),
    "torch": (maptensors.torch, safetensors.torch),
    "flax": (maptensors.flax, safetensors.flax),
}
BOTH = [
    pytest.param((a, b), id=f"{a}-then-{b}") for a in ["ours", "reference"] for b in ["ours", "reference"]
]
FUNCTIONS = [(name, f) for name in PAIRS for f in ["load", "load_file", "save", "save_file"]] + [
    ("torch", "load_model"),
    ("torch", "save_model"),
]

ARRAYS = {
    "weight": np.arange(12, dtype="f4").reshape(3, 4),
    "scalar": np.array(2.5, "f4"),
    "empty": np.zeros((0, 3), "i4"),
    "mask": np.array([True, False]),
    "half": np.arange(5, dtype="f2"),
    "bytes": np.arange(7, dtype="u1"),
}
MAKE: dict[str, Callable[[np.ndarray], Any]] = {
    "numpy": lambda array: array.copy(),
    "torch": lambda array: torch.from_numpy(array.copy()),
    "flax": lambda array: jnp.asarray(array),
}


def tensors_for(framework: str) -> dict[str, Any]:
    return {name: MAKE[framework](array) for name, array in ARRAYS.items()}


def module(framework: str, whose: str) -> ModuleType:
    return PAIRS[framework][0 if whose == "ours" else 1]


def same(found: Any, expected: Any) -> None:
    """The same type, dtype, shape and values."""
    assert type(found) is type(expected)
    assert (found.dtype, tuple(found.shape)) == (expected.dtype, tuple(expected.shape))
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


def same_dict(found: Any, expected: Any) -> None:
    assert type(found) is dict
    assert found.keys() == expected.keys()
    for name in expected:
        same(found[name], expected[name])


@pytest.mark.parametrize(("framework", "function"), FUNCTIONS)
def test_a_function_takes_the_same_arguments_and_more_only_by_keyword(framework: str, function: str) -> None:
    ours, theirs = (inspect.signature(getattr(m, function)).parameters for m in PAIRS[framework])
    shared = [(p.name, p.kind, p.default) for p in ours.values() if p.name in theirs]
    assert shared == [(p.name, p.kind, p.default) for p in theirs.values()]
    added = [p for p in ours.values() if p.name not in theirs]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in added)


@pytest.mark.parametrize("framework", PAIRS)
def test_every_documented_function_is_there(framework: str) -> None:
    ours, theirs = PAIRS[framework]
    public = {
        name
        for name, value in vars(theirs).items()
        if inspect.isfunction(value) and value.__module__ == theirs.__name__ and not name.startswith("_")
    } - {"storage_ptr", "storage_size"}  # helpers, in no documentation
    assert public == set(ours.__all__) == {f for name, f in FUNCTIONS if name == framework}


@pytest.mark.parametrize("framework", PAIRS)
@pytest.mark.parametrize("who", BOTH)
@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt", "é": "\0\n"}], ids=["none", "empty", "some"])
@pytest.mark.parametrize("form", ["file", "bytes"])
def test_one_reads_what_the_other_wrote(
    framework: str, who: tuple[str, str], metadata: dict[str, str] | None, form: str, tmp_path: Path
) -> None:
    writer, reader = (module(framework, whose) for whose in who)
    tensors, path = tensors_for(framework), tmp_path / "x.safetensors"
    if form == "file":
        assert writer.save_file(dict(tensors), path, metadata) is None
        found = reader.load_file(path)
    else:
        data = writer.save(dict(tensors), metadata=metadata)
        assert type(data) is bytes
        path.write_bytes(data)
        found = reader.load(data)
    same_dict(found, tensors)
    for open_ in [mt.safe_open, safetensors.safe_open]:
        with open_(path, framework="np") as file:
            assert file.metadata() == metadata


@pytest.mark.parametrize("framework", PAIRS)
@pytest.mark.parametrize("path_type", [str, Path, "relative"])
def test_paths_may_be_text_or_objects(
    framework: str, path_type: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = "x.safetensors" if path_type == "relative" else path_type(tmp_path / "x.safetensors")
    for module_ in PAIRS[framework]:
        module_.save_file(tensors_for(framework), path)
        for reader in PAIRS[framework]:
            same_dict(reader.load_file(path, backend="pread"), tensors_for(framework))


def test_a_drop_in_under_the_name_safetensors_runs_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", mt)
    for name, (ours, _) in PAIRS.items():
        monkeypatch.setitem(sys.modules, f"safetensors.{name}", ours)
    namespace: dict[str, Any] = {"path": str(tmp_path / "x.safetensors")}
    exec(
        """
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
import safetensors.torch as st

save_file({"a": torch.arange(4.0)}, path, metadata={"format": "pt"})
state = load_file(path, device="cpu")
with safe_open(path, framework="pt", device="cpu") as f:
    assert f.metadata().get("format") == "pt"
    for k in f.keys():
        assert torch.equal(f.get_tensor(k), state[k])
    try:
        f.get_tensor("b")
    except SafetensorError:
        refused = True
with open(path, "rb") as f:
    assert refused and st.load(f.read()).keys() == {"a"}
""",
        namespace,
    )


# Errors.


def outcome(call: Callable[[], Any]) -> type[BaseException] | None:
    try:
        call()
    except Exception as error:
        return type(error)
    return None


BASE = torch.arange(16.0).reshape(4, 4)

#: Input, and what both raise: a class, or None where both save.
TORCH_INPUTS: dict[str, tuple[Callable[[], Any], type[Exception] | None]] = {
    "list": (lambda: [BASE], ValueError),
    "pairs": (lambda: [("a", BASE)], ValueError),
    "None": (lambda: None, ValueError),
    "tensor": (lambda: BASE, ValueError),
    "numpy array": (lambda: {"a": np.zeros(2)}, ValueError),
    "number": (lambda: {"a": 1}, ValueError),
    "nested": (lambda: {"a": {"b": BASE}}, ValueError),
    "sparse": (lambda: {"a": torch.eye(2).to_sparse()}, ValueError),
    "transposed": (lambda: {"a": BASE.T}, ValueError),
    "columns": (lambda: {"a": BASE[:, :2]}, ValueError),
    "channels last": (
        lambda: {"a": torch.zeros(1, 3, 4, 4).to(memory_format=torch.channels_last)},
        ValueError,
    ),
    "shared": (lambda: {"a": BASE, "b": BASE}, RuntimeError),
    "view of all": (lambda: {"a": BASE, "b": BASE.view(-1)}, RuntimeError),
    "overlapping": (lambda: {"a": BASE[:2], "b": BASE[1:]}, RuntimeError),
    "row of all": (lambda: {"a": BASE, "b": BASE[0], "c": BASE[3]}, RuntimeError),
    "shared and transposed": (lambda: {"a": BASE, "b": BASE.T}, RuntimeError),
    "tied parameter": (
        lambda: (lambda p: {"a": p, "b": p})(torch.nn.Parameter(torch.zeros(3))),
        RuntimeError,
    ),
    "neighbours": (lambda: {"a": BASE[:2], "b": BASE[2:]}, None),
    "one row": (lambda: {"a": BASE[1]}, None),
    "shared but empty": (lambda: (lambda t: {"a": t, "b": t})(torch.zeros(0)), None),
    "empty dict": (dict, None),
    "ordered dict": (lambda: collections.OrderedDict(a=BASE), None),
    "parameter": (lambda: {"a": torch.nn.Parameter(torch.zeros(3))}, None),
    "meta": (lambda: {"a": torch.zeros(2, device="meta")}, NotImplementedError),
}
#: Where ours is another class on purpose: a value that is wrong, not something unimplemented.
OURS_INSTEAD = {"meta": ValueError}


@pytest.mark.parametrize("what", TORCH_INPUTS)
@pytest.mark.parametrize("form", ["file", "bytes"])
def test_torch_refuses_what_safetensors_refuses_with_the_same_exception(
    what: str, form: str, tmp_path: Path
) -> None:
    make, expected = TORCH_INPUTS[what]
    path = tmp_path / "x.safetensors"

    def save(module_: ModuleType) -> Any:
        return module_.save_file(make(), path) if form == "file" else module_.save(make())

    assert outcome(lambda: save(safetensors.torch)) is expected
    path.unlink(missing_ok=True)
    ours = OURS_INSTEAD.get(what, expected)
    if ours is None:
        save(maptensors.torch)
        return
    with pytest.raises(ours):
        save(maptensors.torch)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["object", "complex128", "text"])
@pytest.mark.parametrize("framework", ["numpy", "flax"])
def test_dtypes_safetensors_refuses_are_refused(what: str, framework: str) -> None:
    array = {"object": np.array([None]), "complex128": np.zeros(2, "c16"), "text": np.array(["a"])}[what]
    ours, theirs = PAIRS[framework]
    with pytest.raises(safetensors.SafetensorError):
        theirs.save({"a": array})
    with pytest.raises(mt.SafetensorError):
        ours.save({"a": array})


@pytest.mark.parametrize("framework", PAIRS)
@pytest.mark.parametrize("data", [b"", b"junk", b"\xff" * 100, b"\2\0\0\0\0\0\0\0[]"], ids=repr)
def test_bytes_that_are_no_file_are_a_safetensor_error(framework: str, data: bytes) -> None:
    ours, theirs = PAIRS[framework]
    with pytest.raises(safetensors.SafetensorError):
        theirs.load(data)
    with pytest.raises(mt.SafetensorError):
        ours.load(data)


@pytest.mark.parametrize("framework", PAIRS)
@pytest.mark.parametrize(
    "data", [None, "text", 3, bytearray(8), memoryview(b"12345678")], ids=lambda d: type(d).__name__
)
def test_load_takes_bytes_only(framework: str, data: Any) -> None:
    for module_ in PAIRS[framework]:
        with pytest.raises(TypeError):
            module_.load(data)


@pytest.mark.parametrize("framework", PAIRS)
def test_a_missing_file_is_file_not_found_with_its_name(framework: str, tmp_path: Path) -> None:
    for module_ in PAIRS[framework]:
        with pytest.raises(FileNotFoundError) as caught:
            module_.load_file(tmp_path / "none")
    with pytest.raises(FileNotFoundError) as caught:
        module(framework, "ours").load_file(tmp_path / "none")
    assert caught.value.filename == str(tmp_path / "none")


@pytest.mark.parametrize("framework", PAIRS)
def test_a_backend_that_is_none_is_refused(framework: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    safetensors.numpy.save_file(ARRAYS, path)
    ours, theirs = PAIRS[framework]
    with pytest.raises(safetensors.SafetensorError):
        theirs.load_file(path, backend="carrier pigeon")
    with pytest.raises(ValueError, match="backend"):
        ours.load_file(path, backend="carrier pigeon")


# save_model and load_model.


class Tied(torch.nn.Module):
    """Input and output embedding are one matrix."""

    def __init__(self, extra: bool = False) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(6, 4)
        self.head = torch.nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.norm = torch.nn.LayerNorm(4)
        self.register_buffer("steps", torch.tensor(3))
        if extra:
            self.extra = torch.nn.Linear(2, 2)


class Untied(torch.nn.Module):
    """The same names, nothing shared."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(6, 4)
        self.head = torch.nn.Linear(4, 6, bias=False)
        self.norm = torch.nn.LayerNorm(4)
        self.register_buffer("steps", torch.tensor(3))


class Part(torch.nn.Module):
    """Only views of one buffer, none of which covers it."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.zeros(10)
        self.a, self.b = torch.nn.Buffer(base[:6]), torch.nn.Buffer(base[3:])


class Strided(torch.nn.Module):
    """A parameter that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4).T)


@pytest.mark.parametrize("who", BOTH)
@pytest.mark.parametrize("metadata", [None, {"a": "b"}, {"head.weight": "mine"}], ids=repr)
def test_a_model_with_tied_weights_survives(
    who: tuple[str, str], metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    writer, reader = (module("torch", whose) for whose in who)
    path = tmp_path / "tied.safetensors"
    model, other = Tied(), Tied()
    given = None if metadata is None else dict(metadata)
    writer.save_model(model, str(path), given)
    assert reference(path).keys() == {"embed.weight", "norm.weight", "norm.bias", "steps"}
    with mt.safe_open(path, "pt") as file:
        assert file.metadata() == {"head.weight": "embed.weight"} | (metadata or {})
    assert reader.load_model(other, path) == (set(), [])
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert other.head.weight is other.embed.weight
    if who[0] == "ours":
        assert given == metadata  # the caller's dict is left alone


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (Tied, Untied),
        (Untied, Tied),
        (lambda: Tied(True), Tied),
        (Tied, lambda: Tied(True)),
        (Strided, Strided),
        (Strided, Tied),
    ],
    ids=["untied file missing", "unexpected tied", "unexpected", "missing", "strided", "all wrong"],
)
@pytest.mark.parametrize("strict", [True, False])
def test_load_model_reports_missing_and_unexpected_names_alike(
    saved: Callable[[], torch.nn.Module], loaded: Callable[[], torch.nn.Module], strict: bool, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_model(saved(), str(path))

    def load(module_: ModuleType) -> Any:
        try:
            missing, unexpected = module_.load_model(loaded(), path, strict=strict)
        except RuntimeError as error:
            return type(error), str(error)
        return type(missing), set(missing), type(unexpected), sorted(unexpected)

    assert load(maptensors.torch) == load(safetensors.torch)


@pytest.mark.parametrize("whose", ["ours", "reference"])
def test_a_model_whose_shared_memory_nobody_covers_is_refused(whose: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cover"):
        module("torch", whose).save_model(Part(), str(tmp_path / "x"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("whose", ["ours", "reference"])
def test_force_contiguous_decides_about_strided_parameters(whose: str, tmp_path: Path) -> None:
    module_, path = module("torch", whose), tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="contiguous") as caught:
        module_.save_model(Strided(), str(path), force_contiguous=False)
    assert "force_contiguous=True" in str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    assert not path.exists()
    module_.save_model(Strided(), str(path))
    assert reference(path)["w"].data == np.arange(12, dtype="f4").reshape(3, 4).T.tobytes()


def test_load_model_leaves_parameters_that_are_not_the_files_pages(tmp_path: Path) -> None:
    # load_state_dict copies: training the module must neither fail nor reach the file.
    path = tmp_path / "x.safetensors"
    maptensors.torch.save_model(Tied(), path)
    before = path.read_bytes()
    model = Tied()
    maptensors.torch.load_model(model, path)
    with torch.no_grad():
        model.embed.weight.add_(1)
    assert path.read_bytes() == before


def test_load_state_dict_may_assign_the_mapped_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    mt.save(Untied().state_dict(), path)
    before = path.read_bytes()
    model = Untied()
    model.load_state_dict(maptensors.torch.load_file(path), assign=True)
    loss = model.head(model.embed(torch.tensor([1, 2]))).sum()
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert path.read_bytes() == before


# safe_open.

OPENERS = [pytest.param(mt.safe_open, id="ours"), pytest.param(safetensors.safe_open, id="reference")]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file.safetensors"
    safetensors.numpy.save_file(
        {"b": np.arange(12, dtype="f4").reshape(3, 4), "a": np.zeros(2, "i4"), "c": np.array(5, "i8")}, path
    )
    return path


def test_safe_open_has_the_methods_of_the_reference(file: Path) -> None:
    theirs = {name for name in dir(safetensors.safe_open) if not name.startswith("_")}
    assert theirs <= set(dir(mt.safe_open))
    with mt.safe_open(file, "np") as ours, safetensors.safe_open(file, "np") as reference_:
        for name in theirs:
            mine = inspect.signature(getattr(ours, name)).parameters
            assert list(mine) == list(inspect.signature(getattr(reference_, name)).parameters)
    assert list(inspect.signature(mt.safe_open).parameters) == ["filename", "framework", "device", "backend"]


@pytest.mark.parametrize("framework", ["pt", "torch", "pytorch", "np", "numpy", "jax", "flax"])
@pytest.mark.parametrize("backend", ["mmap", "pread"])
@pytest.mark.filterwarnings("ignore:.*int64.*is not available:UserWarning")
def test_safe_open_gives_what_the_reference_gives(framework: str, backend: str, file: Path) -> None:
    with (
        mt.safe_open(file, framework, device="cpu", backend=backend) as ours,
        safetensors.safe_open(file, framework, device="cpu", backend=backend) as theirs,
    ):
        assert ours.keys() == theirs.keys() == ["a", "b", "c"]
        assert type(ours.keys()) is type(ours.offset_keys()) is list
        assert ours.offset_keys() == theirs.offset_keys()
        assert ours.metadata() is theirs.metadata() is None
        for name in theirs.keys():  # noqa: SIM118 - not a mapping
            same(ours.get_tensor(name), theirs.get_tensor(name))
            mine, other = ours.get_slice(name), theirs.get_slice(name)
            assert (mine.get_shape(), mine.get_dtype()) == (other.get_shape(), other.get_dtype())
            assert type(mine.get_shape()) is list
        same_dict(ours.get_tensors(), theirs.get_tensors())


#: Slices that the reference takes, for numpy and torch or for torch only.
SLICES = [0, -1, (0,), slice(1, 3), ..., (slice(None), slice(None, None, 2)), (0, 0), (..., 0), slice(1, 1)]
SLICES += [(slice(0, 2), 1), (slice(None), -1), (1, ...), slice(None)]
TORCH_SLICES = [[0, 2], (slice(None), [0, 1]), None, slice(5, None), slice(-2, None), True]


@pytest.mark.parametrize("key", SLICES, ids=repr)
@pytest.mark.parametrize("framework", ["pt", "np", "flax"])
def test_slices_are_those_of_the_reference(framework: str, key: Any, file: Path) -> None:
    with mt.safe_open(file, framework) as ours, safetensors.safe_open(file, framework) as theirs:
        same(ours.get_slice("b")[key], theirs.get_slice("b")[key])


@pytest.mark.parametrize("key", TORCH_SLICES, ids=repr)
def test_torch_slices_beyond_basic_ones_are_those_of_the_reference(key: Any, file: Path) -> None:
    with mt.safe_open(file, "pt") as ours, safetensors.safe_open(file, "pt") as theirs:
        same(ours.get_slice("b")[key], theirs.get_slice("b")[key])


@pytest.mark.parametrize("key", [3, (0, 0, 0), "a", 1.0, slice(None, None, 0)], ids=repr)
@pytest.mark.parametrize("framework", ["pt", "np", "flax"])
@pytest.mark.parametrize("open_", OPENERS)
def test_slices_that_are_none_are_refused(open_: Any, framework: str, key: Any, file: Path) -> None:
    with open_(file, framework) as opened:
        part = opened.get_slice("b")
        with pytest.raises((safetensors.SafetensorError, IndexError, TypeError, ValueError)):
            part[key]


@pytest.mark.parametrize("open_", OPENERS)
@pytest.mark.parametrize("framework", ["pt", "np", "flax"])
def test_what_was_taken_outlives_the_file_and_the_closed_file_refuses(
    open_: Any, framework: str, file: Path
) -> None:
    with open_(file, framework) as opened:
        tensor, part = opened.get_tensor("b"), opened.get_slice("b")
    assert np.asarray(tensor)[2, 3] == np.asarray(part[2])[3] == 11
    for use in [opened.keys, opened.metadata, lambda: opened.get_tensor("b"), lambda: opened.get_slice("b")]:
        with pytest.raises((safetensors.SafetensorError, mt.SafetensorError)):
            use()
    assert opened.__exit__(None, None, None) is None


@pytest.mark.parametrize("method", ["get_tensor", "get_slice"])
def test_an_unknown_tensor_is_a_safetensor_error_and_a_key_error(method: str, file: Path) -> None:
    with safetensors.safe_open(file, "np") as theirs, pytest.raises(safetensors.SafetensorError):
        getattr(theirs, method)("zz")
    with mt.safe_open(file, "np") as ours, pytest.raises(mt.SafetensorError, match="zz") as caught:
        getattr(ours, method)("zz")
    assert isinstance(caught.value, KeyError)


@pytest.mark.parametrize(
    ("arguments", "theirs", "ours"),
    [
        (("xx",), safetensors.SafetensorError, mt.SafetensorError),
        (("",), safetensors.SafetensorError, mt.SafetensorError),
        ((None,), TypeError, TypeError),
        ((3,), TypeError, TypeError),
        ((), TypeError, TypeError),
        (("np", "cpu", "pread"), TypeError, TypeError),
        (("np", "cuda"), safetensors.SafetensorError, mt.SafetensorError),
        (("pt", "nonsense"), safetensors.SafetensorError, (mt.SafetensorError, RuntimeError)),
    ],
    ids=repr,
)
def test_wrong_arguments_of_safe_open_are_refused_at_once(
    arguments: tuple[Any, ...], theirs: Any, ours: Any, file: Path
) -> None:
    with pytest.raises(theirs):
        safetensors.safe_open(file, *arguments)
    with pytest.raises(ours):
        mt.safe_open(file, *arguments)


def test_safe_open_refuses_a_backend_that_is_none(file: Path) -> None:
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(file, "np", backend="x")
    with pytest.raises(ValueError, match="backend"):
        mt.safe_open(file, "np", backend="x")


@pytest.mark.parametrize("open_", OPENERS)
def test_a_missing_file_is_not_found(open_: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_(tmp_path / "none", "np")


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "cpu:0"], ids=repr)
def test_the_cpu_may_be_named_as_torch_names_it(device: Any, file: Path) -> None:
    found = maptensors.torch.load_file(file, device=device)
    assert found["b"].device.type == "cpu"
    same_dict(found, safetensors.torch.load_file(file))


def test_tensors_may_be_loaded_to_the_meta_device(file: Path) -> None:
    found = maptensors.torch.load_file(file, device="meta")
    assert found["b"].device.type == "meta"
    assert found["b"].shape == (3, 4)


def test_what_safe_open_hands_out_may_be_written_and_the_file_never_changes(file: Path) -> None:
    before = file.read_bytes()
    for framework in ["np", "pt"]:
        with mt.safe_open(file, framework) as opened:
            opened.get_tensor("b")[...] = 7
            opened.get_slice("b")[0][...] = 8
    assert file.read_bytes() == before
