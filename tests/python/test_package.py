"""The package as such: what it imports, exports, prints, and how it behaves among threads and processes."""

import concurrent.futures
import copy
import doctest
import importlib.metadata
import importlib.resources
import inspect
import io
import json
import pickle
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import maptensors as mt
import maptensors.errors
import maptensors.flax
import maptensors.numpy
import maptensors.torch
import numpy as np
import pytest
from support import MODELS, ROOT, entry, raw, reference, succeed

DIGITS = MODELS / "digits.safetensors"


def test_bytes_of_a_file_go_out_and_in_under_two_names() -> None:
    data = mt.dumps({"w": np.arange(3, dtype="f4")}, metadata={"k": "v"})
    for given in (data, bytearray(data), memoryview(data), memoryview(data + data)[: len(data)]):
        with mt.loads(given) as model:
            assert model["w"].numpy().tolist() == [0, 1, 2]
            assert model.metadata == {"k": "v"}
    for gone in ("load", "save_bytes", "load_bytes"):
        assert not hasattr(mt, gone)
    for given in ("models/digits.safetensors", 7, None):
        with pytest.raises(
            TypeError, match=r"^loads takes the bytes of a file, not \w+; a path is opened by .*$"
        ):
            mt.loads(given)  # type: ignore[arg-type]


def test_an_open_file_is_refused_in_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    mt.save({"w": np.zeros(1)}, path)
    for mode in ("rb", "r"):
        with path.open(mode) as file:
            for use in (mt.open, mt.verify, maptensors.numpy.load_file, lambda file: mt.diff(path, file)):
                with pytest.raises(
                    TypeError, match=r"^path is .*not an open file \(\w+\): .* maptensors.loads$"
                ):
                    use(file)


def test_the_version_is_the_same_everywhere() -> None:
    assert mt.__version__ == importlib.metadata.version("maptensors")
    cargo = (ROOT / "Cargo.toml").read_text()
    assert f'version = "{mt.__version__}"' in cargo
    assert mt.__version__ in run("--version")


def test_the_package_says_that_it_is_typed() -> None:
    files = importlib.resources.files("maptensors")
    assert (files / "py.typed").is_file()
    assert (files / "_native.pyi").is_file()


def test_everything_exported_is_there_and_documented() -> None:
    for module in [mt, maptensors.numpy, maptensors.torch, maptensors.flax]:
        assert module.__doc__
        assert sorted(module.__all__) == sorted(set(module.__all__))
        for name in module.__all__:
            value = getattr(module, name)
            if not isinstance(value, str):
                assert (value.__doc__ or "").strip(), name
    for cls in [mt.Model, mt.Tensor, mt.Draft, mt.safe_open]:
        for name, value in vars(cls).items():
            if not name.startswith("_"):
                assert (value.__doc__ or "").strip(), f"{cls.__name__}.{name}"


def test_the_stub_names_what_the_module_has() -> None:
    stub = (importlib.resources.files("maptensors") / "_native.pyi").read_text()
    for cls in [mt.Model, mt.Tensor, mt.Draft]:
        body = stub.split(f"class {cls.__name__}:")[1].split("\n@final")[0]
        for name in vars(cls):
            if not name.startswith("_"):
                assert f"def {name}(" in body, f"{cls.__name__}.{name}"


def test_paths_are_what_the_stub_says(tmp_path: Path) -> None:
    # The stub: `paths -> list[str]`, `Draft.path -> str`.
    with mt.open(DIGITS) as model, mt.create(tmp_path / "x", {}) as draft:
        assert [type(path) for path in model.paths] == [str]
        assert type(draft.path) is str


@pytest.mark.parametrize("module", ["maptensors", "maptensors.errors", "maptensors.__main__"])
def test_importing_the_package_imports_no_framework(module: str) -> None:
    out = succeed(
        f"""
import sys, {module}
import maptensors
with maptensors.open({str(DIGITS)!r}) as model:
    model["fc1.bias"].tobytes(), model.metadata, list(model), repr(model)
print(sorted({{"numpy", "torch", "jax", "flax", "ml_dtypes", "safetensors"}} & sys.modules.keys()))
"""
    )
    assert out.strip() == "[]"


@pytest.mark.parametrize(
    ("module", "not_imported"),
    [("numpy", {"torch", "jax"}), ("torch", {"jax"}), ("flax", {"torch"})],
)
def test_a_frameworks_module_imports_only_its_framework(module: str, not_imported: set[str]) -> None:
    out = succeed(f"import sys, json, maptensors.{module}; print(json.dumps(sorted(sys.modules)))")
    assert not not_imported & set(json.loads(out))
    assert "safetensors" not in json.loads(out)


