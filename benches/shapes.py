"""The files that the benchmarks read, made on first use.

Files whose bytes are read hold real data; those that are only opened are sparse: true headers before a hole.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from math import prod
from pathlib import Path

import numpy as np

BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
MIB = 1 << 20

Spec = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


@dataclass(frozen=True)
class Shape:
    """One model on disk: where it is, and what is in it."""

    name: str
    path: str  # a file, or the directory of a sharded set
    files: tuple[str, ...]  # safetensors files
    pickle: str | None  # the same tensors as torch.save writes them
    tensors: int
    nbytes: int
    pick: str  # the name of one tensor, from the middle
    sparse: bool
    made: bool  # by us, so that it may be written again


def header_of(specs: Iterable[Spec], align: int = 4096) -> tuple[bytes, int]:
    """The header of a file that holds these tensors, padded, and how many bytes of data follow.

    Padded to a page; or, like the reference's, to 8 bytes, then never to the 64 that would do as well.
    """
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in specs:
        start, end = end, end + BYTES[dtype] * prod(shape)
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % align)
    text += b" " * (8 if align == 8 and len(text) % 64 == 56 else 0)
    return len(text).to_bytes(8, "little") + text, end


def write_sparse(path: Path, specs: Iterable[Spec]) -> None:
    header, nbytes = header_of(specs)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + nbytes)


def write_full(path: Path, specs: list[Spec], align: int = 4096) -> None:
    """Write f32 tensors of arbitrary values."""
    header, nbytes = header_of(specs, align)
    block = np.random.default_rng(7).random(2 * MIB // 4, np.float32)
    with path.open("wb") as file:
        file.write(header)
        for start in range(0, nbytes, block.nbytes):
            file.write(block.view(np.uint8)[: nbytes - start])


def write_pickle(path: Path, source: Path) -> None:
    import safetensors.torch
    import torch

    torch.save(safetensors.torch.load_file(source), path)


def equal(count: int, nbytes: int) -> list[Spec]:
    """As many f32 tensors of one size as fill so many bytes; two-dimensional where that goes evenly."""
    elements = nbytes // count // 4
    shape = (elements // 1024, 1024) if elements % 1024 == 0 else (elements,)
    return [(f"model.layers.{i}.mlp.up_proj.weight", "F32", shape) for i in range(count)]


def lora() -> list[Spec]:
    """Rank-8 adapters of the attention of a 7B model: 500 tensors."""
    specs: list[Spec] = []
    for layer in range(63):
        for part in "qkvo":
            stem = f"base_model.model.model.layers.{layer}.self_attn.{part}_proj"
            specs += [(f"{stem}.lora_A.weight", "F32", (8, 512)), (f"{stem}.lora_B.weight", "F32", (512, 8))]
    return specs[:500]


def llama(layers: int = 32) -> Iterator[Spec]:
    """Names and shapes of Llama 2 7B."""
    hidden, inner = 4096, 11008
    yield "model.embed_tokens.weight", "BF16", (32000, hidden)
    for i in range(layers):
        stem = f"model.layers.{i}"
        for part in "qkvo":
            yield f"{stem}.self_attn.{part}_proj.weight", "BF16", (hidden, hidden)
        yield f"{stem}.self_attn.rotary_emb.inv_freq", "F32", (64,)
        yield f"{stem}.mlp.gate_proj.weight", "BF16", (inner, hidden)
        yield f"{stem}.mlp.up_proj.weight", "BF16", (inner, hidden)
        yield f"{stem}.mlp.down_proj.weight", "BF16", (hidden, inner)
        yield f"{stem}.input_layernorm.weight", "BF16", (hidden,)
        yield f"{stem}.post_attention_layernorm.weight", "BF16", (hidden,)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (32000, hidden)


def deepseek(layers: int = 61, experts: int = 256) -> Iterator[Spec]:
    """Names and shapes of DeepSeek V3: fp8 with a scale for each block of 128 by 128, and the extra layer."""
    hidden, vocabulary = 7168, 129280
    yield "model.embed_tokens.weight", "BF16", (vocabulary, hidden)
    for i in range(layers + 1):
        yield from _deepseek_layer(f"model.layers.{i}", hidden, experts, dense=i < 3)
    extra = f"model.layers.{layers}"
    yield f"{extra}.embed_tokens.weight", "BF16", (vocabulary, hidden)
    yield f"{extra}.enorm.weight", "BF16", (hidden,)
    yield f"{extra}.hnorm.weight", "BF16", (hidden,)
    yield f"{extra}.eh_proj.weight", "BF16", (hidden, 2 * hidden)
    yield f"{extra}.shared_head.norm.weight", "BF16", (hidden,)
    yield f"{extra}.shared_head.head.weight", "BF16", (vocabulary, hidden)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (vocabulary, hidden)


def _scaled(name: str, rows: int, columns: int) -> Iterator[Spec]:
    yield f"{name}.weight", "F8_E4M3", (rows, columns)
    yield f"{name}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))


def _mlp(stem: str, hidden: int, inner: int) -> Iterator[Spec]:
    yield from _scaled(f"{stem}.gate_proj", inner, hidden)
    yield from _scaled(f"{stem}.up_proj", inner, hidden)
    yield from _scaled(f"{stem}.down_proj", hidden, inner)


def _deepseek_layer(stem: str, hidden: int, experts: int, dense: bool) -> Iterator[Spec]:
    attention = f"{stem}.self_attn"
    yield from _scaled(f"{attention}.q_a_proj", 1536, hidden)
    yield f"{attention}.q_a_layernorm.weight", "BF16", (1536,)
    yield from _scaled(f"{attention}.q_b_proj", 128 * 192, 1536)
    yield from _scaled(f"{attention}.kv_a_proj_with_mqa", 576, hidden)
    yield f"{attention}.kv_a_layernorm.weight", "BF16", (512,)
    yield from _scaled(f"{attention}.kv_b_proj", 128 * 256, 512)
    yield from _scaled(f"{attention}.o_proj", hidden, 128 * 128)
    yield f"{stem}.input_layernorm.weight", "BF16", (hidden,)
    yield f"{stem}.post_attention_layernorm.weight", "BF16", (hidden,)
    if dense:
        yield from _mlp(f"{stem}.mlp", hidden, 18432)
        return
    yield f"{stem}.mlp.gate.weight", "BF16", (experts, hidden)
    yield f"{stem}.mlp.gate.e_score_correction_bias", "F32", (experts,)
    for expert in range(experts):
        yield from _mlp(f"{stem}.mlp.experts.{expert}", hidden, 2048)
    yield from _mlp(f"{stem}.mlp.shared_experts", hidden, 2048)


def into_shards(specs: list[Spec], shards: int) -> list[list[Spec]]:
    """Cut a list of tensors, in order, into shards of about the same number of bytes."""
    ends = np.cumsum([BYTES[dtype] * prod(shape) for _, dtype, shape in specs])
    cuts = [int(np.searchsorted(ends, ends[-1] * i / shards)) for i in range(1, shards)]
    return [specs[a:b] for a, b in pairwise([0, *cuts, len(specs)])]


class Shapes:
    """Makes shapes under one directory, and finds those made before."""

    def __init__(self, data: Path) -> None:
        self.data = data

    def single(
        self, name: str, specs: list[Spec], *, sparse: bool = False, pickle: bool = False, align: int = 4096
    ) -> Shape:
        """A model in one file."""
        path = self.data / name / "model.safetensors"
        pickled = path.with_suffix(".pt") if pickle else None
        if self._begin(path.parent):
            if sparse:
                write_sparse(path, specs)
            else:
                write_full(path, specs, align)
            if pickled:
                write_pickle(pickled, path)
            self._done(path.parent)
        return _shape(name, path, [path], specs, pickled, sparse)

    def sharded(self, name: str, specs: list[Spec], shards: int) -> Shape:
        """A sparse model in several files, with an index."""
        folder = self.data / name
        cut = into_shards(specs, shards)
        paths = [folder / f"model-{i:05}-of-{shards:06}.safetensors" for i in range(1, shards + 1)]
        if self._begin(folder):
            for path, part in zip(paths, cut, strict=True):
                write_sparse(path, part)
            names = chain.from_iterable(
                ((tensor, path.name) for tensor, _, _ in part) for path, part in zip(paths, cut, strict=True)
            )
            total = sum(BYTES[dtype] * prod(shape) for _, dtype, shape in specs)
            index = {"metadata": {"total_size": total}, "weight_map": dict(names)}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
            self._done(folder)
        return _shape(name, folder, paths, specs, None, sparse=True)

    def existing(self, name: str, path: Path, *, pickle: bool = False) -> Shape:
        """A model that is there already; its pickled twin is made."""
        folder = self.data / name
        pickled = folder / "model.pt" if pickle else None
        if self._begin(folder):
            if pickled:
                write_pickle(pickled, path)
            self._done(folder)
        return _shape(name, path, [path], list(read_specs(path)), pickled, sparse=False, made=False)

    @staticmethod
    def _begin(folder: Path) -> bool:
        """Whether a shape has to be made; what an interrupted run left of it is removed."""
        if (folder / ".done").exists():
            return False
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return True

    @staticmethod
    def _done(folder: Path) -> None:
        os.sync()
        (folder / ".done").touch()


def read_specs(path: Path) -> Iterator[Spec]:
    with path.open("rb") as file:
        table = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    for name, entry in table.items():
        if name != "__metadata__":
            yield name, entry["dtype"], tuple(entry["shape"])


def _shape(
    name: str,
    path: Path,
    files: list[Path],
    specs: list[Spec],
    pickle: Path | None,
    sparse: bool,
    made: bool = True,
) -> Shape:
    return Shape(
        name=name,
        path=str(path),
        files=tuple(map(str, files)),
        pickle=str(pickle) if pickle else None,
        tensors=len(specs),
        nbytes=sum(os.stat(file).st_size for file in files),
        pick=specs[len(specs) // 2][0],
        sparse=sparse,
        made=made,
    )
