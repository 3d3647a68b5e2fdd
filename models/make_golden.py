"""Write the golden files: small safetensors files whose content is known.

The reference library writes each of them, save the two it has no public way to
write, which are put together by hand (`f6` and `odd-header`). The reference
reader then reads every file back and must find what `expected.json` says.
"""

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import TensorSpec, deserialize, safe_open

# isort: split
from stable_save import join, save_specs

# What the reference calls each dtype when it writes, by the name in the file.
# F6_E2M3 and F6_E3M2 are missing: it reads them but has no name to write them.
REFERENCE_NAMES = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}

EVERY_BYTE = bytes(range(256))


class Tensor(NamedTuple):
    """A tensor as the format sees it: a dtype, a shape in elements, raw bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Golden(NamedTuple):
    """What one golden file holds."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] | None = None


def unsigned(values: list[int], size: int) -> bytes:
    """Pack bit patterns of `size` bytes each, little-endian."""
    return b"".join(value.to_bytes(size, "little") for value in values)


def float_patterns(exponent_bits: int, mantissa_bits: int) -> list[int]:
    """List the bit patterns of an IEEE-like float that a copy could damage."""
    infinity = ((1 << exponent_bits) - 1) << mantissa_bits
    quiet = 1 << (mantissa_bits - 1)
    smallest_normal = 1 << mantissa_bits
    one = ((1 << (exponent_bits - 1)) - 1) << mantissa_bits
    magnitudes = [
        0,
        1,  # smallest subnormal
        smallest_normal - 1,  # largest subnormal
        smallest_normal,
        one,
        infinity - 1,  # largest finite
        infinity,
        infinity | quiet,  # the usual quiet NaN
        infinity | quiet | 5,  # a quiet NaN with a payload
        infinity | 1,  # a signalling NaN
        infinity | (quiet - 1),  # a signalling NaN with a full payload
        infinity | (2 * quiet - 1),  # a NaN with every bit set
    ]
    sign = 1 << (exponent_bits + mantissa_bits)
    return magnitudes + [sign | magnitude for magnitude in magnitudes]


