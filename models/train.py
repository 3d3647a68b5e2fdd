"""Train the digits classifier and write the example models.

Everything is seeded. The arithmetic is done in float64 and rounded to float32
once at the end, so that the order in which a BLAS library adds things up has
next to no chance of showing in the result.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from sklearn.datasets import load_digits

# isort: split
from stable_save import save_arrays

SPLIT_SEED = 0
TRAIN_SEED = 1

PIXEL_MAX = 16
HELD_OUT = 400
HIDDEN = 64
CLASSES = 10

EPOCHS = 60
BATCH = 32
LEARNING_RATE = 0.1

SHIFTED = 400
SHIFT_PIXELS = 1
TUNE_EPOCHS = 20
TUNE_BATCH = 20
TUNE_LEARNING_RATE = 0.1

DATASET = "scikit-learn digits (UCI ML hand-written digits)"
METADATA = {
    "format": "pt",
    "architecture": "64-64-10 MLP, ReLU, inputs pixel/16",
    "dataset": DATASET,
}

Parameters = dict[str, np.ndarray]


class Examples(NamedTuple):
    """Raw images (U8, pixels 0..16) and their labels (U8)."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Digits:
    """The data set, split once and for all."""

    train: Examples
    held_out: Examples


def load_split() -> Digits:
    """Load the digits and set the held-out ones apart."""
    digits = load_digits()
    images = digits.images.astype(np.uint8)
    labels = digits.target.astype(np.uint8)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    train, held_out = order[:-HELD_OUT], order[-HELD_OUT:]
    return Digits(
        train=Examples(images[train], labels[train]),
        held_out=Examples(images[held_out], labels[held_out]),
    )


def shift_right(examples: Examples, pixels: int) -> Examples:
    """Move every image right by `pixels`, filling with zeros."""
    moved = np.zeros_like(examples.images)
    moved[:, :, pixels:] = examples.images[:, :, :-pixels]
    return Examples(moved, examples.labels)