@pytest.mark.parametrize("first", ["main", "sub"])
def test_a_subinterpreter_cannot_import_the_package(first: str) -> None:
    out = succeed(
        """
import sys
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
if sys.argv[1] == "main":
    import maptensors
IMPORT = '''
import sys
sys.path[:] = PATH
try:
    import MODULE
    print("imported", flush=True)
except ImportError as error:
    print(error, [name for name in sys.modules if name.startswith("maptensors")], flush=True)
'''
for module in ("maptensors", "maptensors._native", "maptensors.torch"):
    sub = interpreters.create()
    interpreters.run_string(sub, IMPORT.replace("PATH", repr(sys.path)).replace("MODULE", module))
    interpreters.destroy(sub)
import maptensors
for argument in (b"", "no bytes"):
    try:
        maptensors.loads(argument)
    except (maptensors.MapTensorsError, TypeError) as error:
        print("caught")
""",
        first,
    )
    lines = out.splitlines()
    for line in lines[:3]:
        assert line.startswith("maptensors can be used in the main interpreter of a process only"), line
        assert line.endswith("[]"), "nothing of the package is left behind"
    assert lines[3:] == ["caught", "caught"]


def test_frameworks_that_are_absent_are_named() -> None:
    code = """
import sys
for name in sys.argv[2].split(","):
    sys.modules[name] = None
import maptensors
model = maptensors.open(sys.argv[1])
try:
    getattr(model["a"], sys.argv[3])()
except ImportError as error:
    print(error)
"""
    path = MODELS / "golden" / "scalars.safetensors"
    bf16 = MODELS / "digits-bf16.safetensors"
    for missing, method in [("numpy", "numpy"), ("torch", "torch"), ("jax", "jax")]:
        name = next(iter(mt.open(path)))
        assert missing in succeed(code.replace('"a"', repr(name)), path, missing, method)
    assert "pip install ml_dtypes" in succeed(code.replace('"a"', '"fc1.bias"'), bf16, "ml_dtypes", "numpy")


def test_the_docstrings_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = doctest.testmod(mt, raise_on_error=False)
    assert result.failed == 0 < result.attempted