def float_tensor(dtype: str, exponent_bits: int, mantissa_bits: int) -> Tensor:
    """Make a tensor of `float_patterns`."""
    patterns = float_patterns(exponent_bits, mantissa_bits)
    size = (1 + exponent_bits + mantissa_bits) // 8
    return Tensor(dtype, (2, len(patterns) // 2), unsigned(patterns, size))


def complex_tensor() -> Tensor:
    """Pair every float32 pattern with another, so that swapped parts show."""
    real = float_patterns(8, 23)
    imaginary = real[1:] + real[:1]
    parts = [part for pair in zip(real, imaginary, strict=True) for part in pair]
    return Tensor("C64", (2, len(real) // 2), unsigned(parts, 4))


def integer_tensor(dtype: str, size: int) -> Tensor:
    """Hold zero, one, all ones, both signs' limits and distinct bytes."""
    sign = 1 << (8 * size - 1)
    counted = int.from_bytes(range(1, size + 1), "little")
    patterns = [0, 1, sign - 1, sign, 2 * sign - 1, counted]
    return Tensor(dtype, (len(patterns),), unsigned(patterns, size))


def all_dtypes() -> Golden:
    """Hold a tensor of each dtype that the reference can write."""
    tensors = [
        Tensor("BOOL", (2, 2), bytes([0, 1, 1, 0])),
        Tensor("F4", (16, 32), EVERY_BYTE),
        float_tensor("F16", 5, 10),
        float_tensor("BF16", 8, 7),
        float_tensor("F32", 8, 23),
        float_tensor("F64", 11, 52),
        complex_tensor(),
    ]
    one_byte = ("U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0")
    for dtype in (*one_byte, "F8_E4M3FNUZ", "F8_E5M2FNUZ"):
        tensors.append(Tensor(dtype, (16, 16), EVERY_BYTE))
    for size in (2, 4, 8):
        tensors.append(integer_tensor(f"I{8 * size}", size))
        tensors.append(integer_tensor(f"U{8 * size}", size))
    return Golden({tensor.dtype.lower(): tensor for tensor in tensors})


def scalars() -> Golden:
    """Hold tensors of rank 0."""
    return Golden(
        {
            "bool": Tensor("BOOL", (), b"\x01"),
            "bf16": Tensor("BF16", (), np.uint16(0x3FC0).tobytes()),
            "f32": Tensor("F32", (), np.float32(1.5).tobytes()),
            "i64": Tensor("I64", (), np.int64(-2).tobytes()),
        }
    )


def zero_size() -> Golden:
    """Hold tensors with no element, of several shapes."""
    return Golden(
        {
            "none": Tensor("F32", (0,), b""),
            "no-rows": Tensor("I64", (0, 3), b""),
            "no-columns": Tensor("BF16", (2, 0), b""),
        }
    )


def metadata() -> Golden:
    """Hold metadata that has to be escaped, and an empty key and value."""
    return Golden(
        {"x": Tensor("U8", (3,), b"\x01\x02\x03")},
        {
            "": "the empty key",
            "empty value": "",
            "format": "pt",
            "lines": "one\ntwo\r\n\tthree",
            "nul": "a\0b",
            "quotes and \\": 'she said "C:\\temp"',
            "ünïcode 漢字": "🦀 é e\u0301 \u202e",
        },
    )


def names() -> Golden:
    """Hold tensor names that a careless program trips over."""
    odd = [
        "",
        'with "quotes"',
        "unicode-é漢",
        "../x",
        "nul\0name",
        "\x1b[31mred\x1b[0m",
    ]
    return Golden({name: Tensor("U8", (1,), bytes([i])) for i, name in enumerate(odd, start=1)})


def f6() -> Golden:
    """Hold the six-bit floats: 64 elements in 48 bytes."""
    data = bytes(range(48))
    return Golden(
        {
            "f6_e2m3": Tensor("F6_E2M3", (64,), data),
            "f6_e3m2": Tensor("F6_E3M2", (4, 16), data[::-1]),
        }
    )


def odd_header() -> Golden:
    """Hold data that no element type wider than a byte finds aligned.

    The tensors go from widest to narrowest, so that the odd header length alone
    makes every offset odd.
    """
    return Golden(
        {
            "f64": Tensor("F64", (3,), np.array([1.5, -0.0, np.inf]).tobytes()),
            "i32": Tensor("I32", (2, 2), np.arange(-2, 2, dtype=np.int32).tobytes()),
            "f16": Tensor("F16", (2,), np.array([1, 2], dtype=np.float16).tobytes()),
            "u8": Tensor("U8", (3,), b"\x07\x08\x09"),
        },
        {"format": "pt"},
    )


def storage_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape that the reference wants to be told.

    It counts F4 in bytes, two elements each, and doubles the last axis itself.
    """
    if tensor.dtype != "F4":
        return tensor.shape
    return (*tensor.shape[:-1], tensor.shape[-1] // 2)


def write_by_reference(path: Path, golden: Golden) -> None:
    """Let the reference write the file from raw bytes."""
    buffers = {name: np.frombuffer(tensor.data, dtype=np.uint8) for name, tensor in golden.tensors.items()}
    specs = {
        name: TensorSpec(
            dtype=REFERENCE_NAMES[tensor.dtype],
            shape=storage_shape(tensor),
            data_ptr=buffers[name].ctypes.data,
            data_len=buffers[name].nbytes,
        )
        for name, tensor in golden.tensors.items()
    }
    save_specs(path, specs, golden.metadata)


def hand_built_header(golden: Golden) -> bytes:
    """Write the JSON header, the tensors one after the other as given."""
    entries: dict[str, object] = {}
    if golden.metadata is not None:
        entries["__metadata__"] = golden.metadata
    end = 0
    for name, tensor in golden.tensors.items():
        begin, end = end, end + len(tensor.data)
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
    return json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()


def hand_build(path: Path, golden: Golden, *, odd: bool = False) -> None:
    """Put a file together without the reference.

    The header is padded to a multiple of 8 bytes, as the reference does, or if
    `odd` to an odd length, which the format allows and the reference never does.
    """
    header = hand_built_header(golden)
    padding = (len(header) + 1) % 2 if odd else -len(header) % 8
    data = b"".join(tensor.data for tensor in golden.tensors.values())
    path.write_bytes(join(header + b" " * padding, data))


def read_by_reference(path: Path) -> Golden:
    """Let the reference read a file."""
    tensors = {
        name: Tensor(found["dtype"], tuple(found["shape"]), bytes(found["data"]))
        for name, found in deserialize(path.read_bytes())
    }
    with safe_open(path, framework="np") as opened:
        return Golden(tensors, opened.metadata())


def expected(golden: Golden) -> dict[str, object]:
    """Describe a file for `expected.json`, tensors sorted by name."""
    return {
        "metadata": golden.metadata,
        "tensors": [
            {
                "name": name,
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "sha256": hashlib.sha256(tensor.data).hexdigest(),
            }
            for name, tensor in sorted(golden.tensors.items())
        ],
    }


def check(out: Path, files: Mapping[str, Golden]) -> None:
    """Read every file back and stop at the first that is not as meant."""
    for name, golden in files.items():
        if read_by_reference(out / name) != golden:
            raise SystemExit(f"{name}: the reference reads something else back")


def make(out: Path) -> None:
    """Write the golden files and their description, and check them."""
    by_reference = {
        "all-dtypes.safetensors": all_dtypes(),
        "empty.safetensors": Golden({}),
        "metadata.safetensors": metadata(),
        "names.safetensors": names(),
        "scalars.safetensors": scalars(),
        "zero-size.safetensors": zero_size(),
    }
    by_hand = {"f6.safetensors": f6(), "odd-header.safetensors": odd_header()}

    out.mkdir(parents=True, exist_ok=True)
    for name, golden in by_reference.items():
        write_by_reference(out / name, golden)
    hand_build(out / "f6.safetensors", by_hand["f6.safetensors"])
    hand_build(out / "odd-header.safetensors", by_hand["odd-header.safetensors"], odd=True)

    files = by_reference | by_hand
    check(out, files)
    description = {name: expected(golden) for name, golden in sorted(files.items())}
    text = json.dumps(description, indent=2) + "\n"
    (out / "expected.json").write_text(text, encoding="utf-8")
    print(f"{len(files)} files written and read back by the reference")


def main() -> None:
    """Write the golden files and read them back."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent / "golden",
        metavar="DIR",
        help="folder to write into (default: golden, beside this script)",
    )
    make(parser.parse_args().out)


if __name__ == "__main__":
    main()