def inputs(images: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Flatten images and scale their pixels to 0..1."""
    return images.reshape(len(images), -1).astype(dtype) / dtype.type(PIXEL_MAX)


def initial_parameters(rng: np.random.Generator) -> Parameters:
    """Draw weights with the usual scale for ReLU layers; biases start at zero."""
    pixels = 8 * 8
    return {
        "fc1.weight": rng.standard_normal((HIDDEN, pixels)) * np.sqrt(2 / pixels),
        "fc1.bias": np.zeros(HIDDEN),
        "fc2.weight": rng.standard_normal((CLASSES, HIDDEN)) * np.sqrt(1 / HIDDEN),
        "fc2.bias": np.zeros(CLASSES),
    }


def forward(parameters: Parameters, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the hidden activations and the logits."""
    hidden = np.maximum(x @ parameters["fc1.weight"].T + parameters["fc1.bias"], 0)
    return hidden, hidden @ parameters["fc2.weight"].T + parameters["fc2.bias"]


def gradients(parameters: Parameters, x: np.ndarray, labels: np.ndarray) -> Parameters:
    """Differentiate the mean softmax cross-entropy of a batch."""
    hidden, logits = forward(parameters, x)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    d_logits = odds / odds.sum(axis=1, keepdims=True)
    d_logits[np.arange(len(labels)), labels] -= 1
    d_logits /= len(labels)
    d_hidden = (d_logits @ parameters["fc2.weight"]) * (hidden > 0)
    return {
        "fc1.weight": d_hidden.T @ x,
        "fc1.bias": d_hidden.sum(axis=0),
        "fc2.weight": d_logits.T @ hidden,
        "fc2.bias": d_logits.sum(axis=0),
    }


def sgd_epoch(
    parameters: Parameters,
    x: np.ndarray,
    labels: np.ndarray,
    batch: int,
    rate: float,
) -> Parameters:
    """Take one plain SGD step per batch, batches in order, over all examples."""
    for start in range(0, len(x), batch):
        rows = slice(start, start + batch)
        step = gradients(parameters, x[rows], labels[rows])
        parameters = {k: v - rate * step[k] for k, v in parameters.items()}
    return parameters


def train(examples: Examples) -> Parameters:
    """Train from scratch, reshuffling each epoch; return float32 parameters."""
    rng = np.random.default_rng(TRAIN_SEED)
    parameters = initial_parameters(rng)
    x = inputs(examples.images, np.dtype(np.float64))
    for _ in range(EPOCHS):
        order = rng.permutation(len(x))
        parameters = sgd_epoch(parameters, x[order], examples.labels[order], BATCH, LEARNING_RATE)
    return {name: value.astype(np.float32) for name, value in parameters.items()}


def fine_tune(parameters: Parameters, examples: Examples) -> Parameters:
    """Tune on `examples` in float32, in the order given."""
    x = inputs(examples.images, np.dtype(np.float32))
    for _ in range(TUNE_EPOCHS):
        parameters = sgd_epoch(parameters, x, examples.labels, TUNE_BATCH, TUNE_LEARNING_RATE)
    return parameters


def accuracy(parameters: Parameters, examples: Examples) -> float:
    """Measure the share of examples classified rightly, in float32."""
    _, logits = forward(parameters, inputs(examples.images, np.dtype(np.float32)))
    return float(np.mean(logits.argmax(axis=1) == examples.labels))


def to_bfloat16(parameters: Parameters) -> Parameters:
    """Round to bfloat16, to nearest with ties to even."""
    return {k: v.astype(ml_dtypes.bfloat16) for k, v in parameters.items()}


def to_float32(parameters: Parameters) -> Parameters:
    """Widen to float32, which is exact."""
    return {k: v.astype(np.float32) for k, v in parameters.items()}


def write_sharded(folder: Path, parameters: Parameters) -> None:
    """Write one layer per shard and the index that Hugging Face tools read."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = ("fc1", "fc2")
    weight_map = {}
    for number, layer in enumerate(layers, start=1):
        shard = f"model-{number:05}-of-{len(layers):05}.safetensors"
        tensors = {k: v for k, v in parameters.items() if k.startswith(f"{layer}.")}
        save_arrays(folder / shard, tensors, METADATA)
        weight_map.update(dict.fromkeys(tensors, shard))
    total = sum(value.nbytes for value in parameters.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def write_examples(path: Path, held_out: Examples, shifted: Examples, shifted_held_out: Examples) -> None:
    """Write the images and labels that the demos and tests measure on."""
    tensors = {
        "images": held_out.images,
        "labels": held_out.labels,
        "shifted.images": shifted.images,
        "shifted.labels": shifted.labels,
        "shifted.heldout.images": shifted_held_out.images,
        "shifted.heldout.labels": shifted_held_out.labels,
    }
    save_arrays(path, tensors, {"dataset": DATASET})


def make(out: Path) -> None:
    """Train, write every file, and print what was measured."""
    out.mkdir(parents=True, exist_ok=True)
    digits = load_split()
    subset = Examples(digits.train.images[:SHIFTED], digits.train.labels[:SHIFTED])
    shifted = shift_right(subset, SHIFT_PIXELS)
    shifted_held_out = shift_right(digits.held_out, SHIFT_PIXELS)

    parameters = train(digits.train)
    rounded = to_bfloat16(parameters)
    save_arrays(out / "digits.safetensors", parameters, METADATA)
    save_arrays(out / "digits-bf16.safetensors", rounded, METADATA)
    write_sharded(out / "digits-sharded", parameters)
    write_examples(out / "digits-heldout.safetensors", digits.held_out, shifted, shifted_held_out)

    tuned = fine_tune(parameters, shifted)
    measured = {
        "train": accuracy(parameters, digits.train),
        "held out": accuracy(parameters, digits.held_out),
        "held out, bf16 weights": accuracy(to_float32(rounded), digits.held_out),
        "shifted held out": accuracy(parameters, shifted_held_out),
        "shifted held out, fine-tuned": accuracy(tuned, shifted_held_out),
        "held out, fine-tuned": accuracy(tuned, digits.held_out),
    }
    for what, share in measured.items():
        print(f"{share:8.2%}  {what}")


def main() -> None:
    """Train the models and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent,
        metavar="DIR",
        help="folder to write into (default: the folder of this script)",
    )
    make(parser.parse_args().out)


if __name__ == "__main__":
    main()