def test_documented_examples_of_the_read_me_are_python(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text()
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    for block in blocks:
        compile(block.replace(">>> ", "").replace("... ", ""), "README.md", "exec")


# The command line.


def run(*args: object, expect: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "maptensors", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_inspect_lists_every_tensor() -> None:
    out = run("inspect", DIGITS)
    with mt.open(DIGITS) as model:
        for name, tensor in model.items():
            assert name in out
            assert tensor.dtype in out


def test_the_command_and_the_module_are_the_same() -> None:
    command = shutil.which("maptensors", path=sysconfig.get_path("scripts"))
    assert command is not None
    done = subprocess.run([command, "inspect", DIGITS], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0
    assert done.stdout == run("inspect", DIGITS)
    [script] = importlib.metadata.entry_points(group="console_scripts", name="maptensors")
    assert script.value == "maptensors.__main__:main"


@pytest.mark.parametrize("args", [["nonsense"], ["inspect"], ["inspect", "/nonexistent"], ["--nonsense"]])
def test_the_command_fails_with_a_message(args: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "maptensors", *args], capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert done.stderr
    assert "panicked" not in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_survives_a_closed_pipe(tmp_path: Path) -> None:
    path = tmp_path / "many.safetensors"
    part = entry("U8", [0], 0, 0)
    path.write_bytes(raw({f"tensor{i}": part for i in range(50_000)}))
    child = subprocess.Popen(
        [sys.executable, "-m", "maptensors", "inspect", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.readline()
    child.stdout.close()
    error = child.stderr.read()
    child.stderr.close()
    child.wait(60)
    assert b"panicked" not in error
    assert b"Traceback" not in error


def test_the_command_prints_no_control_characters_of_a_hostile_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(hostile())
    out = run("inspect", path)
    assert printable(out)


# What is printed.

HOSTILE = ["\x1b[31mred", "\0", "a\nb\rc", "\x7f", "\x9b31m", "\u202eback", "\u2066", "x" * 10**5]


def hostile() -> bytes:
    entries = {name: entry("U8", [1], i, i + 1) for i, name in enumerate(HOSTILE)}
    metadata = {"__metadata__": {name[:50]: name for name in HOSTILE}}
    return raw(metadata | entries, bytes(len(HOSTILE)))


def printable(text: str) -> bool:
    return all(c == "\n" or (c.isprintable() and not 0x202A <= ord(c) <= 0x202E) for c in text)


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:16])
def test_a_hostile_name_is_escaped_when_printed(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(hostile())
    with mt.open(path) as model:
        texts = [repr(model[name]), str(model[name]), repr(model[name][...])]
        for use in [
            lambda: model[name + "?"],
            lambda: model[name][7],
            lambda: model[name].view("F64"),
            lambda: model[name].__setitem__(0, np.zeros(9)),
            lambda: mt.dumps({name: object()}),
            lambda: mt.dumps({name: np.array([None])}),
            lambda: mt.dumps([(name, np.zeros(1)), (name, np.zeros(1))]),
            lambda: mt.create(tmp_path / "y", {name: {"dtype": "F32"}}),
            lambda: mt.create(tmp_path / "y", {"a": (name, ())}),
        ]:
            with pytest.raises((ValueError, TypeError, IndexError)) as caught:
                use()
            texts.append(str(caught.value))
    for text in texts:
        assert printable(text), ascii(text)
        assert len(text) < 1000


def test_hostile_paths_are_escaped_when_printed(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[31m\nb.safetensors"
    path.write_bytes(raw("[]"))
    with pytest.raises(mt.MapTensorsError) as caught:
        mt.open(path)
    assert printable(str(caught.value))
    mt.save({"a": np.zeros(1)}, path)
    with mt.open(path) as model:
        assert printable(repr(model))
    with mt.create(path, {}) as draft:
        assert printable(repr(draft))


def test_a_repr_says_what_it_is() -> None:
    with mt.open(DIGITS) as model:
        assert repr(model["fc1.weight"]) == 'Tensor("fc1.weight", F32, [64, 64], mapped)'
        assert "4 tensors" in repr(model)
    with mt.open(DIGITS, "r") as model:
        assert repr(model["fc1.bias"]) == 'Tensor("fc1.bias", F32, [64], mapped, read-only)'


# A mapping.


def test_a_model_is_a_mapping() -> None:
    with mt.open(DIGITS) as model:
        assert isinstance(model, Mapping)
        assert list(model) == list(model.keys()) == [name for name, _ in model.items()]
        assert len(model) == len(model.keys()) == len(model.values()) == 4
        assert {**model}.keys() == model.keys() == reference(DIGITS).keys()
        assert "fc1.weight" in model
        assert "fc1.weight" in model.keys()  # noqa: SIM118 - the view is what is tested
        assert 3 not in model
        assert model.get("nope") is None
        with pytest.raises(TypeError):
            model[3]
        match model:
            case {"fc1.bias": bias}:
                assert bias.shape == (64,)
            case _:
                pytest.fail("no match")
        tensor = model["fc1.weight"]
        assert (tensor.ndim, tensor.size, len(tensor), tensor.nbytes) == (2, 4096, 64, 16384)
        with pytest.raises(TypeError, match="scalar"):
            len(tensor[0, 0])
        assert [row.shape for row in tensor] == [(64,)] * 64


def test_several_files_may_be_opened_as_one_model() -> None:
    shards = sorted((MODELS / "digits-sharded").glob("*.safetensors"))
    for paths in [shards, [str(path) for path in shards], tuple(shards), iter(shards)]:
        with mt.open(paths) as model:
            assert {name: t.tobytes() for name, t in model.items()} == {
                name: read.data for name, read in reference(DIGITS).items()
            }
    with pytest.raises(mt.errors.DuplicateError):
        mt.open([shards[0], shards[0]])


def test_attributes_cannot_be_set() -> None:
    with mt.open(DIGITS) as model:
        for what, name in [
            (model, "mode"),
            (model, "other"),
            (model["fc1.bias"], "shape"),
            (model["fc1.bias"], "x"),
        ]:
            with pytest.raises(AttributeError):
                setattr(what, name, 1)
        with pytest.raises(TypeError):
            model["x"] = 1
        with pytest.raises(TypeError):
            del model["fc1.bias"]
        model.metadata["new"] = "x"
        assert "new" not in model.metadata


# Pickling: refused, since a mapping belongs to its process. The path, or the arrays, can be sent.


@pytest.mark.parametrize("what", ["model", "tensor", "draft"])
@pytest.mark.parametrize("how", [pickle.dumps, copy.copy, copy.deepcopy], ids=["pickle", "copy", "deepcopy"])
def test_pickling_and_copying_are_refused(what: str, how: Callable[[Any], Any], tmp_path: Path) -> None:
    with mt.open(DIGITS) as model:
        value = {"model": model, "tensor": model["fc1.bias"], "draft": mt.create(tmp_path / "x", {})}[what]
        with pytest.raises(TypeError, match="pickle"):
            how(value)


def test_arrays_taken_from_a_model_are_pickled_as_values() -> None:
    with mt.open(DIGITS) as model:
        array = pickle.loads(pickle.dumps(model["fc1.bias"].numpy()))
        assert array.tobytes() == model["fc1.bias"].tobytes()


# Threads.


def test_other_threads_run_while_a_save_copies(tmp_path: Path) -> None:
    big = {str(i): np.ones(1 << 24, "f4") for i in range(6)}
    counted, saving = [0], threading.Event()
    done = threading.Event()

    def count() -> None:
        while not done.is_set():
            if saving.is_set():
                counted[0] += 1
            time.sleep(0)

    thread = threading.Thread(target=count)
    thread.start()
    interval = sys.getswitchinterval()
    try:
        # So long that the counter runs only if the save lets go of the lock itself.
        sys.setswitchinterval(1000)
        saving.set()
        mt.save(big, tmp_path / "big.safetensors", durable=False)
        saving.clear()
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join()
    assert counted[0] > 0


def test_many_threads_open_read_and_save_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "shared.safetensors"
    expected = reference(DIGITS)
    with mt.open(DIGITS) as model:
        model.save(path)

    def work(number: int) -> None:
        for turn in range(10):
            with mt.open(path, backend="mmap" if number % 2 else "pread") as model:
                arrays = model.numpy()
                assert {n: a.tobytes() for n, a in arrays.items()} == {n: r.data for n, r in expected.items()}
                if (turn + number) % 3 == 0:
                    model.save(path, durable=False)
                else:
                    arrays["fc1.bias"][:] = number

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, number) for number in range(8)]:
            future.result()
    assert reference(path) == expected
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_one_model_may_be_used_and_closed_by_many_threads() -> None:
    data = (MODELS / "golden" / "odd-header.safetensors").read_bytes()
    path = MODELS / "golden" / "odd-header.safetensors"
    expected = reference(data)
    for _ in range(50):
        model = mt.open(path)
        barrier = threading.Barrier(6)

        def work(number: int, model: mt.Model = model, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            if number == 0:
                model.close()
                return
            try:
                for name, tensor in model.items():
                    assert tensor.numpy().tobytes() == expected[name].data
            except ValueError:
                assert model.closed

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            for future in [pool.submit(work, number) for number in range(6)]:
                future.result()


# Processes.


def test_a_child_after_fork_reads_edits_and_saves(tmp_path: Path) -> None:
    out = succeed(
        """
import os, sys, threading
import numpy
import maptensors as mt
source, out = sys.argv[1:]
model = mt.open(source)
array = model["fc1.weight"].numpy()
array[0, 0] = 5
mt.save(model, out + ".warm", durable=False)
threading.Thread(target=lambda: model["fc1.bias"].numpy().sum()).start()
child = os.fork()
if child == 0:
    try:
        assert array[0, 0] == 5
        array[0, 1] = 6
        assert model.residency().private >= 1
        with mt.open(source) as again:
            assert again["fc1.weight"].numpy()[0, 0] != 5
        model.save(out)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert array[0, 1] != 6
print(mt.open(out)["fc1.weight"].numpy()[0, :2].tolist())
""",
        DIGITS,
        tmp_path / "x.safetensors",
    )
    assert out.strip() == "[5.0, 6.0]"


def test_a_process_that_exits_with_everything_open_exits_cleanly(tmp_path: Path) -> None:
    out = succeed(
        """
import sys
import numpy, torch
import maptensors as mt
model = mt.open(sys.argv[1])
kept = [model, model.numpy(), model.torch(), model["fc1.bias"].__dlpack__(), memoryview(model["fc1.bias"])]
draft = mt.create(sys.argv[2], {"a": ("F32", (3,))})
cycle = [draft, kept]
cycle.append(cycle)
print("end")
""",
        DIGITS,
        tmp_path / "x",
    )
    assert out.strip() == "end"
    assert list(tmp_path.iterdir()) == []


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    models = [mt.open(DIGITS) for _ in range(50)]
    arrays = [model.numpy() for model in models]
    assert descriptors() == before
    for i in range(20):
        mt.save(arrays[0], tmp_path / f"{i}", durable=False)
        with pytest.raises(ValueError, match="shape"):
            mt.create(tmp_path / "x", {"a": ("F32", (1,))})["a"][...] = np.zeros(5)
    assert descriptors() == before


def test_signatures_can_be_inspected() -> None:
    assert str(inspect.signature(mt.open)).startswith("(path, mode='c', *, backend='mmap', populate=False")
    for function, positional, options in [
        (mt.create, ["path", "spec"], {"metadata", "durable"}),
        (mt.save, ["tensors", "path"], {"metadata", "durable", "max_shard_size"}),
        (mt.Model.save, ["self", "path"], {"metadata", "durable", "max_shard_size"}),
    ]:
        parameters = inspect.signature(function).parameters
        assert [p.name for p in parameters.values() if p.kind is not p.KEYWORD_ONLY] == positional
        assert options <= {p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY}


def test_a_tensor_is_written_to_a_stream_as_bytes() -> None:
    with mt.open(DIGITS) as model:
        stream = io.BytesIO()
        stream.write(model["fc1.bias"])
        assert stream.getvalue() == model["fc1.bias"].tobytes()
